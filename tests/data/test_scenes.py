import numpy as np
import pytest
import torch

from vispeft.data import Preprocessing, ScenesData, render_scene
from vispeft.data.scenes import SCENE_CLASSES, SCENE_PARTS, VIEW
from vispeft.errors import ConfigError

BACKBONE = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SCENES = [render_scene(0, index, (96, 128)) for index in range(8)]


def ready(**settings):
    data = ScenesData(**{"images": 20, "scene_size": 32, **settings})
    data.fit_to(BACKBONE)
    data.setup()
    return data


def places(scene):
    """Points (3, H, W) in camera coordinates (right, up, towards the camera), from the depth alone."""
    height, width = scene.depth.shape
    focal = max(height, width) / 2 / np.tan(np.radians(VIEW / 2))
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return scene.depth * torch.stack(
        [(columns - width / 2) / focal, (height / 2 - rows) / focal, -torch.ones(height, width)]
    )


def test_a_scene_is_a_function_of_seed_and_index():
    first, again = render_scene(0, 1, (24, 32)), render_scene.__wrapped__(0, 1, (24, 32))
    for field in ("image", "mask", "parts", "depth", "normals", "edges"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert not torch.equal(first.image, render_scene(0, 2, (24, 32)).image)
    assert not torch.equal(first.image, render_scene(1, 1, (24, 32)).image)


def test_another_size_shows_the_same_scene():
    small, large = render_scene(0, 3, (32, 48)), render_scene(0, 3, (96, 144))
    middle = (slice(1, None, 3), slice(1, None, 3))  # where the middles of the pixels are the same
    assert (small.mask == large.mask[middle]).float().mean() > 0.999
    torch.testing.assert_close(small.depth, large.depth[middle], atol=1e-3, rtol=1e-4)
    assert (small.image.int() - large.image[(slice(None), *middle)].int()).abs().float().mean() < 0.1


def test_fields_have_their_kinds_and_all_classes_and_parts_occur():
    for scene in SCENES:
        assert (scene.image.shape, scene.image.dtype) == ((3, 96, 128), torch.uint8)
        assert (scene.mask.shape, scene.mask.dtype) == ((96, 128), torch.uint8)
        assert (scene.depth.dtype, scene.normals.dtype, scene.edges.dtype) == (
            torch.float32,
            torch.float32,
            torch.bool,
        )
        assert 0 < scene.depth.min() < scene.depth.max() < 20
        torch.testing.assert_close(scene.normals.norm(dim=0), torch.ones(96, 128))
        # Nothing is seen from behind.
        assert bool(((scene.normals * places(scene)).sum(0) < 1e-3).all())
    assert torch.cat([scene.mask.unique() for scene in SCENES]).unique().tolist() == list(range(len(SCENE_CLASSES)))
    assert torch.cat([scene.parts.unique() for scene in SCENES]).unique().tolist() == list(range(len(SCENE_PARTS)))


def test_parts_belong_to_their_classes():
    for scene in SCENES:
        for part, name in enumerate(SCENE_PARTS):
            owners = {SCENE_CLASSES[index] for index in scene.mask[scene.parts == part].unique().tolist()}
            assert owners <= ({"wall", "floor"} if name == "none" else {name.split()[-1]})


def test_normals_are_those_of_the_depth():
    agreeing = []
    for scene in SCENES:
        points = places(scene)
        across = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
        upwards = points[:, :-2, 1:-1] - points[:, 2:, 1:-1]
        found = torch.nn.functional.normalize(torch.linalg.cross(across, upwards, dim=0), dim=0)
        edges = torch.nn.functional.max_pool2d(scene.edges[None].float(), 5, 1, 2)[0, 1:-1, 1:-1] > 0
        same = (found * scene.normals[:, 1:-1, 1:-1]).sum(0)
        agreeing.append((same[~edges] > np.cos(np.radians(10))).float().mean())
        flat = ~edges & (scene.mask[1:-1, 1:-1] < 2)
        assert same[flat].min() > 0.9999
    assert min(agreeing) > 0.99


def test_edges_are_where_surfaces_meet():
    for scene in SCENES:
        for one, other in (
            ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
            ((slice(None, -1),), (slice(1, None),)),
        ):
            assert bool(scene.edges[one][scene.mask[one] != scene.mask[other]].all())
            inner = scene.parts.clone()
            inner[scene.mask == SCENE_CLASSES.index("ball")] = 0  # halves of a ball meet without an edge
            assert bool(scene.edges[one][inner[one] != inner[other]].all())
        assert 0.01 < scene.edges.float().mean() < 0.25


def test_the_floor_is_level_and_things_stand_on_it():
    for scene in SCENES:
        points, floor = places(scene), scene.mask == SCENE_CLASSES.index("floor")
        up = scene.normals[:, floor].mean(1)
        heights = (points * up[:, None, None]).sum(0)
        assert heights[floor].std() < 1e-3
        assert heights.min() > heights[floor].mean() - 1e-3


def test_scenes_are_segmentation_data():
    data = ready(batch_size=4)
    assert (data.target, data.class_names, data.num_classes, len(data.palette)) == ("mask", SCENE_CLASSES, 5, 5)
    splits = [data.split(name) for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [12, 4, 4]
    numbers = [split.source.name(index) for split in splits for index in range(len(split))]
    assert len(set(numbers)) == 20
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((4, 3, 32, 32), (4, 32, 32))
    images, masks = next(iter(data.val_dataloader()))
    assert (images.shape, masks.shape) == ((4, 3, 32, 32), (4, 32, 32))
    split = data.split("test")
    assert torch.equal(split[1][1], split.source.scene(1).mask.long())
    assert torch.equal(split[1][0], BACKBONE.normalise()(split.source.scene(1).image))
    assert list(data.identity()) != list(ready(scene_seed=1).identity())
    assert list(data.identity()) == list(ready().identity())
    assert not ready(check="full").report().of("error")


@pytest.mark.parametrize("settings", [{"images": 2}, {"scene_size": 4}, {"scene_seed": -1}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ScenesData(**settings)
