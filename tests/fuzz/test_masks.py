"""Made and damaged mask files: read right against the numbers they were made of, or refused.

``FUZZ_CASES=2000 pytest tests/fuzz`` tries more of them.
"""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.data.made import png, tiff
from tests.data.test_pixels import TURNS
from tests.fuzz.test_images import attempt, cases, coloured, damaged, grey, saved
from vispeft.data.images import UNREADABLE
from vispeft.data.masks import IGNORE, MaskCoding, MaskFiles, look_at_mask, read_codes
from vispeft.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says much about damaged files


@st.composite
def indexed(draw):
    """A file with a palette of different colours, its indices, and the colours."""
    bits, shape = draw(st.sampled_from([1, 2, 4, 8])), draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    palette = np.stack([random.permutation(256)[: 2**bits]] * 3, -1).astype(np.uint8)
    palette[:, 1] = random.integers(0, 256, 2**bits)
    stored = random.integers(0, 2**bits, shape)
    kind = draw(st.sampled_from(["png", "tiff", "gif", "bmp"]))
    if kind in ("gif", "bmp"):
        image, file = Image.fromarray(stored.astype(np.uint8)), io.BytesIO()
        image.putpalette(palette.tobytes())
        # Pillow leaves out unused colours and sorts the others unless it is told not to.
        image.save(file, kind, **({"optimize": False} if kind == "gif" else {}))
        content = file.getvalue()
    else:
        content = (png if kind == "png" else lambda *given, **more: tiff(*given, meaning=3, **more))(
            stored, bits, palette=palette
        )
    return content, stored, palette


@cases
@given(grey())
def test_grey_masks_are_read_as_they_are_stored(case):
    content, stored, white, inverted, orientation = case
    turn = TURNS.get(orientation, np.asarray)
    assert np.array_equal(attempt(lambda: read_codes(io.BytesIO(content))), turn(stored))
    known = attempt(lambda: look_at_mask(io.BytesIO(content), True))
    assert sum(pixels for _, pixels in known.codes) == stored.size
    assert known.white_is_zero == inverted
    if white <= 255:
        shades = (stored * 255 + white // 2) // white
        shades = turn(255 - shades if inverted else shades)
        assert np.array_equal(read_codes(io.BytesIO(content), True), np.repeat(shades[..., None], 3, 2))


@cases
@given(indexed())
def test_palettes_are_read_by_index_and_by_colour(case):
    content, stored, palette = case
    assert np.array_equal(attempt(lambda: read_codes(io.BytesIO(content))), stored)
    assert np.array_equal(attempt(lambda: read_codes(io.BytesIO(content), True)), palette[stored])


@cases
@given(
    damaged(
        st.one_of(*(files().map(lambda case: case[0]) for files in (grey, coloured, indexed)), saved()),
    ),
    st.booleans(),
)
def test_damaged_masks_are_read_or_refused(content, by_colour):
    found = attempt(lambda: read_codes(io.BytesIO(content), by_colour), *UNREADABLE)
    known = attempt(lambda: look_at_mask(io.BytesIO(content), True, by_colour))
    assert bool(known.problem) == (found is None)
    if found is None:
        return
    assert found.ndim == 3 or (found.ndim == 2 and not by_colour)
    assert known.upright == found.shape[1::-1]
    assert sum(pixels for _, pixels in known.codes) + known.more >= min(1, found.size)
    coding = MaskCoding(num_classes=2, colours=((0, 0, 0), (255, 255, 255)) if by_colour else None)
    mask = attempt(lambda: coding.decode(found, "it"), DataError)
    assert mask is None or set(mask.unique().tolist()) <= {0, 1, IGNORE}
    assert (mask is None) == bool(known.read_with(coding).outside or known.more)


@cases
@given(
    st.dictionaries(st.integers(-(2**33), 2**33) | st.integers(-3, 3), st.sampled_from([0, 1, 2, IGNORE]), max_size=4),
    st.sampled_from(["i1", "u1", "i2", "u2", "i4", "u4"]),
)
def test_any_value_may_stand_for_a_class(tmp_path_factory, ids, kind):
    coding = attempt(lambda: MaskCoding(num_classes=2, ids=ids), ConfigError)
    if coding is None:
        return
    dtype = np.dtype(kind)
    inside = [value for value in ids if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max]
    if not inside:
        return
    path = tmp_path_factory.getbasetemp() / "mask.tif"
    path.write_bytes(tiff(np.array([inside], dtype), 8 * dtype.itemsize))
    found = MaskFiles([path], path.parent, coding).read(0)[0].tolist()
    assert found == [ids[value] for value in inside]
