"""The published layouts, on fixtures made by `tests.data.published` without any code of the readers."""

import json

import pytest
import torch
from PIL import Image

from tests.data.published import FGVC_CLASSES, FGVC_IMAGES, VTAB_CLASSES, Painter, make_fgvc, make_vtab_task
from vispeft.data import FgvcData, Preprocessing, Vtab1kData
from vispeft.data.augmentation import Augmentation
from vispeft.errors import DataError, UnknownNameError

BACKBONE = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def ready(data):
    data.fit_to(BACKBONE)
    data.setup()
    return data


@pytest.fixture(scope="module")
def vtab(tmp_path_factory):
    root = tmp_path_factory.mktemp("vtab-1k")
    painter = Painter()
    for task in VTAB_CLASSES:
        make_vtab_task(root, task, painter)
    return root


@pytest.fixture(scope="module")
def fgvc(tmp_path_factory):
    root = tmp_path_factory.mktemp("fgvc")
    painter = Painter()
    for name in FGVC_CLASSES:
        make_fgvc(root, name, painter)
    return root


@pytest.mark.parametrize("task", VTAB_CLASSES)
def test_every_vtab_task_is_read(vtab, task):
    classes = VTAB_CLASSES[task]
    final = ready(Vtab1kData(root=str(vtab), task=task, batch_size=2))
    assert final.num_classes == classes
    assert [len(final.split(name)) for name in ("train", "validation", "test")] == [classes + 3, 3, classes]
    assert final.listing.repeated_by("validation") == "train"
    tune = ready(Vtab1kData(root=str(vtab), task=task, protocol="tune", batch_size=2))
    # The test images stay unseen while rates are chosen.
    assert [len(tune.split(name)) for name in ("train", "validation", "test")] == [classes, 3, 3]
    assert torch.equal(tune.split("test").targets, tune.split("validation").targets)
    assert tune.split("validation").targets.tolist() == [0, classes - 1, classes // 2]
    # Image and label of a line belong together, and the image is the one of the file.
    name, label = (vtab / task / "test.txt").read_text().splitlines()[-1].split()
    pixels = torch.frombuffer(bytearray(Image.open(vtab / task / name).tobytes()), dtype=torch.uint8)
    image = pixels.reshape(5, 6, 3).permute(2, 0, 1)
    assert torch.equal(final.split("test").source.read(classes - 1), image)
    assert int(final.split("test").targets[-1]) == int(label) == classes - 1


def test_vtab_s_preparation_is_the_published_one(vtab):
    data = ready(Vtab1kData(root=str(vtab), task="kitti", batch_size=3))
    expected = Preprocessing(size=(8, 8), mean=IMAGENET[0], std=IMAGENET[1], interpolation="bicubic")
    assert data.preprocessing == expected
    train = data.split("train")
    assert torch.equal(train[(0, 1)][0], expected.transform()(train.source.read(1)))
    assert torch.equal(train[(0, 1)][0], train[(5, 1)][0])
    assert [len(labels) for _, labels in data.train_dataloader()] == [3, 3]  # of 7 images, the last is left out


def test_vtab_counts_are_compared_with_the_published_ones(vtab):
    report = Vtab1kData(root=str(vtab), task="svhn").report()
    assert not report.of("error")
    found = [finding.text for finding in report.of("warning")]
    assert "VTAB-1k svhn has 1,000 train images as published, and here are 13" in found
    assert "VTAB-1k svhn has 26,032 test images as published, and here are 10" in found


def test_a_class_too_few_and_a_label_too_many_are_found(tmp_path):
    place = make_vtab_task(tmp_path, "kitti", Painter())
    for name in ("train800", "train800val200", "val200", "test"):
        lines = [line for line in (place / f"{name}.txt").read_text().splitlines() if not line.endswith(" 3")]
        (place / f"{name}.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match="VTAB-1k kitti has 4 classes as published, and here are images of 3"):
        ready(Vtab1kData(root=str(tmp_path), task="kitti"))
    with open(place / "test.txt", "a") as file:
        file.write("\nimages/test/000007.png 4\n")
    with pytest.raises(DataError, match=r"1 image with a label outside 0 to 3: test\.txt:4 \(4\)"):
        _ = Vtab1kData(root=str(tmp_path), task="kitti").num_classes


def test_what_is_no_vtab_is_refused(vtab, tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'cifar'"):
        Vtab1kData(root=str(vtab), task="cifar10")
    with pytest.raises(DataError, match=r"has no train800val200\.txt, val200\.txt, test\.txt"):
        ready(Vtab1kData(root=str(tmp_path), task="cifar"))


@pytest.mark.parametrize("name", FGVC_CLASSES)
def test_every_fgvc_set_is_read(fgvc, name):
    data = ready(FgvcData(root=str(fgvc / name), dataset=name))
    classes = FGVC_CLASSES[name]
    assert data.num_classes == classes
    for split, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        listed = json.loads((fgvc / name / f"{file}.json").read_text())
        found = data.split(split)
        paths = [str(fgvc / name / FGVC_IMAGES[name] / path) for path in listed]
        assert [found.source.paths[i].replace("/./", "/") for i in range(classes)] == [
            p.replace("/./", "/") for p in paths
        ]
        # Ids 3, 5, 7, ... become 0, 1, 2, ...
        assert found.targets.tolist() == [(label - 3) // 2 for label in listed.values()]


def test_fgvc_s_preparation_is_the_published_one(fgvc):
    data = ready(FgvcData(root=str(fgvc / "cub"), dataset="cub"))
    assert (data.preprocessing.mean, data.preprocessing.std, data.preprocessing.crop_pct) == (*IMAGENET, 0.875)
    train, test = data.split("train"), data.split("test")
    scaled = data.preprocessing.scale()(test.source.read(0))
    assert scaled.shape == (3, 9, 10)  # 8 / 0.875 on the shorter side of 6 x 5
    assert torch.equal(test[0][0], data.preprocessing.normalise()(scaled[:, 0:8, 1:9]))
    seen = [train[(epoch, 0)][0] for epoch in range(40)]
    assert torch.equal(train[(3, 0)][0], seen[3])
    distinct = {image.numpy().tobytes() for image in seen}
    assert 6 < len(distinct) <= 2 * 3 * 2  # windows of 8 x 8 in 10 x 9, and their mirror images


def test_fgvc_without_augmentation(fgvc):
    data = ready(FgvcData(root=str(fgvc / "cars"), dataset="cars", augment=Augmentation()))
    assert torch.equal(data.split("train")[(0, 0)][0], data.split("train")[(1, 0)][0])


def test_what_is_no_fgvc_is_refused(fgvc, tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'cub'"):
        FgvcData(root=str(fgvc), dataset="cubs")
    with pytest.raises(DataError, match=r"has no train\.json, val\.json, test\.json"):
        ready(FgvcData(root=str(tmp_path), dataset="cub"))
    with pytest.raises(DataError, match="has no folder Images"):
        ready(FgvcData(root=str(fgvc / "cub"), dataset="dogs"))
    with pytest.raises(DataError, match="CUB-200-2011 has 200 classes as published, and here are images of 7"):
        ready(FgvcData(root=str(make_fgvc(tmp_path, "cub", Painter(), classes=7)), dataset="cub"))
