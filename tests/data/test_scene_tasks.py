import pytest
import torch

from tests.data.reading import ready
from vispeft.data import SceneMultiTaskData, ScenesData, render_scene
from vispeft.data.scenes import SCENE_CLASSES
from vispeft.errors import ConfigError

TASKS = ("semseg", "sal", "normals", "depth", "edge")


def make(**settings):
    return SceneMultiTaskData(**{"images": 10, "scene_size": 24, "batch_size": 2, "image_size": 24, **settings})


def test_scenes_have_five_exact_tasks():
    data = ready(make())
    assert tuple(data.targets) == TASKS
    assert data.loss_weights == {"semseg": 1, "sal": 5, "normals": 10, "depth": 1, "edge": 50}
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [6, 2, 2]
    split = data.split("test")
    scene = render_scene(0, int(split.source.name(1).split()[1]), (24, 24))
    image, labels = split[1]
    assert torch.equal(image, data.preprocessing.normalise()(scene.image))
    assert torch.equal(labels["semseg"], scene.mask.long())
    assert torch.equal(labels["sal"][0] > 0, scene.mask >= SCENE_CLASSES.index("ball"))
    assert torch.equal(labels["depth"][0], scene.depth)
    assert torch.equal(labels["edge"][0] > 0, scene.edges)
    torch.testing.assert_close(labels["normals"] * torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1), scene.normals)
    floor = scene.mask == SCENE_CLASSES.index("floor")
    assert labels["normals"][1][floor].max() < 0  # the floor's normals point up, and y points down
    assert list(data.identity()) == list(ready(make()).identity())
    assert list(data.identity()) != list(ready(make(scene_seed=1)).identity())


def test_scenes_are_told_apart_by_what_was_measured():
    found = ready(make()).measured_on("test", "depth")
    assert ready(make(tasks=["depth"], batch_size=1)).measured_on("test", "depth") == found
    assert ready(make(image_size=32)).measured_on("test", "depth") == {**found, "size": [32, 32]}
    assert ready(make(scene_seed=1)).measured_on("test", "depth")["contents"] != found["contents"]
    assert ready(make(split_seed=1)).measured_on("test", "depth")["names"] != found["names"]


def test_scenes_and_splits_are_those_of_segmentation():
    data, plain = make(), ScenesData(images=10, scene_size=24)
    for name, split in plain.listing.splits.items():
        assert data.listing.splits[name].source.numbers == split.source.numbers
        assert data.listing.splits[name].labels["depth"].numbers == split.source.numbers
    folds = make(folds=5, fold=2).listing.splits
    assert [len(split) for split in folds.values()] == [6, 2, 2]
    assert folds["test"].labels["semseg"].name(0) == folds["test"].source.name(0)


def test_checks_render_every_scene_where_that_is_asked_for():
    report = make(check="full").report()
    assert not report.of("error")
    assert not [finding for finding in report.of("fact") if finding.code == "label-headers-only"]
    assert [finding for finding in make().report().of("fact") if finding.code == "label-headers-only"]


def test_augmentation_keeps_batches_of_one_size():
    data = ready(make(image_size=(20, 28)))
    for images, labels in data.train_dataloader():
        assert images.shape == (2, 3, 20, 28)
        assert {tuple(label.shape[-2:]) for label in labels.values()} == {(20, 28)}


def test_settings_that_cannot_work_are_refused():
    for settings in ({"images": 2}, {"scene_size": 4}, {"scene_seed": -1}):
        with pytest.raises(ConfigError, match=f"SceneMultiTaskData.*{next(iter(settings))}"):
            make(**settings)
