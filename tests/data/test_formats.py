"""The formats that are read, and those that are not: opening an image never starts another program."""

import io
import os
import subprocess

import pytest
from PIL import EpsImagePlugin, Image, features
from PIL.EpsImagePlugin import EpsImageFile

from vispeft.data import find_images, read_image
from vispeft.data.facts import look_at
from vispeft.data.formats import FORMATS, open_image
from vispeft.data.images import EXTENSIONS
from vispeft.data.masks import look_at_mask, read_codes
from vispeft.data.sources import TorchvisionSource
from vispeft.errors import DataError


@pytest.fixture
def eps():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(file, "EPS")
    return file.getvalue()


@pytest.fixture
def started(monkeypatch):
    """Names of the programs that Pillow starts; it believes that Ghostscript is installed."""
    calls = []

    def start(arguments, *_, **__):
        calls.append(arguments[0])
        raise OSError("not here")

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    for name in ("check_call", "Popen"):
        monkeypatch.setattr(subprocess, name, start)
    return calls


@pytest.mark.parametrize("name", [*FORMATS, "MPO"])
def test_the_formats_are_there_in_every_pillow(name, tmp_path):
    if name == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("This Pillow was built without OpenJPEG.")
    Image.new("RGB", (8, 8)).save(tmp_path / "image", name)
    assert read_image(tmp_path / "image").shape == (3, 8, 8)


def test_every_ending_has_its_format():
    known = Image.registered_extensions()
    assert {known[ending] for ending in EXTENSIONS} <= set(FORMATS)


@pytest.mark.parametrize("name", ["a.jfif", "B.JFIF", "c.jpe", "d.jp2"])
def test_rarer_endings_of_formats_that_are_read_are_images(name, tmp_path):
    kind = "JPEG2000" if name.endswith("jp2") else "JPEG"
    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("This Pillow was built without OpenJPEG.")
    Image.new("RGB", (8, 8)).save(tmp_path / name, kind)
    (tmp_path / "notes.txt").touch()
    assert find_images(tmp_path) == [tmp_path / name]
    assert read_image(tmp_path / name).shape == (3, 8, 8)


def test_no_image_and_no_mask_starts_ghostscript(tmp_path, eps, started):
    path = tmp_path / "photo.png"
    path.write_bytes(eps)
    with pytest.raises(DataError, match=r"photo\.png cannot be read as an image \(cannot identify image file"):
        read_image(path)
    with pytest.raises(OSError, match="cannot identify image file"):
        read_codes(path)
    for look in (look_at, look_at_mask):
        assert look(io.BytesIO(eps), full=True).problem == "broken"
    assert find_images(path) == [path]
    assert started == []


def test_a_data_set_that_opens_its_files_itself_starts_nothing(eps, started):
    """torchvision's sets hand the file's name to Pillow."""
    source = TorchvisionSource([(Image.open(io.BytesIO(eps)), 0)], "a set", [0])
    assert isinstance(source.dataset[0][0], EpsImageFile)
    with pytest.raises(DataError, match=r"a set\[0\] cannot be read"):
        source.read(0)
    assert source.facts(full=True)[0].problem == "broken"
    assert started == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="This system has no named pipes.")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for place in (tmp_path / "a.png", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="no regular file"):
            open_image(place)
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image \(it is no regular file\)"):
        read_image(tmp_path / "a.png")
