"""Sets that torchvision reads."""

import pickle

import numpy as np
import pytest
import torch

from tests.data.reading import ready
from vispeft.data import (
    TorchvisionData,
)
from vispeft.data.torchvision_sets import SETS
from vispeft.errors import DataError, UnknownNameError


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
