"""Reading of files batch by batch: workers, broken files, marks of changes, and JPEGs at reduced scale."""

import hashlib
import io
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from vispeft.data import ImageFolderData, Preprocessing, read_image
from vispeft.data.augmentation import Augmentation
from vispeft.data.images import REDUCING_GAP
from vispeft.data.listed import ImageSplit
from vispeft.data.reading import FileReader, file_state, watched
from vispeft.errors import ConfigError, DataError
from vispeft.tasks.predictions import PreparedBeside

PREPARED = Preprocessing(size=(6, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def files(tmp_path):
    random = np.random.default_rng(0)
    paths = []
    for number in range(7):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(random.integers(0, 256, (9 + number, 12, 3), dtype=np.uint8)).save(paths[-1])
    paths[2].write_bytes(b"no image")
    return [paths[:4], paths[4:]]


@pytest.mark.parametrize(
    ("workers", "mark"),
    [(0, "state"), (0, "digest"), (2, "digest"), pytest.param(2, "state", marks=pytest.mark.slow)],
)
def test_batches_are_equal_wherever_they_are_read(files, workers, mark):
    before = torch.random.get_rng_state()
    prepared, raw = (FileReader(prepare=one, workers=workers, mark=mark) for one in (PREPARED.transform(), None))
    for group, batch, plain in zip(files, prepared.batches(files), raw.batches(files), strict=True):
        kept = [path for path in group if path.name != "2.png"]
        assert batch.kept == plain.kept == [group.index(path) for path in kept]
        assert torch.equal(batch.images, torch.stack([PREPARED.transform()(read_image(path)) for path in kept]))
        assert isinstance(plain.images, list)
        for image, path in zip(plain.images, kept, strict=True):
            assert torch.equal(image, read_image(path))
            assert image.stride() == read_image(path).stride()
        wanted = [hashlib.sha256(p.read_bytes()).hexdigest() if mark == "digest" else file_state(p) for p in group]
        assert batch.marks == wanted == [prepared.mark_of(str(path)) for path in group]
        assert [entry.path for entry in batch.left_out] == [str(path) for path in group if path not in kept]
    assert torch.equal(before, torch.random.get_rng_state())


def test_files_that_cannot_be_opened_are_left_out_with_a_reason(files, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    group = [tmp_path / "gone.png", tmp_path / "pipe", tmp_path, files[1][0]]
    for mark in ("state", "digest"):
        (batch,) = FileReader(mark=mark).batches([group])
        assert batch.kept == [3]
        assert [entry.reason.partition(" cannot be read")[0] for entry in batch.left_out] == list(map(str, group[:3]))
        assert batch.marks[0] == FileReader(mark=mark).mark_of(str(group[0])) == ""
    assert list(FileReader(workers=2).batches([])) == []
    with pytest.raises(DataError, match=r"2\.png cannot be read as an image"):
        list(FileReader(strict=True).batches(files))
    with pytest.raises(ConfigError, match="--workers is -1"):
        FileReader(workers=-1)


def fail(image):
    raise RuntimeError("no image of mine")


def die(image):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_is_ended_is_told_apart_from_an_error_inside_of_one(files):
    with pytest.raises(DataError, match=r"was ended from outside .*--workers 1\?"), watched(1):
        list(FileReader(prepare=die, workers=1).batches(files))
    with pytest.raises(RuntimeError, match="no image of mine"), watched(1):
        list(FileReader(prepare=fail, workers=1).batches(files))


def test_the_end_of_a_worker_is_told_wherever_it_is_noticed():
    ended = "DataLoader worker (pid 7) is killed by signal: Killed. "
    with (
        pytest.raises(DataError, match=r"ended from outside \(DataLoader .* Killed\.\)\. .* --workers 3\?"),
        watched(3),
    ):
        raise RuntimeError(ended)
    for error in (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), ValueError(ended)):
        with pytest.raises(type(error)) as found, watched(3):
            raise error
        assert found.value is error


def test_readers_can_be_sent_to_workers_that_are_not_forked(files):
    beside = PreparedBeside(PREPARED, whole=True, short_side=8)
    for prepare in (None, PREPARED.transform(), beside):
        (batch,) = pickle.loads(pickle.dumps(FileReader(prepare=prepare))).batches(files[1:])
        (wanted,) = FileReader(prepare=prepare).batches(files[1:])
        for one, two in zip(batch.images, wanted.images, strict=True):
            assert all(map(torch.equal, one, two))


def jpeg(width, height, orientation=1):
    ramp = np.linspace(0, 255, width * height).reshape(height, width, 1)
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=95, exif=exif)
    return content


@pytest.mark.parametrize(("least", "shrunk"), [((76, 70), 1), ((75, 76), 2), ((37, 37), 4), ((18, 19), 8), ((1, 1), 8)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_are_decoded_to_twice_what_is_needed_at_least(least, shrunk, orientation):
    # Of 304 x 300 pixels a half, a quarter or an eighth, the smallest with 2 x `least` left in both directions.
    width, height = (304, 300) if orientation == 1 else (300, 304)
    found = read_image(jpeg(width, height, orientation), "it", least=least)
    assert tuple(found.shape[1:]) == (-(-300 // shrunk), -(-304 // shrunk))
    assert shrunk == 1 or all(side >= REDUCING_GAP * few for side, few in zip(found.shape[1:], least, strict=True))


def test_reduced_pixels_lie_near_those_of_the_whole_image():
    full, reduced = (
        Preprocessing(size=(16, 20), mean=(0,) * 3, std=(1,) * 3, decode=way) for way in ("full", "reduced")
    )
    content = jpeg(320, 240)
    one, other = (p.resize()(read_image(content, "it", least=p.least)).float() for p in (full, reduced))
    assert 0 < (one - other).abs().mean() < 1.5
    png = io.BytesIO()
    Image.open(content).save(png, "PNG")
    assert torch.equal(read_image(png, "it", least=(16, 20)), read_image(content, "it"))


def test_the_preprocessing_carries_how_files_are_decoded():
    plain = Preprocessing(size=(32, 40), mean=(0,) * 3, std=(1,) * 3)
    assert plain.least is None
    assert "decode" not in plain.to_dict()
    reduced = Preprocessing(size=(32, 40), mean=(0,) * 3, std=(1,) * 3, crop_pct=0.8, decode="reduced")
    assert reduced.least == (40, 50)
    assert Preprocessing.from_dict(reduced.to_dict()) == reduced
    assert Preprocessing.from_dict(plain.to_dict()) == plain
    with pytest.raises(DataError, match="full and reduced"):
        Preprocessing(size=(32, 40), mean=(0,) * 3, std=(1,) * 3, decode="half")
    whole = Augmentation(crop="resized", crop_area=(0.25, 1.0))
    assert whole.least(reduced) == (64, 80)  # a quarter of the area is half of each side
    assert Augmentation(flip=0.5).least(reduced) == (40, 50)
    assert whole.least(plain) is None


def test_a_folder_of_jpegs_is_read_at_reduced_scale_and_other_data_refuse_it(tmp_path, monkeypatch):
    for number in range(12):
        folder = tmp_path / "photos" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(jpeg(90 + number, 70).getvalue())
    data = ImageFolderData(root=str(tmp_path / "photos"), decode="reduced")
    data.fit_to(PREPARED)
    data.setup()
    split = data.split("test")
    assert isinstance(split, ImageSplit)
    path = split.source.paths[0]
    reduced = data.preprocessing
    assert reduced.decode == "reduced"
    assert torch.equal(split[0][0], reduced.transform()(read_image(path, least=(6, 8))))
    assert not torch.equal(split[0][0], reduced.transform()(read_image(path)))
    monkeypatch.setattr(type(split.source), "reduces", False)
    with pytest.raises(ConfigError, match="are not decoded by vispeft"):
        ImageFolderData(root=str(tmp_path / "photos"), decode="reduced").accept()
    with pytest.raises(ConfigError, match="full and reduced"):
        ImageFolderData(root=str(tmp_path / "photos"), decode="half")
