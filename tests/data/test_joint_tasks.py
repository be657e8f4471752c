import math

import pytest
import torch

from tests.data.test_scenes import places
from vispeft.data import IGNORE, DenseTarget, Preprocessing, TaskAugmentation, render_scene
from vispeft.data.joint_tasks import (
    NYUD_AUGMENTATION,
    PASCAL_AUGMENTATION,
    JointTasks,
    finish_label,
    flip_label,
    resize_label,
    rotate_normals,
    warp_image,
    warp_label,
)
from vispeft.data.randomness import seeded
from vispeft.data.scene_tasks import LABELS, TARGETS
from vispeft.errors import ConfigError

KINDS = {task: target.kind for task, target in TARGETS.items()}
SCENE = render_scene(0, 3, (72, 96))
SCENES = {task: read(SCENE) for task, read in LABELS.items()}
PLAIN = Preprocessing(size=(72, 96), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def joint(augmentation=None, size=(72, 96), **settings):
    preprocessing = Preprocessing(size=size, mean=PLAIN.mean, std=PLAIN.std)
    return JointTasks(TARGETS, preprocessing, augmentation, **settings)


def angles(one, other):
    """Angles in degrees between vectors (3, H, W)."""
    return torch.rad2deg(torch.acos((one * other).sum(0).clamp(-1, 1)))


def ball(size=81):
    """Normals of a ball seen from far away: right, down, towards the camera; zero around it."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line * 1.25, line * 1.25, indexing="ij")
    z = (1 - x**2 - y**2).clamp(min=0).sqrt()
    return torch.stack([x, y, z]) * (z > 0)


@pytest.mark.parametrize("task", KINDS)
def test_flipping_twice_changes_nothing(task):
    label, kind = SCENES[task], KINDS[task]
    flipped = flip_label(label, kind)
    assert flipped.dtype == label.dtype
    assert not torch.equal(flipped, label)
    assert torch.equal(flip_label(flipped, kind), label)


def test_flipping_the_normals_of_a_ball_changes_nothing():
    torch.testing.assert_close(flip_label(ball(), "normals"), ball())


@pytest.mark.parametrize("angle", [20.0, -35.0, 90.0, 180.0])
def test_rotating_the_normals_of_a_ball_changes_nothing(angle):
    # It looks the same from every side, so that a sign that is wrong anywhere shows.
    rotated = finish_label(warp_label(ball(), "normals", angle, 1.0), "normals")
    known = (rotated[0] != IGNORE) & (ball() != 0).any(0)
    assert known.float().mean() > 0.45
    inner = known & (ball()[2] > 0.3)
    assert angles(rotated, ball())[inner].max() < 1.0


def test_the_formula_of_the_public_code_is_that_of_its_words():
    normals = torch.nn.functional.normalize(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), dim=0)
    rotated = rotate_normals(normals, 30.0)
    for row in range(4):
        for column in range(5):
            x, y, z = normals[:, row, column].tolist()
            around = math.atan2(x, y) + math.radians(30)
            length = math.hypot(x, y)
            expected = torch.tensor([length * math.sin(around), length * math.cos(around), z])
            torch.testing.assert_close(rotated[:, row, column], expected)
    torch.testing.assert_close(rotated.norm(dim=0), torch.ones(4, 5))
    torch.testing.assert_close(rotate_normals(rotated, -30.0), normals)


@pytest.mark.parametrize("angle", [20.0, -15.0])
def test_rotating_a_scene_rotates_its_normals(angle):
    """Normals of the rotated depth are the rotated normals: turning the image is turning the camera about its axis."""
    large = render_scene(0, 3, (144, 144))
    depth = warp_label(LABELS["depth"](large), "depth", angle, 1.0)
    rotated = finish_label(warp_label(LABELS["normals"](large), "normals", angle, 1.0), "normals")
    floor = warp_label(LABELS["semseg"](large), "classes", angle, 1.0)[0] < 2
    seen = type("Seen", (), {"depth": depth[0]})
    points = places(seen) * torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1)
    step = 8  # depths are those of the nearest pixel, so neighbours are taken further apart
    across = points[:, step:-step, 2 * step :] - points[:, step:-step, : -2 * step]
    upwards = points[:, : -2 * step, step:-step] - points[:, 2 * step :, step:-step]
    found = torch.nn.functional.normalize(torch.linalg.cross(upwards, across, dim=0), dim=0)
    inside = -torch.nn.functional.max_pool2d(-floor[None].float(), 2 * step + 3, 1, step + 1)[0] > 0
    edges = warp_label(LABELS["edge"](large), "edge", angle, 1.0, ignore=False)
    away = torch.nn.functional.max_pool2d(edges, 2 * step + 3, 1, step + 1)[0] == 0
    flat = (inside & away)[step:-step, step:-step]
    assert flat.float().mean() > 0.05
    assert angles(found, rotated[:, step:-step, step:-step])[flat].median() < 3
    unrotated = LABELS["normals"](large)[:, step:-step, step:-step]
    assert angles(found, unrotated)[flat].median() > 6


def test_image_and_labels_are_moved_alike():
    classes = SCENES["semseg"]
    image = (classes * 40).expand(3, -1, -1).contiguous()
    for angle, scale in ((20.0, 0.8), (-13.0, 1.25), (0.0, 1.5)):
        moved = warp_image(image, angle, scale)[0].float() / 40
        label = warp_label(classes, "classes", angle, scale, ignore=False)[0]
        assert ((moved - label).abs() < 0.5).float().mean() > 0.97


def test_rotations_are_counterclockwise_and_scales_enlarge():
    dot = torch.zeros(1, 101, 101)
    dot[0, 50, 80] = 1  # 30 pixels to the right of the centre
    (row, column) = warp_label(dot, "saliency", 90.0, 1.0).nonzero()[0, 1:].tolist()
    assert (row, column) == (20, 50)
    rows, columns = warp_label(dot, "saliency", 0.0, 1.5).nonzero()[:, 1:].float().mean(0).tolist()
    assert (rows, columns) == pytest.approx((50, 95), abs=1)


def test_depths_are_divided_by_the_scale_and_stay_metres():
    flat = torch.full((1, 20, 20), 6.0)
    flat[0, 0] = 0
    scaled = warp_label(flat, "depth", 0.0, 1.5)
    assert set(scaled.unique().tolist()) == {4.0}  # the row without depths has left the picture
    kept = finish_label(warp_label(flat, "depth", 0.0, 0.5), "depth")
    assert set(kept.unique().tolist()) == {12.0, float(IGNORE)}
    far = finish_label(torch.tensor([[[0.0, 255.0, 256.0, 254.0]]]), "depth")
    assert (far == IGNORE).tolist() == [[[True, False, False, False]]]
    torch.testing.assert_close(far[..., 1:], torch.tensor([[[255.0, 256.0, 254.0]]]), rtol=0, atol=2e-5)


def test_borders_are_filled_as_asked():
    outside = warp_label(torch.ones(1, 40, 40), "values", 0.0, 0.5)[0] == IGNORE
    assert outside.float().mean() == pytest.approx(0.75, abs=0.02)
    for task, empty in (("semseg", 0), ("sal", 0), ("edge", 0), ("depth", IGNORE), ("normals", IGNORE)):
        for ignore, filled in ((False, empty), (True, IGNORE)):
            label = finish_label(warp_label(SCENES[task], KINDS[task], 0.0, 0.5, ignore), KINDS[task])
            corner = label[..., :10, :10]
            assert corner.unique().tolist() == [filled]
    assert int(warp_image(torch.full((3, 40, 40), 255, dtype=torch.uint8), 0.0, 0.5)[:, :5, :5].max()) == 0


def test_ignored_pixels_stay_ignored():
    label = torch.full((1, 30, 30), 255, dtype=torch.uint8)
    label[:, 10:20, 10:20] = 3
    for kind in ("classes", "saliency", "values"):
        moved = warp_label(label, kind, 17.0, 1.1, ignore=True)
        assert set(moved.unique().tolist()) == {3, 255}
    holes = ball()
    moved = finish_label(resize_label(warp_label(holes, "normals", 10.0, 1.1), "normals", (50, 60)), "normals")
    known = moved[0] != IGNORE
    assert torch.equal(known, (moved != IGNORE).all(0))
    torch.testing.assert_close(moved.norm(dim=0)[known], torch.ones(int(known.sum())))
    assert moved[2][known].min() > -0.1  # no vector that points away, as cubic interpolation makes beside a hole


def test_resizing_keeps_labels_at_their_place():
    for size in ((36, 48), (144, 192), (50, 50)):
        normals = resize_label(SCENES["normals"], "normals", size)
        assert normals.shape == (3, *size)
        for task in ("semseg", "depth"):
            label = resize_label(SCENES[task], KINDS[task], size)
            assert label.shape == (1, *size)
            assert set(label.unique().tolist()) <= set(SCENES[task].unique().tolist())
    image, labels = joint(size=(36, 48))(SCENE.image, SCENES)
    assert image.shape == (3, 36, 48)
    assert {task: tuple(label.shape[-2:]) for task, label in labels.items()} == dict.fromkeys(TARGETS, (36, 48))


def test_evaluation_changes_nothing_but_the_size():
    image, labels = joint()(SCENE.image, SCENES)
    assert torch.equal(image, PLAIN.transform()(SCENE.image))
    assert torch.equal(labels["semseg"], SCENE.mask.long())
    assert torch.equal(labels["depth"][0], SCENE.depth)
    assert torch.equal(labels["edge"][0], SCENE.edges.float())
    torch.testing.assert_close(labels["normals"], SCENES["normals"])


def test_parts_are_ignored_where_nobody_is_left():
    parts = {"parts": DenseTarget(kind="classes", class_names=("none", "head"))}
    label = torch.zeros(4, 4, dtype=torch.uint8)
    for blank, value in (((), 0), (("parts",), IGNORE)):
        prepare = JointTasks(parts, Preprocessing(size=(4, 4), mean=PLAIN.mean, std=PLAIN.std), None, blank)
        image = torch.zeros(3, 4, 4, dtype=torch.uint8)
        assert prepare(image, {"parts": label})[1]["parts"].unique().tolist() == [value]
        label[0, 0] = 1
        assert prepare(image, {"parts": label})[1]["parts"].unique().tolist() == [0, 1]
        label[0, 0] = 0


@pytest.mark.parametrize("augmentation", [PASCAL_AUGMENTATION, NYUD_AUGMENTATION, TaskAugmentation(rotation=20)])
def test_the_same_numbers_give_the_same_sample(augmentation):
    prepare = joint(augmentation)

    def make(*numbers):
        with seeded(*numbers):
            image, labels = prepare(SCENE.image, SCENES)
        return {"image": image, **labels}

    one, again, other = make(0, 1, 2), make(0, 1, 2), make(0, 2, 2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["image"], other["image"])
    drawn = set()
    for index in range(24):
        with seeded(index):
            drawn.add(round(augmentation.draw_scale(), 3))
    if augmentation.scales:
        assert drawn == set(augmentation.scales)
    else:
        assert augmentation.scale[0] <= min(drawn) <= max(drawn) <= augmentation.scale[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"flip": 1.5},
        {"rotation": -1},
        {"scale": (1.25, 0.75)},
        {"scale": (0, 1)},
        {"scales": ()},
        {"scales": (0.0, 1.0)},
        {"scales": (1.0, 1.5), "scale": (0.5, 1)},
        {"border": "mirror"},
    ],
)
def test_settings_that_cannot_work_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        TaskAugmentation(**fields)
