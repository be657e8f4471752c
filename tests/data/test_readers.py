import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch

from tests.data.published import Painter
from vispeft.data import (
    ImageFolderData,
    ImageListData,
    JsonData,
    Preprocessing,
    TorchvisionData,
    WebDatasetData,
    read_image,
)
from vispeft.data.shards import expand
from vispeft.data.torchvision_sets import SETS
from vispeft.errors import ConfigError, DataError, UnknownNameError

BACKBONE = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def ready(data):
    data.fit_to(BACKBONE)
    data.setup()
    return data


def names_of(split):
    return [split.source.name(index) for index in range(len(split))]


# ------------------------------------------------------------------ folders


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
    with pytest.raises(DataError, match="has no class folders; found nothing"):
        ready(ImageFolderData(root=str(tmp_path)))
    folder(tmp_path, val__a=1)
    with pytest.raises(DataError, match="no folder train to learn from"):
        ready(ImageFolderData(root=str(tmp_path)))


# ------------------------------------------------------------------ folds


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


# ------------------------------------------------------------------ lists


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


def test_a_path_no_system_takes_is_found(images):
    listed = {"img/zero\0.png": 0, **{f"img/my photo {n}.png": n % 2 for n in range(12)}}
    data = JsonData(train_list=write(images / "a.json", json.dumps(listed)), validation=0.3, test=0.3)
    assert [finding.code for finding in data.report().of("error")] == ["broken-image"]


def test_a_stray_number_makes_no_classes_below_it(images):
    lines = [f"img/my photo {n}.png {99_999_999_999 if n == 5 else n % 2}" for n in range(12)]
    data = ImageListData(train_list=write(images / "a.txt", *lines))
    with pytest.raises(DataError, match=r"1 image with a label outside 0 to 1: a\.txt:6 \(99999999999\)"):
        _ = data.num_classes


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


# ------------------------------------------------------------------ torchvision


