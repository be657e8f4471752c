import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.tiny import TINY
from vispeft.data import Preprocessing, find_images, read_image
from vispeft.data.facts import look_at
from vispeft.errors import DataError


def tiny(**changes):
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, **changes})


def test_preprocessing_is_the_backbone_s_at_its_size():
    found = Preprocessing.of(tiny())
    assert found.size == (16, 16)
    assert found.mean == tuple(timm.get_pretrained_cfg("vit_tiny_patch16_224").mean)
    assert Preprocessing.from_dict(found.to_dict()) == found


def test_other_channel_counts_are_refused():
    with pytest.raises(DataError, match="takes 1 channel,"):
        Preprocessing.of(tiny(in_chans=1))


def test_incomplete_preprocessing_is_refused():
    with pytest.raises(DataError, match="lacks mean, std"):
        Preprocessing.from_dict({"input_size": [3, 8, 8], "interpolation": "bicubic"})


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
def test_any_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 4, 5)
    assert image.dtype == torch.uint8
    assert image.min() == 255


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").unique().tolist() == [0x80]


def test_upright_as_the_metadata_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 6, 4)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says much about such bytes
@pytest.mark.parametrize("kind", ["jpeg", "tiff", "webp"])
def test_whatever_broken_bytes_do_to_pillow_the_image_is_named(kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x0131], exif[0x011A] = 6, "x", 72.0
    image.save(file, kind, exif=exif)
    whole = file.getvalue()
    for place in range(min(len(whole), 300)):
        for byte in (b"\0", b"\2"):
            content = whole[:place] + byte + whole[place + 1 :]
            known = look_at(io.BytesIO(content), full=True)
            assert bool(known.reason) == bool(known.problem)
            assert known.problem in ("", "truncated", "broken", "unsupported", "too-large")
            try:
                assert read_image(io.BytesIO(content), "mine").shape[0] == 3
            except DataError as error:
                assert str(error).startswith("mine cannot be read as an image (")  # noqa: PT017 - most can be read


def test_images_are_found_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["a.JPG", "b.png", "c.webp"]
    assert find_images(tmp_path / "b.png") == [tmp_path / "b.png"]


def test_an_empty_place_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no image .* \(1 \.txt: notes\.txt\)"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        find_images(tmp_path / "nowhere")
