"""Pixels are read as they were written, whatever the depth, polarity, byte order and layout of the file."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.made import netpbm, png, tiff
from vispeft.data import ImageFolderData, MaskFolderData, read_image
from vispeft.data.facts import look_at
from vispeft.data.images import Reading, read_size
from vispeft.data.masks import look_at_mask, read_codes
from vispeft.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)
TURNS = {
    2: np.fliplr,
    3: lambda array: array[::-1, ::-1],
    4: np.flipud,
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: np.rot90(array, -1),
    7: lambda array: np.rot90(array, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""What each orientation of Exif asks for."""


def values(white, shape=(5, 7), dtype=np.uint16):
    found = RANDOM.integers(0, white + 1, shape)
    found[0, 0], found[-1, -1] = 0, white
    return found.astype(dtype)


def image_of(content, **reading):
    return read_image(io.BytesIO(content), "it", Reading(**reading)).permute(1, 2, 0).numpy()


def codes_of(content, by_colour=False):
    return read_codes(io.BytesIO(content), by_colour)


def eight_bits(stored, white):
    return stored >> 8 if white == 65_535 else (stored.astype(int) * 255 + white // 2) // white


# ------------------------------------------------------------------ grey


def grey_files():
    for bits in (1, 2, 4, 8, 16):
        stored = values(2**bits - 1)
        yield f"png {bits}", png(stored, bits), stored, 2**bits - 1, False
        for order in "<>":
            for meaning in (0, 1):
                for packing in (1, 8):
                    content = tiff(stored, bits, order=order, meaning=meaning, packing=packing)
                    yield f"tiff {bits} {order} {meaning} {packing}", content, stored, 2**bits - 1, meaning == 0
    for white in (1, 3, 15, 100, 255, 256, 4095, 65_535):
        stored = values(white)
        for plain in (False, True):
            yield f"netpbm {white} {plain}", netpbm(stored, white, plain=plain), stored, white, white == 1


@pytest.mark.parametrize("case", list(grey_files()), ids=lambda case: case[0])
def test_grey_values_of_every_depth(case):
    _, content, stored, white, inverted = case
    assert np.array_equal(codes_of(content), stored)
    expected = eight_bits(stored, white)
    assert np.array_equal(image_of(content), np.repeat((255 - expected if inverted else expected)[..., None], 3, 2))
    with io.BytesIO(content) as file:
        known = look_at_mask(file, True)
        assert (known.problem, known.white_is_zero, dict(known.codes)) == (
            "",
            inverted,
            dict(zip(*(found.tolist() for found in np.unique(stored, return_counts=True)), strict=True)),
        )
        seen = look_at(file, True)
        assert (seen.problem, seen.deep, seen.width, seen.height) == ("", white > 255, 7, 5)
        if seen.deep:
            assert (seen.lowest, seen.highest, seen.white) == (stored.min(), stored.max(), white)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "u4"])
def test_signed_and_wide_values_of_masks(order, kind):
    dtype = np.dtype(kind)
    stored = np.array([[np.iinfo(dtype).min, 0, 3], [np.iinfo(dtype).max, 1, 2]], dtype)
    content = tiff(stored, 8 * dtype.itemsize, order=order)
    assert codes_of(content).astype(np.int64).tolist() == stored.astype(np.int64).tolist()
    with pytest.raises(DataError, match=r"numbers \(.*\) have no known range; set value_range"):
        image_of(content)
    known = look_at(io.BytesIO(content), full=False)
    assert known.problem == "unsupported"
    assert image_of(content, value_range=(0, 3))[..., 0].tolist() == [
        [0, 0, 255],
        [255, 85, 170],
    ]


def test_floating_point_numbers_have_a_range_if_it_is_given():
    stored = np.array([[0.0, 0.5], [1.0, 2.0]], np.float32)
    content = tiff(stored, 32)
    with pytest.raises(DataError, match="set value_range"):
        image_of(content)
    assert image_of(content, value_range=(0, 1))[..., 0].tolist() == [[0, 128], [255, 255]]
    with pytest.raises(DataError, match="not finite"):
        image_of(tiff(np.array([[np.nan]], np.float32), 32), value_range=(0, 1))
    with pytest.raises(ValueError, match="floating-point numbers; a mask is grey with whole numbers"):
        codes_of(content)


