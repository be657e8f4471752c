import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vispeft.data.masks import IGNORE, MaskCoding, MaskFacts, MaskFiles, look_at_mask, read_codes, reduce_zero_label
from vispeft.data.palettes import class_table, make_palette
from vispeft.errors import ConfigError, DataError, UnknownNameError

INDICES = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)


def save(path, pixels, mode=None):
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.convert("P")
        image.putdata(pixels.ravel().tolist())
        image.putpalette([200, 10, 10] * 256)  # equal colours: only the indices tell classes apart
    image.save(path)
    return path


def save_small(path, rows, bits):
    """Write a grey PNG of few bits, which Pillow reads and does not write."""
    packed = b""
    for row in rows:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        packed += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")

    def chunk(kind, content):
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(packed)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_indices_are_read_as_they_were_written_whatever_the_kind_of_file(tmp_path):
    deep = INDICES.astype(np.uint16) * 200
    assert np.array_equal(read_codes(save(tmp_path / "p.png", INDICES, "P")), INDICES)
    assert np.array_equal(read_codes(save(tmp_path / "l.png", INDICES)), INDICES)
    assert np.array_equal(read_codes(save(tmp_path / "deep.png", deep)), deep)
    black_and_white = np.array([[True, False]])
    assert read_codes(save(tmp_path / "1.png", black_and_white)).tolist() == [[1, 0]]
    colours = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(read_codes(save(tmp_path / "rgb.png", colours)), colours)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_files_of_few_bits_are_not_stretched_to_255(tmp_path, bits):
    rows = [list(range(2**bits)), list(reversed(range(2**bits)))]
    assert read_codes(save_small(tmp_path / "small.png", rows, bits)).tolist() == rows


def test_zero_label_is_taken_out_as_in_mmsegmentation():
    mask = torch.tensor([0, 1, 2, 150, 255])
    expected = mask.clone()  # the three steps of mmseg/datasets/transforms/loading.py
    expected[expected == 0] = 255
    expected = expected - 1
    expected[expected == 254] = 255
    assert reduce_zero_label(mask).tolist() == expected.tolist() == [255, 0, 1, 149, 255]
    assert reduce_zero_label(mask.to(torch.uint8)).tolist() == expected.tolist()


def test_values_are_looked_up():
    plain = MaskCoding(num_classes=4)
    assert plain.decode(INDICES, "it").tolist() == INDICES.tolist()
    assert MaskCoding(num_classes=3, reduce_zero_label=True).decode(INDICES, "it").tolist() == [
        [IGNORE, 0, 1],
        [2, IGNORE, 0],
    ]
    swapped = MaskCoding(num_classes=2, ids={0: 1, 1: 0, 2: 255, 3: 1})
    assert swapped.decode(INDICES, "it").tolist() == [[1, 0, IGNORE], [1, IGNORE, 0]]
    thousands = MaskCoding(num_classes=2, ids={0: 0, 40_000: 1})
    assert thousands.decode(np.array([[40_000, 0]], np.uint16), "it").tolist() == [[1, 0]]
    assert MaskCoding(num_classes=2, ids={0: 0, 255: 1}).decode(np.array([[255]], np.uint8), "it").item() == 1
    most = MaskCoding(num_classes=255, reduce_zero_label=True)
    assert most.decode(np.array([[0, 254, 255]], np.uint8), "it").tolist() == [[255, 253, 255]]


def test_ids_and_a_zero_label_together_are_refused():
    """The classes in ids were lowered by one, so the first was dropped and the last never occurred."""
    with pytest.raises(ConfigError, match="Write 0: 255 into ids and leave reduce_zero_label out"):
        MaskCoding(num_classes=3, ids={0: 255, 1: 0, 2: 1, 3: 2}, reduce_zero_label=True)


def test_colours_are_looked_up_and_strange_ones_named():
    red, blue = (255, 0, 0), (0, 0, 255)
    coding = MaskCoding(num_classes=2, colours=(blue, red))
    assert coding.decode(np.array([[red, blue]], np.uint8), "it").tolist() == [[1, 0]]
    with pytest.raises(DataError, match=r"it has \(9, 8, 7\), which stands for none of the 2 classes"):
        coding.decode(np.array([[red, (9, 8, 7)]], np.uint8), "it")
    with pytest.raises(DataError, match="value 3"):
        MaskCoding(num_classes=3).decode(INDICES, "it")
    with pytest.raises(DataError, match="value -1"):
        MaskCoding(num_classes=3).decode(np.array([[-1]], np.int32), "it")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_classes": 256}, "1 to 255 are possible"),
        ({"num_classes": 2, "ids": {0: 2}}, "classes 0 to 1 or 255"),
        ({"num_classes": 2, "ids": {2**32: 0}}, "values -2147483648 to 4294967295"),
        ({"num_classes": 2, "colours": ((1, 2, 3), (1, 2, 3))}, "Two classes have the colour"),
    ],
)
def test_codings_that_cannot_work_are_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        MaskCoding(**fields)


def test_a_mask_is_described(tmp_path):
    path = save(tmp_path / "p.png", INDICES, "P")
    with path.open("rb") as file:
        known = look_at_mask(file, full=True).read_with(MaskCoding(num_classes=3))
    assert (known.width, known.height, known.mode, known.problem) == (3, 2, "P", "")
    assert known.classes == {1: 2, 0: 1, 2: 1, IGNORE: 1}
    assert known.outside == [(3, 1)]
    whole = save(tmp_path / "noise.png", np.random.default_rng(0).integers(0, 3, (99, 99), np.uint8)).read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no mask")
    (tmp_path / "empty.png").touch()
    places = [tmp_path / name for name in ("short.png", "text.png", "empty.png", "gone.png")]
    masks = MaskFiles(places, tmp_path, MaskCoding(num_classes=3))
    assert [known.problem for known in masks.facts(full=True)] == ["truncated", "broken", "empty", "missing"]
    assert masks.facts(full=False)[0].width == 99
    with pytest.raises(DataError, match=r"text.png cannot be read as a mask"):
        masks.read(1)


def test_what_is_known_is_kept_on_disk_whatever_the_classes(tmp_path, monkeypatch):
    path = save(tmp_path / "l.png", INDICES)
    monkeypatch.setattr("vispeft.data.facts.SETTLED", -1)
    first = MaskFiles([path], tmp_path, MaskCoding(num_classes=4)).facts(full=True)
    monkeypatch.setattr("vispeft.data.masks.look_at_mask", lambda *given: pytest.fail("looked again"))
    again = MaskFiles([path], tmp_path, MaskCoding(num_classes=3)).facts(full=True)
    assert isinstance(again[0], MaskFacts)
    assert first[0].digest == again[0].digest
    assert (first[0].outside, again[0].outside) == ([], [(3, 1)])


def test_published_classes():
    ade = class_table("ade20k")
    assert (len(ade.class_names), ade.class_names[0], ade.class_names[7], ade.palette[0]) == (
        150,
        "wall",
        "bed",
        (120, 120, 120),
    )
    assert {name: len(class_table(name).palette) for name in ("voc", "cityscapes", "pascal_context")} == {
        "voc": 21,
        "cityscapes": 19,
        "pascal_context": 60,
    }
    # The colours of PASCAL VOC are both: a table in mmsegmentation, and a rule in the development kit.
    assert class_table("voc").palette == make_palette(21)
    with pytest.raises(UnknownNameError, match="Did you mean 'cityscapes'"):
        class_table("cityscape")
