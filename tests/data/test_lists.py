"""Lists of images with labels, numbers or several labels, and JSON."""

import json

import pytest
import torch

from tests.data.published import Painter
from tests.data.reading import ready
from vispeft.data import (
    ImageListData,
    JsonData,
)
from vispeft.errors import ConfigError, DataError


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def images(tmp_path):
    painter = Painter()
    for number in range(12):
        painter.paint(tmp_path / f"img/my photo {number}.png")
    return tmp_path


def test_a_list_has_numbers_or_words(images):
    lines = [f"img/my photo {n}.png {n % 3}" for n in range(12)]
    data = ready(
        ImageListData(train_list=write(images / "a.txt", "# path label", "", *lines), validation=0.3, test=0.3)
    )
    assert data.class_names == ("0", "1", "2")
    words = [f"img/my photo {n}.png\t{('owl', 'ant')[n % 2]}" for n in range(12)]
    data = ImageListData(train_list=write(images / "b.txt", *words))
    assert data.class_names == ("ant", "owl")
    pool = data.read().splits["train"]
    assert pool.targets.tolist() == [1, 0] * 6
    assert pool.source.paths[3] == str(images / "img/my photo 3.png")
    named = ImageListData(train_list=str(images / "b.txt"), names=["owl", "ant"])
    assert named.read().splits["train"].targets.tolist() == [0, 1] * 6


def test_several_labels(images):
    labels = ["0,2", "1", "-", "2,1", "0", "1,2"] * 2
    lines = [f"img/my photo {n}.png {label}" for n, label in enumerate(labels)]
    data = ready(
        ImageListData(train_list=write(images / "a.txt", *lines), target="multilabel", validation=0.25, test=0.25)
    )
    assert data.target == "multilabel"
    assert data.num_classes == 3
    rows = data.read().splits["train"].targets
    assert rows.dtype == torch.float32
    assert rows[:4].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]]
    _, targets = next(iter(data.train_dataloader()))
    assert targets.shape[1] == 3


def test_numbers(images):
    lines = [f"img/my photo {n}.png {n / 2}" for n in range(12)]
    data = ready(ImageListData(train_list=write(images / "a.txt", *lines), target="regression", names=["weight"]))
    assert data.class_names == ("weight",)
    assert data.num_classes == 1
    values = torch.cat([data.split(name).targets for name in ("train", "validation", "test")])
    assert sorted(values.flatten().tolist()) == [n / 2 for n in range(12)]
    two = {f"img/my photo {n}.png": [n, -n] for n in range(12)}
    data = ready(JsonData(train_list=write(images / "a.json", json.dumps(two)), target="regression"))
    assert data.class_names == ("value 0", "value 1")
    assert data.read().splits["train"].targets[3].tolist() == [3, -3]


def test_an_image_may_have_been_measured_twice(images):
    lines = [f"img/my photo {n}.png {n / 2}" for n in (*range(12), 3)]
    lines[-1] = "img/my photo 3.png 1.75"
    data = ImageListData(train_list=write(images / "a.txt", *lines), target="regression")
    found = {finding.code: finding.level for finding in data.report().findings}
    assert found["labels-disagree"] == "warning"


def test_wrong_labels_of_every_target_are_found(images):
    wrong = {"img/my photo 0.png": "x", "img/my photo 1.png": None, "img/my photo 2.png": [1, 2]}
    good = {f"img/my photo {n}.png": float(n) for n in range(3, 12)}
    data = JsonData(train_list=write(images / "a.json", json.dumps({**wrong, **good})), target="regression")
    assert [finding.line() for finding in data.report().of("error")] == [
        "1 image with a label that is no number, and target is regression: a.json img/my photo 0.png.",
        "1 image without a label; give one, or leave the image out: a.json img/my photo 1.png.",
        "1 image without 1 number: a.json img/my photo 2.png (1.0,2.0).",
    ]
    constant = {f"img/my photo {n}.png": 1.0 for n in range(12)}
    data = JsonData(train_list=write(images / "b.json", json.dumps(constant)), target="regression")
    assert "constant-target" in {finding.code for finding in data.report().of("error")}