# ------------------------------------------------------------------ colours


def colour_files():
    for bits in (8, 16):
        white = 2**bits - 1
        three, four, two = (values(white, (5, 7, bands)) for bands in (3, 4, 2))
        yield f"png {bits}", png(three, bits), three
        yield f"png alpha {bits}", png(four, bits), four
        yield f"png grey alpha {bits}", png(two, bits), two[..., [0, 0, 0, 1]]
        for order in "<>":
            for apart in (False, True):
                yield f"tiff {bits} {order} {apart}", tiff(three, bits, order=order, meaning=2, apart=apart), three
        yield f"tiff deflate {bits}", tiff(three, bits, meaning=2, packing=8), three
        yield f"tiff alpha {bits}", tiff(four, bits, meaning=2, extra=(2,)), four
        yield f"ppm {bits}", netpbm(three, white), three
        yield f"ppm plain {bits}", netpbm(three, white, plain=True), three


@pytest.mark.parametrize("case", list(colour_files()), ids=lambda case: case[0])
def test_colours_of_eight_and_sixteen_bits(case):
    name, content, stored = case
    shift = 8 if "16" in name else 0
    assert np.array_equal(image_of(content), stored[..., :3] >> shift)
    whole = look_at(io.BytesIO(content), full=True)
    assert (whole.problem, whole.deep) == ("", bool(shift))
    if shift:
        assert (whole.lowest, whole.highest) == (stored[..., :3].min(), stored[..., :3].max())
        low = image_of(content, value_range=(0, 4095))
        assert np.array_equal(low, (stored[..., :3] * np.float32(255 / 4095)).clip(0, 255).round())
    if shift or "grey alpha" in name:
        return
    assert np.array_equal(codes_of(content), stored[..., :3])


def test_colours_of_sixteen_bits_in_a_mask_are_those_of_eight_or_refused():
    stored = values(255, (4, 4, 3))
    for content in (png(stored * 257, 16), netpbm(stored * 257, 65_535), tiff(stored * 257, 16, meaning=2, order=">")):
        assert np.array_equal(codes_of(content), stored)
    with pytest.raises(ValueError, match="stand between two colours of 8 bits"):
        codes_of(png(stored * 257 + np.uint16(1) * (stored == 0), 16))


def test_bands_beyond_three_are_counted_and_thirteen_are_refused():
    five = values(255, (4, 4, 5), np.uint8)
    for bands, extra in ((5, (0, 0)), (4, (0,)), (4, ())):  # a fourth band is transparency only if the file says so
        content = tiff(five[..., :bands], meaning=2, extra=extra)
        assert np.array_equal(image_of(content), five[..., :3])
        known = look_at(io.BytesIO(content), full=False)
        assert (known.dropped, known.transparent) == (bands - 3, False)
    for content in (
        tiff(values(255, (4, 4, 13)), 16, meaning=1, extra=(0,) * 12),
        tiff(values(9, (4, 4, 13)), meaning=2),
        tiff(values(9, (4, 4, 13)), extra=(0,) * 12, apart=True),
        tiff(values(255, (4, 4, 13)), 16, meaning=2, extra=(0,) * 10, apart=True),
    ):
        with pytest.raises(DataError, match=r"this TIFF has 13 bands of (8|16) bits"):
            image_of(content)
        known = look_at(io.BytesIO(content), full=True)
        assert (known.problem, "13 bands" in known.reason) == ("unsupported", True)


