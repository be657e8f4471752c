"""Folders with one folder per class, and their folds."""

import pytest
import torch

from tests.data.published import Painter
from tests.data.reading import names_of, ready
from vispeft.data import (
    ImageFolderData,
    read_image,
)
from vispeft.errors import ConfigError, DataError


def folder(root, **counts):
    painter = Painter()
    for name, count in counts.items():
        for number in range(count):
            painter.paint(root / name.replace("__", "/") / f"{number}.png")
    return root


@pytest.mark.parametrize(("train", "val", "test"), [("train", "val", "test"), ("Training", "valid", "testing")])
def test_split_folders_are_found_by_their_usual_names(tmp_path, train, val, test):
    sizes = {f"{train}__cat": 3, f"{train}__dog": 2, f"{val}__cat": 1, f"{val}__dog": 2, f"{test}__dog": 1}
    data = ready(ImageFolderData(root=str(folder(tmp_path, **sizes))))
    assert data.class_names == ("cat", "dog")
    assert data.split("train").targets.tolist() == [0, 0, 0, 1, 1]
    assert data.split("validation").targets.tolist() == [0, 1, 1]
    assert names_of(data.split("test")) == [f"{test}/dog/0.png"]


def test_classes_are_in_natural_order_and_hidden_folders_are_none(tmp_path):
    root = folder(tmp_path, c10=5, c2=5, c1__inner=5)
    folder(root / ".thumbs", x=1)
    assert ImageFolderData(root=str(root)).class_names == ("c1", "c2", "c10")


def test_classes_that_differ_in_case_or_zeros_alone_keep_their_order(tmp_path):
    root = folder(tmp_path, **dict.fromkeys(("b", "a", "B", "A", "1", "01"), 5))
    (root / "A/x.png").write_bytes((root / "A/0.png").read_bytes())
    Painter(seed=3).paint(root / "A/X.png")
    listing = ImageFolderData(root=str(root)).read()
    # Sets of names are walked through in another order in each process; labels must not be.
    assert listing.class_names == ("01", "1", "A", "a", "B", "b")
    named = names_of(listing.splits["train"])
    assert named.index("A/X.png") + 1 == named.index("A/x.png")


def test_one_tree_is_split_stratified_and_disjoint(tmp_path):
    root = folder(tmp_path, a=40, b=20, c=10)
    data = ready(ImageFolderData(root=str(root), validation=0.2, test=0.1))
    parts = [data.split(name) for name in ("train", "validation", "test")]
    assert sorted(name for part in parts for name in names_of(part)) == sorted(
        str(path.relative_to(root)) for path in root.rglob("*.png")
    )
    assert [part.targets.bincount().tolist() for part in parts] == [[28, 14, 7], [8, 4, 2], [4, 2, 1]]
    again = ready(ImageFolderData(root=str(root), validation=0.2, test=0.1, seed=9))
    assert names_of(again.split("test")) == names_of(parts[2])
    other = ready(ImageFolderData(root=str(root), validation=0.2, test=0.1, split_seed=1))
    assert names_of(other.split("test")) != names_of(parts[2])


def test_what_the_folders_lack_is_drawn_from_train(tmp_path):
    root = folder(tmp_path, train__a=20, train__b=20, test__a=2, test__b=2)
    data = ready(ImageFolderData(root=str(root), validation=0.25))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [30, 10, 4]
    assert set(names_of(data.split("test"))) == {f"test/{c}/{n}.png" for c in "ab" for n in (0, 1)}


def test_too_few_images_for_a_split_are_refused(tmp_path):
    root = folder(tmp_path, a=2, b=2)
    with pytest.raises(DataError, match="No image in some splits; give more images, or larger shares"):
        ready(ImageFolderData(root=str(root), validation=0.1, test=0.1))


def test_folders_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        ready(ImageFolderData(root=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"has no class folders\. Nothing is in it\. Each class"):
        ready(ImageFolderData(root=str(tmp_path)))
    folder(tmp_path, val__a=1)
    with pytest.raises(DataError, match="no folder train to learn from"):
        ready(ImageFolderData(root=str(tmp_path)))


def test_folds_are_disjoint_and_hold_every_image_once(tmp_path):
    root = folder(tmp_path, a=13, b=7, c=9)
    tested = []
    for fold in range(4):
        data = ready(ImageFolderData(root=str(root), folds=4, fold=fold, validation=0.25))
        parts = {name: set(names_of(data.split(name))) for name in ("train", "validation", "test")}
        assert len(set.union(*parts.values())) == sum(map(len, parts.values())) == 29
        assert data.split("test").targets.bincount(minlength=3).min() >= 1
        assert data.split("validation").targets.bincount(minlength=3).min() >= 1
        tested += parts["test"]
    assert len(tested) == len(set(tested)) == 29


def test_folds_leave_a_given_test_split_alone(tmp_path):
    root = folder(tmp_path, train__a=8, train__b=8, val__a=4, val__b=4, test__a=2, test__b=2)
    tested = []
    for fold in range(3):
        data = ready(ImageFolderData(root=str(root), folds=3, fold=fold))
        images = [name for split in ("train", "validation", "test") for name in names_of(data.split(split))]
        assert len(images) == len(set(images)) == 24
        assert not any(name.startswith("test/") for name in images)
        tested += names_of(data.split("test"))
        image, label = data.split("test")[0]
        name = names_of(data.split("test"))[0]
        assert torch.equal(image, data.preprocessing.transform()(read_image(root / name)))
        assert "ab"[label] == name.split("/")[1]
    assert sorted(tested) == sorted(str(p.relative_to(root)) for s in ("train", "val") for p in root.glob(f"{s}/*/*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"folds": 1},
        {"folds": 3, "fold": 3},
        {"fold": 1},
        {"validation": 0.5, "test": 0.5},
        {"validation": 0.0},
        {"split_seed": -1},
        {"check": "none"},
    ],
)
def test_wrong_settings_are_refused_at_once(settings):
    with pytest.raises(ConfigError):
        ImageFolderData(root="x", **settings)
