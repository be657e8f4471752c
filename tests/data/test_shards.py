"""WebDataset shards."""

import gzip
import io
import json
import os
import tarfile

import pytest
import torch

from tests.data.published import Painter
from tests.data.reading import names_of, ready
from vispeft.data import (
    WebDatasetData,
    read_image,
)
from vispeft.data.shards import expand
from vispeft.errors import ConfigError, DataError


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


def test_hidden_members_are_no_images_and_all_others_are_named(tmp_path):
    shard = make_shard(tmp_path / "a.tar", [(f"./a/{n}", n % 2) for n in range(8)])
    with tarfile.open(shard, "a") as archive:
        for name, kind in (
            ("a/._0.png", tarfile.REGTYPE),
            ("a/.trash/0.png", tarfile.REGTYPE),
            ("__MACOSX/a/0.png", tarfile.REGTYPE),
            ("a/0.heic", tarfile.REGTYPE),
            ("a/9.png", tarfile.SYMTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type = kind
            archive.addfile(entry)
    listing = WebDatasetData(train_shards=str(shard)).read()
    assert len(listing.splits["train"]) == 8
    line = next(finding.line() for finding in listing.findings if finding.code == "left-out")
    assert line == (
        "Left out: 1 link or device in shards (a.tar:a/9.png); 1 member of shards with other endings than images and "
        "labels (1 .heic: a.tar:a/0.heic); 3 hidden entries (a.tar:__MACOSX/a/0.png, a.tar:a/._0.png, "
        "a.tar:a/.trash/0.png)."
    )


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    for pattern in ("a.tar", "*.tar"):
        with pytest.raises(DataError, match="shards that are not there"):
            WebDatasetData(train_shards=str(tmp_path / pattern)).read()


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


def test_shards_of_several_splits_may_have_one_name(tmp_path):
    """The usual layout: train/000000.tar and test/000000.tar, with images 000000.png in each."""
    for split, count in (("train", 8), ("test", 6)):
        (tmp_path / split).mkdir()
        make_shard(tmp_path / split / "000000.tar", [(f"{n:06d}", n % 2) for n in range(count)])
    found = {f"{split}_shards": str(tmp_path / split / "000000.tar") for split in ("train", "test")}
    data = ready(WebDatasetData(**found, batch_size=2))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [7, 1, 6]
    assert data.split("test").source.name(1) == "test/000000.tar:000001.png"