def test_palettes_grey_and_bits_are_colours_where_colours_are_asked_for():
    palette = np.array([(255, 255, 255), (0, 0, 0), (220, 20, 60), (85, 85, 85)])
    indices = values(3)
    shown = palette[indices]
    for content in (png(indices, 2, palette=palette), png(shown), tiff(shown, meaning=2)):
        assert np.array_equal(codes_of(content, by_colour=True), shown)
    assert np.array_equal(codes_of(tiff(indices % 2, 1, meaning=3, palette=palette[:2]), True), palette[indices % 2])
    grey = values(3)
    for content, expected in (
        (png(grey, 2), grey * 85),
        (png(grey % 2, 1), grey % 2 * 255),
        (tiff(grey % 2, 1, meaning=0), 255 - grey % 2 * 255),
        (netpbm(grey, 3), grey * 85),
    ):
        assert np.array_equal(codes_of(content, by_colour=True), np.repeat(expected[..., None], 3, 2))
    with pytest.raises(ValueError, match="no colours of a palette"):
        codes_of(png(grey, 16), by_colour=True)


# ------------------------------------------------------------------ orientation


@pytest.mark.parametrize("orientation", list(TURNS))
def test_metadata_turn_images_and_masks_alike(orientation, tmp_path):
    stored = values(255, (3, 5), np.uint8)
    expected = TURNS[orientation](stored)
    files = {
        "png": png(stored, orientation=orientation),
        "late png": png(stored, orientation=orientation, late=True),
        "deep png": png(stored.astype(np.uint16) * 257, 16, orientation=orientation),
        "tiff": tiff(stored, tags=((274, orientation),)),
        "deflated tiff": tiff(stored, packing=8, tags=((274, orientation),)),
        "white is zero": tiff(255 - stored, meaning=0, tags=((274, orientation),)),
        "deep tiff": tiff(stored.astype(np.uint16) * 257, 16, tags=((274, orientation),)),
        "palette tiff": tiff(
            stored, palette=np.arange(256)[:, None].repeat(3, 1), meaning=3, tags=((274, orientation),)
        ),
    }
    for name, content in files.items():
        # By its path, too: Pillow then maps the file of one band, in the size after the turn.
        (tmp_path / "file").write_bytes(content)
        assert np.array_equal(read_image(tmp_path / "file")[0].numpy(), expected), name
        assert np.array_equal(read_codes(tmp_path / "file"), codes_of(content)), name
        assert np.array_equal(image_of(content)[..., 0], expected), name
        masks = codes_of(content)
        if name in ("png", "late png", "tiff", "deflated tiff", "palette tiff"):
            assert np.array_equal(masks, expected), name
        for full in (True, False):
            for look in (look_at, look_at_mask):
                known = look(io.BytesIO(content), full)
                assert (known.orientation, known.upright) == (orientation, expected.shape[::-1]), (name, full)
        assert read_size(io.BytesIO(content)) == expected.shape


def test_pixels_of_a_png_are_not_decoded_for_its_metadata(monkeypatch):
    content = png(values(255))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert look_at(io.BytesIO(content), full=False).orientation == 1


# ------------------------------------------------------------------ transparency and range