@pytest.mark.parametrize("target", ["class", "multilabel"])
def test_labels_of_no_kind_are_found(images, target):
    wrong = {"img/my photo 0.png": {"x": 1}, "img/my photo 1.png": True, "img/my photo 2.png": 0.5}
    good = {f"img/my photo {n}.png": "--5" if n == 3 else n % 2 for n in range(3, 12)}
    data = JsonData(train_list=write(images / "a.json", json.dumps({**wrong, **good})), target=target)
    found = [place for finding in data.report().of("error") if finding.code == "label-kind" for place in finding.places]
    assert sorted(found) == [f"a.json img/my photo {n}.png" for n in range(3)]


def test_a_table_of_zeros_and_ones_is_no_list_of_labels(images):
    rows = {f"img/my photo {n}.png": [1, 0, n % 2] for n in range(12)}
    data = JsonData(train_list=write(images / "a.json", json.dumps(rows)), target="multilabel")
    assert "with a label twice; list the labels that hold" in data.report().of("error")[0].text


def test_a_path_no_system_takes_is_found(images):
    listed = {"img/zero\0.png": 0, **{f"img/my photo {n}.png": n % 2 for n in range(12)}}
    data = JsonData(train_list=write(images / "a.json", json.dumps(listed)), validation=0.3, test=0.3)
    assert [finding.code for finding in data.report().of("error")] == ["broken-image"]


def test_a_stray_number_makes_no_classes_below_it(images):
    lines = [f"img/my photo {n}.png {99_999_999_999 if n == 5 else n % 2}" for n in range(12)]
    data = ImageListData(train_list=write(images / "a.txt", *lines))
    with pytest.raises(DataError, match=r"1 image with a label outside 0 to 1: a\.txt:6 \(99999999999\)"):
        _ = data.num_classes


@pytest.mark.parametrize(("target", "wanted"), [("class", [0, 1, 2]), ("multilabel", torch.eye(3).tolist())])
def test_names_given_for_a_json_list_are_matched_with_its_labels(images, target, wanted):
    """They were laid over the sorted labels by position: sun was called rain."""
    names = ["cloud", "sun", "rain"]
    labels = {f"img/my photo {n}.png": names[n % 3] if target == "class" else [names[n % 3]] for n in range(12)}
    settings = {"target": target, "names": names, "validation": 0.3, "test": 0.3}
    data = JsonData(train_list=write(images / "a.json", json.dumps(labels)), **settings)
    assert data.class_names == tuple(names)
    assert data.read().splits["train"].targets.tolist() == wanted * 4
    (images / "b.json").write_text(
        json.dumps({**labels, "img/my photo 0.png": "snow" if target == "class" else ["snow"]})
    )
    with pytest.raises(DataError, match="1 image with a label that is none of the 3 class names"):
        ready(JsonData(train_list=str(images / "b.json"), **settings))


def test_json_ids_are_renumbered_in_sorted_order(images):
    ids = {f"img/my photo {n}.png": (100, 7, 20)[n % 3] for n in range(12)}
    data = JsonData(train_list=write(images / "a.json", json.dumps(ids)), validation=0.3, test=0.3)
    assert data.class_names == ("7", "20", "100")
    assert data.read().splits["train"].targets.tolist() == [2, 0, 1] * 4


def test_lists_that_cannot_be_read_are_refused(images, tmp_path):
    write(images / "a.txt", "x 1")
    with pytest.raises(DataError, match=r"could not be read.*There are: a\.txt"):
        ready(ImageListData(train_list=str(images / "b.txt")))
    with pytest.raises(DataError, match="No image is listed"):
        ready(ImageListData(train_list=write(images / "a.txt", "# nothing")))
    with pytest.raises(DataError, match="no valid JSON"):
        ready(JsonData(train_list=write(images / "a.json", "{")))
    with pytest.raises(DataError, match="no JSON object"):
        ready(JsonData(train_list=write(images / "a.json", '["a.png"]')))
    with pytest.raises(DataError, match="set root"):
        ready(ImageListData(train_list=str(images / "a.txt"), root=str(images / "none")))
    with pytest.raises(ConfigError, match="twice"):
        ImageListData(train_list="a", names=["a", "a"])
    (images / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no text in UTF-8"):
        ready(ImageListData(train_list=str(images / "a.txt")))
