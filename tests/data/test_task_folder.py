import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.reading import names_of, ready
from vispeft.building.arguments import check_arguments
from vispeft.data import IGNORE, TaskFolderData, TaskLabels
from vispeft.errors import ConfigError, DataError, UnknownNameError

SIZE = (6, 4)
"""Width and height of the images."""
LABELS = {
    "parts": TaskLabels(kind="classes", class_names=("floor", "wall", "thing")),
    "sal": TaskLabels(kind="saliency"),
    "edge": TaskLabels(kind="edge", zero_one=True, weight=2.5),
    "normals": TaskLabels(kind="normals"),
    "depth": TaskLabels(kind="depth", folder="depth_mm"),
    "warmth": TaskLabels(kind="values"),
}


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


def pixels(*values, kind=np.uint8):
    """A map (H, W) with some values in its first row, and the last of them everywhere else."""
    found = np.full(SIZE[::-1], values[-1], kind)
    found[0, : len(values)] = values
    return found


def normal_map():
    found = np.full((*SIZE[::-1], 3), (0, 0, 1), np.float32)
    found[0, :2] = (0.6, 0, 0.8), (0, 0, 0)
    return found


def values_of(numbers, split=0):
    """Labels of an image, as arrays by the ending of their file."""
    random = np.random.default_rng(split)
    coloured = ((normal_map() + 1) * 127.5).round().astype(np.uint8)
    return {
        "images": (random.integers(0, 256, (*SIZE[::-1], 3), np.uint8), None),
        "parts": (pixels(0, 1, 2, 255), None),
        "sal": (pixels(255, 0), pixels(1, 255, 0, kind=np.float32)),
        "edge": (pixels(1, 255, 0), pixels(True, False, kind=bool)),
        "normals": (coloured, normal_map()),
        "depth_mm": (pixels(0, 1500, 65535, kind=np.uint16), pixels(0, 1.5, 70, kind=np.float64)),
        "warmth": (pixels(0, 255, 51), pixels(-3, 255, 2, kind=np.int32)),
    }


def make_folder(root, arrays=False, around=False, splits=("train", "val")):
    """Write three training and two validation images with labels of all tasks."""
    for number, split in enumerate(splits):
        for index in range(3 - number):
            for folder, (picture, array) in values_of(index, 10 * number + index).items():
                places = [split, folder] if around else [folder, split]
                chosen = array if arrays and array is not None else picture
                ending = "npy" if chosen is array else "png"
                save(root.joinpath(*filter(None, places)) / f"inner/{number}{index}.{ending}", chosen)
    return root


def made(root, **settings):
    return TaskFolderData(
        **{"root": str(root), "labels": LABELS, "augment": None, "image_size": SIZE[::-1], **settings}
    )


