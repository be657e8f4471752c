"""Classes of data are matched with those of a model by name, for every kind of target."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vispeft.data import IGNORE, ImageFolderData, ImageListData, JsonData, MaskFolderData, Preprocessing
from vispeft.errors import DataError

BACKBONE = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CODES = np.array([[0, 0, 1], [2, 2, IGNORE]], np.uint8)
COLOURS = [(0, 0, 0), (9, 0, 0), (0, 9, 0)]


def images(root, names, shape=(8, 8)):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (*shape, 3), dtype=np.uint8)).save(root / name)


def masks(root, content, splits=("train", "val", "test")):
    images(root, [f"images/{split}/a.png" for split in splits], CODES.shape)
    for split in splits:
        (root / "masks" / split).mkdir(parents=True)
        Image.fromarray(content).save(root / "masks" / split / "a.png")


def test_folders_of_some_classes_get_the_numbers_of_the_model(tmp_path):
    images(tmp_path, [f"{split}/{name}/{n}.png" for split in ("train", "val", "test") for name in "ca" for n in (0, 1)])
    data = ImageFolderData(root=str(tmp_path), check="fast")
    order = data.match_classes(["b", "c", "a"])
    assert data.class_names == ("b", "c", "a")
    assert data.listing.splits["test"].targets.tolist() == [2, 2, 1, 1]  # a is listed before c
    assert order.missing == ["b"]
    assert [line.partition(":")[0] for line in order.lines()] == [
        "The data have the classes in another order than the model, and are matched by name",
        "1 of the model's 3 classes is not in the data, and predictions of it count as wrong",
    ]
    data.fit_to(BACKBONE)
    data.setup()
    with pytest.raises(DataError, match="has loaded its splits"):
        data.match_classes(["a", "c"])


def test_a_class_the_model_does_not_know_is_refused(tmp_path):
    images(tmp_path, [f"train/{name}/{n}.png" for name in "ac" for n in range(5)])
    data = ImageFolderData(root=str(tmp_path))
    with pytest.raises(DataError, match="other classes than the model was trained for: c here alone, and b there"):
        data.match_classes(["a", "b"])
    assert data.class_names == ("a", "c")
    assert data.match_classes(["a", "c"]).lines() == []


def test_labels_and_numbers_stand_in_the_columns_of_the_model(tmp_path):
    images(tmp_path, [f"{number}.png" for number in range(10)])
    labelled = {f"{n}.png": ["b"] if n % 2 else ["a", "b"] for n in range(10)}
    (tmp_path / "train.json").write_text(json.dumps(labelled))
    data = JsonData(train_list=str(tmp_path / "train.json"), root=str(tmp_path), target="multilabel")
    with pytest.raises(DataError, match="none here alone, and c there alone"):
        data.match_classes(["b", "c", "a"])  # a column of zeros would make each prediction of c a wrong one
    data.match_classes(["b", "a"])
    rows = {tuple(row) for split in data.listing.splits.values() for row in split.targets.tolist()}
    assert rows == {(1, 0), (1, 1)}
    (tmp_path / "train.txt").write_text("".join(f"{n}.png {n},{10 * n}\n" for n in range(10)))
    settings = {"root": str(tmp_path), "target": "regression", "names": ["age", "price"]}
    data = ImageListData(train_list=str(tmp_path / "train.txt"), **settings)
    data.match_classes(["price", "age"])
    assert all(row[0] == 10 * row[1] for split in data.listing.splits.values() for row in split.targets.tolist())
    data = ImageListData(train_list=str(tmp_path / "train.txt"), **settings)
    with pytest.raises(DataError, match="other numbers than the model was trained for: none here alone, and size"):
        data.match_classes(["price", "age", "size"])


@pytest.mark.parametrize("by_colour", [False, True])
def test_masks_hold_the_classes_of_the_model_and_keep_their_colours(tmp_path, by_colour):
    shown = np.array(COLOURS, np.uint8)[np.where(CODES == IGNORE, 0, CODES)] if by_colour else CODES
    masks(tmp_path, shown)
    data = MaskFolderData(
        root=str(tmp_path), class_names=["sea", "land", "ice"], palette=COLOURS, rgb_masks=by_colour, batch_size=2
    )
    data.match_classes(["ice", "fog", "sea", "land"])
    assert (data.num_classes, data.palette[0], data.palette[2:]) == (4, COLOURS[2], (COLOURS[0], COLOURS[1]))
    data.fit_to(BACKBONE)
    expected = torch.tensor([[2, 2, 3], [0, 0, 2 if by_colour else IGNORE]], dtype=torch.uint8)
    assert torch.equal(data.listing.splits["test"].masks.read(0), expected)
    known = data.listing.splits["train"].mask_facts(full=True)[0].classes
    assert known == {2: 3, 3: 1, 0: 2} if by_colour else {2: 2, 3: 1, 0: 2, IGNORE: 1}
    joined = data.listing.splits["train"].join(data.listing.splits["test"]).take(torch.tensor([1]))
    assert torch.equal(joined.masks.read(0), expected)