def make_idx(root, name="FashionMNIST", counts=(60, 20)):
    """Write the MNIST family's layout: magic number, sizes, bytes."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = (0x803).to_bytes(4) + count.to_bytes(4) + (28).to_bytes(4) * 2
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes((0x801).to_bytes(4) + count.to_bytes(4) + labels.tobytes())
    return root


def test_a_torchvision_set_on_disk_is_read(tmp_path):
    make_idx(tmp_path)
    data = ready(TorchvisionData(dataset="FashionMNIST", root=str(tmp_path), check="full", batch_size=16))
    assert data.class_names[0] == "T-shirt/top"
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [48, 12, 20]
    assert data.split("test").targets.tolist() == [n % 10 for n in range(20)]
    image, _ = next(iter(data.test_dataloader()))
    assert image.shape == (16, 3, 8, 8)
    raw = (tmp_path / "FashionMNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16 : 16 + 784]
    grey = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(1, 28, 28).expand(3, -1, -1)
    assert torch.equal(image[0], data.preprocessing.transform()(grey))
    assert {finding.code for finding in data.report().of("fact")} >= {"grayscale", "drawn-splits"}


def test_faults_nobody_can_mend_do_not_refuse_a_torchvision_set(tmp_path):
    raw = make_idx(tmp_path) / "FashionMNIST/raw"
    images, test = raw / "train-images-idx3-ubyte", raw / "t10k-images-idx3-ubyte"
    test.write_bytes(test.read_bytes()[:-784] + images.read_bytes()[16 : 16 + 784])  # one image in train and in test
    data = ready(TorchvisionData(dataset="FashionMNIST", root=str(tmp_path), check="full"))
    found = {finding.code: finding for finding in data.report().of("warning")}
    assert {"splits-overlap", "labels-disagree"} <= set(found)
    assert "FashionMNIST train[0] = test FashionMNIST test[19]" in found["splits-overlap"].line()


def test_a_torchvision_set_that_was_cut_short_is_refused(tmp_path):
    raw = make_idx(tmp_path) / "FashionMNIST/raw"
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    for size in (0, 3, 10, 500):
        (raw / "train-images-idx3-ubyte").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"torchvision cannot open FashionMNIST in '.*' \(.+\)"):
            TorchvisionData(dataset="FashionMNIST", root=str(tmp_path)).read()


def test_cifar_in_its_published_layout_is_read(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        (place / name).write_bytes(pickle.dumps({"data": pixels, "labels": [n % 10 for n in range(20)]}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    # torchvision compares checksums of the real files.
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *given: True)
    data = ready(TorchvisionData(dataset="CIFAR10", root=str(tmp_path)))
    assert data.class_names == tuple("abcdefghij")
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [80, 20, 20]


def test_a_set_that_is_not_there_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError, match=r"put FashionMNIST/raw/ with the four unpacked IDX files into that folder"):
        ready(TorchvisionData(dataset="FashionMNIST", root=str(tmp_path)))
    assert not list(tmp_path.iterdir())  # nothing was downloaded
    with pytest.raises(UnknownNameError, match="Did you mean 'CIFAR10"):
        TorchvisionData(dataset="CIFAR1", root=str(tmp_path))


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_known_set_takes_its_arguments_and_says_what_is_missing(tmp_path, name):
    with pytest.raises(DataError, match="It is not downloaded here: put ") as refused:
        TorchvisionData(dataset=name, root=str(tmp_path)).read()
    assert "unexpected keyword" not in str(refused.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ------------------------------------------------------------------ shards


def make_shard(path, samples, kind=".cls"):
    painter = Painter(seed=len(str(path)) + sum(map(ord, path.name)))
    with tarfile.open(path, "w") as archive:
        for name, label in samples:
            image = painter.paint(path.parent / "scratch.png").read_bytes()
            for ending, content in ((".png", image), (kind, None if label is None else str(label).encode())):
                if content is not None:
                    entry = tarfile.TarInfo(name + ending)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    (path.parent / "scratch.png").unlink()
    return path


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        make_shard(tmp_path / f"train-{shard:03d}.tar", [(f"a/{n:05d}", n % 4) for n in range(12)])
    return tmp_path


def test_shards_are_read_in_place(shards):
    data = ready(WebDatasetData(train_shards=str(shards / "train-{000..002}.tar"), batch_size=8))
    assert data.num_classes == 4
    assert sum(len(data.split(name)) for name in ("train", "validation", "test")) == 36
    pool = data.read().splits["train"]
    assert pool.targets.tolist() == [n % 4 for n in range(12)] * 3
    assert pool.source.name(13) == "train-001.tar:a/00001.png"
    with tarfile.open(shards / "train-001.tar") as archive:
        content = archive.extractfile("a/00001.png").read()
    (shards / "one.png").write_bytes(content)
    assert torch.equal(pool.source.read(13), read_image(shards / "one.png"))


def test_order_of_shards_follows_seed_and_epoch_with_any_number_of_workers(shards):
    def epoch(number, workers):
        data = ready(WebDatasetData(train_shards=str(shards / "*.tar"), batch_size=5, num_workers=workers))
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat([images for images, _ in loader])

    assert torch.equal(epoch(1, 0), epoch(1, 2))
    assert not torch.equal(epoch(1, 0), epoch(2, 0))


def test_labels_in_json_members(tmp_path):
    samples = [(f"{n}", json.dumps({"tags": ["red", "big"][: 1 + n % 2]})) for n in range(12)]
    make_shard(tmp_path / "a.tar", samples, kind=".json")
    data = ready(
        WebDatasetData(
            train_shards=str(tmp_path / "a.tar"), label="json:tags", target="multilabel", validation=0.3, test=0.3
        )
    )
    assert data.class_names == ("big", "red")
    assert data.read().splits["train"].targets[:2].tolist() == [[0, 1], [1, 1]]


def test_shards_with_faults_are_refused(shards):
    with pytest.raises(DataError, match=r"not there:.*train-003\.tar"):
        ready(WebDatasetData(train_shards=str(shards / "train-{000..003}.tar")))
    with pytest.raises(DataError, match="have to lie on a disk"):
        expand("https://example.org/{000..003}.tar")
    (shards / "train-000.tar.gz").write_bytes(gzip.compress((shards / "train-000.tar").read_bytes()))
    with pytest.raises(DataError, match="unpacked"):
        ready(WebDatasetData(train_shards=str(shards / "train-000.tar.gz")))
    make_shard(shards / "bad.tar", [(f"{n}", None if n == 3 else n % 2) for n in range(12)])
    with pytest.raises(DataError, match=r"1 image without a label.*: bad\.tar:3\.png"):
        _ = WebDatasetData(train_shards=str(shards / "bad.tar")).num_classes
    whole = (shards / "train-000.tar").read_bytes()
    (shards / "short.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError, match=r"cut short; make or copy them again: short\.tar"):
        ready(WebDatasetData(train_shards=str(shards / "short.tar")))


def test_of_several_members_the_image_is_taken_and_two_images_are_refused(tmp_path):
    painter = Painter()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(12):
            for ending in ("png", "seg.png"):
                archive.add(painter.paint(tmp_path / f"{number}.{ending}"), f"{number}.{ending}")
            (tmp_path / "label").write_text(str(number % 2))
            archive.add(tmp_path / "label", f"{number}.cls")
    data = ready(WebDatasetData(train_shards=str(tmp_path / "a.tar"), validation=0.3, test=0.3))
    assert names_of(data.read().splits["train"]) == [f"a.tar:{number}.png" for number in range(12)]
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        archive.add(painter.paint(tmp_path / "x.bmp"), "5.bmp")
    with pytest.raises(DataError, match=r"Several images under one name in train.*: a\.tar:5\.bmp"):
        ready(WebDatasetData(train_shards=str(tmp_path / "a.tar")))


@pytest.mark.parametrize("settings", [{"label": "json"}, {"label": "cls:x"}, {"label": ""}, {"names": ["a", "a"]}])
def test_wrong_settings_of_shards_are_refused_at_once(settings):
    with pytest.raises(ConfigError):
        WebDatasetData(train_shards="a.tar", **settings)