def test_transparent_pixels_are_laid_on_a_colour():
    four = values(255, (4, 6, 4), np.uint8)
    share = four[..., 3:] / 255
    expected = np.floor(four[..., :3] * share + np.array([10, 20, 30]) * (1 - share) + 0.5)
    for content in (png(four), tiff(four, meaning=2, extra=(2,))):
        assert np.abs(image_of(content, transparency=(10, 20, 30)) - expected).max() <= 1
        assert np.array_equal(image_of(content), four[..., :3])
    file = io.BytesIO()
    indexed = Image.fromarray(values(3, dtype=np.uint8)).convert("P")
    indexed.save(file, "PNG", transparency=0)
    hidden = np.asarray(indexed) == 0
    assert (image_of(file.getvalue(), transparency=(9, 8, 7))[hidden] == (9, 8, 7)).all()
    assert look_at(io.BytesIO(file.getvalue()), full=True).transparent
    assert not look_at(io.BytesIO(png(np.where(np.arange(4) == 3, 255, four))), full=True).transparent
    deep = np.array([[[1000, 2000, 3000, 0], [4095, 0, 4095, 65_535]]])
    found = image_of(png(deep, 16), transparency=(1, 2, 3), value_range=(0, 4095))
    assert found.tolist() == [[[1, 2, 3], [255, 0, 255]]]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"transparency": (256, 0, 0)}, "from 0 to 255"),
        ({"value_range": (5, 5)}, "a larger one"),
        ({"value_range": (0, float("inf"))}, "a larger one"),
        ({"max_pixels": 0}, "at least one pixel"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        ImageFolderData(root="nowhere", **settings)


def folder(root, content, count=2):
    for split in ("train", "val", "test"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.png").write_bytes(content())
    return str(root)


def test_twelve_bits_in_sixteen_are_a_warning_with_the_range_and_a_setting(tmp_path):
    def twelve():
        stored = RANDOM.integers(0, 4081, (8, 8))
        stored[0, :2] = 0, 4080
        return png(stored, 16)

    root = folder(tmp_path, twelve)
    found = {finding.code: finding for finding in ImageFolderData(root=root).report().findings}
    assert "values from 0 to 4080, and 0 to 65535 become 0 to 255, so 17 of 256 levels" in found["value-range"].text
    assert found["value-range"].level == "warning"
    assert "set value_range, such as [0, 4095]" in found["value-range"].text
    data = ImageFolderData(root=root, value_range=(0, 4095))
    assert "value-range" not in {finding.code for finding in data.report().findings}
    assert data.listing.splits["train"].source.read(0).unique().numel() > 40
    assert data.output_notes() == {"reading": {"value_range": [0, 4095]}}
    assert Reading.from_notes({"output": data.output_notes()}) == data.reading
    short = ImageFolderData(root=root, value_range=(0, 2000)).report().of("warning")
    assert any("values outside of it are cut" in finding.text for finding in short)
    assert list(data.identity()) != list(ImageFolderData(root=root).identity())


def test_the_doctor_recommends_a_colour_behind_transparent_images(tmp_path):
    root = folder(tmp_path, lambda: png(values(255, (8, 8, 4))))
    found = {finding.code: finding for finding in ImageFolderData(root=root).report().findings}
    assert (found["transparency"].level, "Set transparency to" in found["transparency"].text) == ("warning", True)
    data = ImageFolderData(root=root, transparency=(255, 255, 255), validation=0.5)
    found = {finding.code: finding for finding in data.report().findings}
    assert (found["transparency"].level, "laid on [255, 255, 255]" in found["transparency"].text) == ("fact", True)
    shown = data.listing.splits["train"].source.read(0)
    assert torch.equal(shown, read_image(data.listing.splits["train"].source.paths[0], reading=data.reading))
    assert not torch.equal(shown, read_image(data.listing.splits["train"].source.paths[0]))


# ------------------------------------------------------------------ sizes


def test_the_limit_on_pixels_is_a_setting_of_the_project(tmp_path, monkeypatch):
    root = folder(tmp_path, lambda: png(values(255, (20, 30))), count=1)
    data = ImageFolderData(root=root, max_pixels=500)
    found = {finding.code: finding for finding in data.report().findings}
    assert "30 x 20 = 600 pixels are more than max_pixels=500; raise it" in found["too-large-image"].line()
    with pytest.raises(DataError, match="600 pixels are more than max_pixels=500"):
        data.listing.splits["train"].source.read(0)
    monkeypatch.setattr("vispeft.data.facts.SETTLED", -1)
    assert not ImageFolderData(root=root, max_pixels=600).report().of("error")
    # Stored facts were found under a higher limit.
    assert {finding.code for finding in ImageFolderData(root=root, max_pixels=500).report().of("error")} == {
        "too-large-image"
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # of a band of rows
def test_pillow_s_own_limit_does_not_hold(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    stored = values(255, (900, 3))
    for content in (png(stored), tiff(stored), netpbm(stored, 255)):
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(content))
        assert look_at(io.BytesIO(content), full=True).problem == ""
        assert image_of(content).shape == (900, 3, 3)
        with pytest.raises(ValueError, match="max_pixels=2699"):
            read_codes(io.BytesIO(content), reading=Reading(max_pixels=2699))


# ------------------------------------------------------------------ masks of a data set


def mask_set(root, mask, image=None):
    image = image or (lambda: png(RANDOM.integers(0, 256, (8, 8, 3))))
    for split in ("train", "val", "test"):
        for kind, content in (("images", image), ("masks", mask)):
            (root / kind / split).mkdir(parents=True)
            for number in range(2):
                (root / kind / split / f"{number}.png").write_bytes(content())
    return {"root": str(root), "class_names": ["a", "b", "c"]}


def findings(data):
    return {finding.code: finding for finding in data.report().findings if finding.level != "fact"}


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_that_is_turned_without_its_mask_is_a_warning(tmp_path, orientation):
    settings = mask_set(
        tmp_path,
        lambda: png(RANDOM.integers(0, 3, (8, 8))),
        lambda: png(RANDOM.integers(0, 256, (8, 8, 3)), orientation=orientation),
    )
    for check in ("full", "fast"):
        found = findings(MaskFolderData(check=check, **settings))
        assert set(found) == {"mask-turned"}
        assert f"orientation 1, image {orientation}" in found["mask-turned"].line()
        assert len(found["mask-turned"].places) == 6


def test_a_mask_that_is_not_turned_with_its_oblong_image_has_the_reason_in_its_error(tmp_path):
    settings = mask_set(
        tmp_path,
        lambda: png(RANDOM.integers(0, 3, (8, 10))),
        lambda: png(RANDOM.integers(0, 256, (8, 10, 3)), orientation=6),
    )
    for check in ("full", "fast"):
        line = findings(MaskFolderData(check=check, **settings))["mask-size"].line()
        assert "10 x 8 for an image of 8 x 10, of which the metadata turn one" in line


def test_negative_codes_have_a_way_out_through_ids(tmp_path):
    def signed():
        stored = RANDOM.integers(0, 3, (8, 8)).astype(np.int16)
        stored[0, 0] = -100
        return tiff(stored, 16)

    settings = mask_set(tmp_path, signed)
    line = findings(MaskFolderData(**settings))["mask-values"].line()
    assert "-100 (6 files)" in line
    assert "ids may have negative values, such as -100: 255" in line
    data = MaskFolderData(ids={0: 0, 1: 1, 2: 2, -100: 255}, **settings)
    assert not findings(data)
    mask = data.listing.splits["train"].masks.read(0)
    assert mask[0, 0] == 255
    assert mask.flatten()[1:].max() == 2


def test_one_set_of_several_kinds_of_files_is_read_by_colour(tmp_path):
    palette = np.array([(255, 255, 255), (0, 0, 0), (220, 20, 60)])
    indices = np.arange(64).reshape(8, 8) % 3
    order = np.array([2, 0, 1])
    kinds = iter([png(palette[indices]), png(np.argsort(order)[indices], 8, palette=palette[order])] * 3)
    settings = mask_set(tmp_path, lambda: next(kinds))
    data = MaskFolderData(rgb_masks=True, palette=palette.tolist(), **settings)
    assert not data.report().of("error")
    for split in data.listing.splits.values():
        for number in range(2):
            assert np.array_equal(split.masks.read(number).numpy(), indices)
    # Another colour is an error, in words that fit files with a palette.
    (tmp_path / "masks/train/1.png").write_bytes(png(indices, 2, palette=np.array([(1, 2, 3), (0, 0, 0), (9, 9, 9)])))
    line = findings(MaskFolderData(rgb_masks=True, palette=palette.tolist(), **settings))["rgb-masks"].line()
    assert "by colour, with colours that stand for no class: (1, 2, 3), (9, 9, 9); add them to the palette" in line


def test_masks_in_which_zero_is_white_are_a_warning(tmp_path):
    settings = mask_set(tmp_path, lambda: tiff(RANDOM.integers(0, 3, (8, 8)), meaning=0))
    found = findings(MaskFolderData(**settings))
    assert set(found) == {"mask-white-zero"}