def findings(data):
    return {finding.code: finding for finding in data.report().findings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("arrays", [False, True])
def test_labels_of_every_kind_are_read_from_pictures_and_arrays(tmp_path, arrays):
    data = ready(made(make_folder(tmp_path, arrays), batch_size=3))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [2, 2, 1]
    images, labels = next(iter(data.val_dataloader()))
    assert (tuple(images.shape), tuple(labels)) == ((2, 3, *SIZE[::-1]), tuple(LABELS))
    first = {task: values[0].reshape(-1, *SIZE[::-1])[:, 0, :4].squeeze(0).tolist() for task, values in labels.items()}
    assert first["parts"] == [0, 1, 2, IGNORE]
    assert first["sal"] == ([1, IGNORE, 0, 0] if arrays else [1, 0, 0, 0])
    assert first["edge"] == ([1, 0, 0, 0] if arrays else [1, IGNORE, 0, 0])
    assert first["depth"] == pytest.approx([IGNORE, 1.5, *([70, 70] if arrays else [65.535, 65.535])])
    assert first["warmth"] == pytest.approx([-3, IGNORE, 2, 2] if arrays else [0, 1, 0.2, 0.2])
    normals = labels["normals"][0]
    torch.testing.assert_close(normals[:, 0, 0], torch.tensor([0.6, 0, 0.8]), atol=0.005, rtol=0)
    assert bool((normals[:, 0, 1] == IGNORE).all())
    torch.testing.assert_close(normals[:, 1:].norm(dim=0), torch.ones(3, SIZE[0]))


def test_layouts_give_the_same_data_and_missing_splits_are_drawn(folder, tmp_path):
    around = ready(made(make_folder(tmp_path / "around", around=True)))
    inside = ready(made(folder))
    assert names_of(inside.split("validation")) == ["images/val/inner/10.png", "images/val/inner/11.png"]
    assert names_of(around.split("validation")) == ["val/images/inner/10.png", "val/images/inner/11.png"]
    for (image, labels), (other, theirs) in zip(inside.split("train"), around.split("train"), strict=True):
        assert torch.equal(image, other)
        assert all(torch.equal(labels[task], theirs[task]) for task in LABELS)
    alone = ready(made(make_folder(tmp_path / "alone", splits=("",)), validation=0.34, test=0.34))
    assert [len(alone.split(name)) for name in ("train", "validation", "test")] == [1, 1, 1]


def test_arrays_come_before_pictures_as_predictions_have_both(folder, tmp_path):
    make_folder(tmp_path)
    for split, name in (("train", "00"), ("train", "01"), ("train", "02"), ("val", "10"), ("val", "11")):
        save(tmp_path / f"depth_mm/{split}/inner/{name}.npy", pixels(2.5, kind=np.float32))
    data = ready(made(tmp_path, tasks=["depth"]))
    assert data.split("train")[0][1]["depth"].unique().tolist() == [2.5]
    assert "label-without-image" not in findings(data)


def test_tasks_have_their_weight_and_description(folder):
    data = made(folder, tasks=["edge", "sal", "normals", "depth", "parts"])
    assert data.loss_weights == {"edge": 2.5, "sal": 5, "normals": 10, "depth": 1, "parts": 1}
    assert type(data.targets["parts"]).__name__ == "DenseTarget"
    assert data.targets["parts"].class_names == ("floor", "wall", "thing")
    lowered = TaskLabels(kind="classes", class_names=["wall", "thing"], reduce_zero_label=True)
    labels = ready(made(folder, labels={"parts": lowered})).split("train")[0][1]
    assert labels["parts"][0, :4].tolist() == [IGNORE, 0, 1, IGNORE]

    turned = TaskLabels(kind="classes", class_names=["wall", "thing"], ids={0: 1, 1: 0, 2: 255})
    labels = ready(made(folder, labels={"parts": turned})).split("train")[0][1]
    assert labels["parts"][0, :4].tolist() == [1, 0, IGNORE, IGNORE]


@pytest.mark.parametrize(
    ("place", "values", "says"),
    [
        ("parts/train/inner/00.png", pixels(7), "set ids or reduce_zero_label"),
        ("parts/train/inner/00.png", np.zeros((9, 9), np.uint8), "9 x 9 for an image of 6 x 4"),
        ("sal/train/inner/00.png", pixels(1, 0), "set zero_one of the task"),
        ("sal/train/inner/00.npy", pixels(0.5, kind=np.float32), "edges are 0 or 1, or 255 for none"),
        ("edge/train/inner/00.png", pixels(3, 0), "edges are 0 or 1, or 255 for none"),
        ("edge/train/inner/00.png", np.zeros((4, 6, 3), np.uint8), "it has colours"),
        ("normals/train/inner/00.png", np.full((4, 6, 3), 255, np.uint8), "vectors of length 1.73205"),
        ("normals/train/inner/00.png", pixels(128), "three components"),
        ("depth_mm/train/inner/00.png", pixels(7), "grey image of 16 bits without sign, in millimetres"),
        ("depth_mm/train/inner/00.npy", pixels(-1, kind=np.float32), "metres from 0"),
        ("depth_mm/train/inner/00.npy", pixels(1500, kind=np.uint16), "uint16, as of millimetres; save metres"),
        ("warmth/train/inner/00.npy", pixels(np.inf, kind=np.float32), "not finite"),
        ("warmth/train/inner/00.png", np.zeros((2, 6), np.uint8), "6 x 2 for an image of 6 x 4"),
    ],
)
def test_labels_of_another_form_are_refused_by_name(tmp_path, place, values, says):
    make_folder(tmp_path)
    (tmp_path / place).with_suffix(".png").unlink()
    save(tmp_path / place, values)
    with pytest.raises(DataError) as caught:
        ready(made(tmp_path))
    assert says in str(caught.value)
    assert place in str(caught.value)


def test_missing_labels_and_tasks_without_any_are_errors(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "warmth").rename(tmp_path / "cold")
    (tmp_path / "normals/val/inner/11.png").unlink()
    save(tmp_path / "sal/train/inner/99.png", pixels(0))
    (tmp_path / "sal/train/readme.txt").write_text("made by hand")
    found = findings(made(tmp_path))
    assert "warmth: not one of 5 label files is there" in found["task-without-labels"].text
    assert found["missing-label"].places == ("normals/val/inner/11.png",)
    assert found["label-without-image"].text == "sal: 1 label in train without an image, left out"
    assert "1 file with another ending than those of the labels" in found["left-out"].text
    with pytest.raises(DataError, match=r"needs the folders images, depth and sal, or images/train"):
        made(tmp_path / "cold", labels={"depth": TaskLabels(kind="depth"), "sal": LABELS["sal"]}).read()


def test_a_label_for_two_images_is_an_error_whatever_its_kind(tmp_path):
    for task in ("parts", "sal", "depth"):
        make_folder(tmp_path / task)
        image = tmp_path / task / "images/train/inner/00.png"
        Image.open(image).save(image.with_suffix(".jpg"))
        found = findings(made(tmp_path / task, labels={task: LABELS[task]}))
        (shared,) = (found[code] for code in ("shared-mask", "shared-label") if code in found)
        assert shared.level == "error"
        (place,) = shared.places
        assert place.endswith("inner/00.png (images/train/inner/00.jpg, images/train/inner/00.png)")


def test_depths_that_may_be_millimetres_are_a_warning(tmp_path):
    make_folder(tmp_path)
    labels = {"depth": LABELS["depth"]}
    assert "far-depth" not in findings(made(tmp_path, labels=labels))
    for name in ("00", "01", "02"):
        save(tmp_path / f"depth_mm/train/inner/{name}.npy", pixels(0, 4500, kind=np.float32))
    found = [one for one in made(tmp_path, labels=labels).report().findings if one.code == "far-depth"]
    assert [one.level for one in found] == ["warning"] * 2  # in train, and in the test images drawn from it
    assert found[0].text == (
        "depth: depths in train go up to 4,500 metres; if they are millimetres, divide them by 1000"
    )


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({}, "describe one or more tasks by name"),
        ({"depth": {"kind": "depth"}}, r"a script gives an object, TaskLabels\(kind='depth'\)"),
        ({"depth": LABELS["depth"], "far": LABELS["depth"]}, "'depth_mm' was named twice"),
        ({"images": TaskLabels(kind="depth")}, "'images' was named twice"),
    ],
)
def test_tasks_that_are_no_tasks_are_refused(tmp_path, labels, says):
    with pytest.raises(ConfigError, match=says):
        made(tmp_path, labels=labels)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "flow"}, "choose 'classes'"),
        ({"kind": "classes"}, "give class names for the kind"),
        ({"kind": "classes", "class_names": ["a", "a"]}, "two or more different names"),
        ({"kind": "classes", "class_names": ["a", "b"], "palette": [[0, 0, 0]]}, "1 colours for 2 classes"),
        ({"kind": "depth", "zero_one": True}, "is for saliency and edge"),
        ({"kind": "depth", "reduce_zero_label": True}, "is for classes"),
        ({"kind": "depth", "palette": [[0, 0, 0]]}, "is for classes"),
        ({"kind": "classes", "class_names": ["a", "b"], "rgb_masks": True}, "by the colours of palette"),
        ({"kind": "depth", "weight": 0.0}, "a number above 0"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        TaskLabels(**fields)


def test_configs_describe_tasks_by_their_fields():
    fields = {"kind": "classes", "class_names": ["a", "b"], "ids": {0: 0, 255: 1}}
    checked = check_arguments(TaskFolderData, {"root": "my_rooms", "labels": {"parts": fields}}, "data")
    assert checked["labels"] == {"parts": fields}
    for labels, says in (
        ({"parts": {"knd": "depth"}}, "Unknown key 'data.labels.parts.knd'. Did you mean 'data.labels.parts.kind'"),
        ({"far": {"kind": "deep"}}, "Unknown value 'deep'"),
        ({"far": {"class_path": "os.system"}}, "Unknown tasklabels 'os.system'"),
    ):
        with pytest.raises(UnknownNameError, match=says):
            check_arguments(TaskFolderData, {"root": "my_rooms", "labels": labels}, "data")


def measured(root, task="depth", check="full", **settings):
    labels = {name: LABELS[name] for name in settings.pop("known", ("depth", "parts"))}
    data = ready(TaskFolderData(root=str(root), labels=labels, check=check, image_size=8, test=0.34, **settings))
    return data.measured_on("test", task)


def test_what_figures_are_measured_on_is_known_by_names_and_contents(tmp_path):
    root, moved = make_folder(tmp_path / "a"), make_folder(tmp_path / "b")
    found = measured(root)
    assert {name: found[name] for name in ("data", "size", "images")} == {
        "data": "TaskFolderData", "size": [8, 8], "images": 1,
    }  # fmt: skip
    assert measured(root, tasks=["depth"], batch_size=1, known=("depth",)) == found
    assert measured(moved) == found
    assert measured(root, split_seed=1)["names"] != found["names"]
    assert measured(root, check="fast")["names"] == found["names"]
    other = measured(root, "parts")
    assert (other["names"] == found["names"], other["contents"] == found["contents"]) == (True, False)
    for path in (moved / "depth_mm").rglob("*.png"):
        save(path, pixels(0, 1600, 65535, kind=np.uint16))
    assert measured(moved, "parts") == other
    assert measured(moved)["contents"] != found["contents"]
