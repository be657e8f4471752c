"""Made and damaged image files: read right against the numbers they were made of, or refused with one of our errors.

``FUZZ_CASES=2000 pytest tests/fuzz`` tries more of them.
"""

import io
import os
import resource
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.made import netpbm, png, tiff
from tests.data.test_pixels import TURNS
from vispeft.data import read_image
from vispeft.data.facts import look_at
from vispeft.data.images import Reading, read_size
from vispeft.errors import DataError

CASES = int(os.environ.get("FUZZ_CASES", "150"))
SECONDS, BYTES = 2.0, 200 * 2**20
"""Longest time of a case, and largest growth of the process."""

SAVED = {
    "JPEG": ("RGB", "CMYK", "L"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "1", "P"),
    "WEBP": ("RGB", "RGBA"),
    "PNG": ("P", "LA"),
    "TIFF": ("CMYK", "LAB", "YCbCr", "F", "I", "PA"),
}
"""Formats that Pillow writes, and modes of each."""
READINGS = (Reading(), Reading(transparency=(9, 8, 7)), Reading(value_range=(0, 100)), Reading(max_pixels=50))

cases = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says much about damaged files


def peak():
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def attempt(action, *refusals):
    """Run an action that may refuse its input, within time and memory; a refusal gives None."""
    before, start = peak(), time.process_time()
    try:
        return action()
    except refusals:
        return None
    finally:
        assert time.process_time() - start < SECONDS
        assert peak() - before < BYTES


@st.composite
def grey(draw):
    """A grey file, its values, the largest there can be, whether 0 is white, and its orientation."""
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["png", "tiff", "netpbm"]))
    if kind == "netpbm":
        white = draw(st.sampled_from([1, 2, 15, 99, 255, 256, 4095, 65_535]))
        stored = random.integers(0, white + 1, shape)
        return netpbm(stored, white, plain=draw(st.booleans())), stored, white, white == 1, 1
    bits, orientation = draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.integers(1, 8))
    stored = random.integers(0, 2**bits, shape)
    if kind == "png":
        content = png(stored, bits, orientation=orientation, late=draw(st.booleans()))
        return content, stored, 2**bits - 1, False, orientation
    meaning = draw(st.integers(0, 1))
    layout = {"order": draw(st.sampled_from("<>")), "packing": draw(st.sampled_from([1, 8])), "meaning": meaning}
    content = tiff(stored, bits, tags=((274, orientation),), **layout)
    return content, stored, 2**bits - 1, meaning == 0, orientation


@st.composite
def coloured(draw):
    """A file with colours, and the colours."""
    bits, bands = draw(st.sampled_from([8, 16])), draw(st.sampled_from([3, 3, 4]))
    shape = (*draw(st.tuples(st.integers(1, 12), st.integers(1, 12))), bands)
    stored = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2**bits, shape)
    kind = draw(st.sampled_from(["png", "tiff", "netpbm"]))
    if kind == "png":
        content = png(stored, bits)
    elif kind == "netpbm":
        content = netpbm(stored[..., :3], 2**bits - 1, plain=draw(st.booleans()))
    else:
        extra = (2,) if bands == 4 else ()
        apart = bands == 3 and draw(st.booleans())
        content = tiff(stored, bits, meaning=2, extra=extra, order=draw(st.sampled_from("<>")), apart=apart)
    return content, stored[..., :3] >> (bits - 8)


@st.composite
def saved(draw):
    """A file of one of the formats that Pillow writes."""
    kind, mode = draw(st.sampled_from([(kind, mode) for kind, modes in SAVED.items() for mode in modes]))
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    bands = len(Image.new(mode, (1, 1)).getbands()) * (4 if mode in ("F", "I") else 1)
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, shape[0] * shape[1] * bands, np.uint8)
    file = io.BytesIO()
    Image.frombytes(mode, shape, values.tobytes()[: len(Image.new(mode, shape).tobytes())]).save(file, kind)
    return file.getvalue()


@st.composite
def damaged(draw, files):
    """A file that was cut short, or of which some bytes were changed, most of them in its header."""
    content = bytearray(draw(files))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.one_of(st.integers(0, min(64, len(content)) - 1), st.integers(0, len(content) - 1)))
        new = draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0"])))
        content[place : place + len(new)] = new
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


@cases
@given(grey())
def test_grey_files_are_read_right(case):
    content, stored, white, inverted, orientation = case
    found = attempt(lambda: read_image(io.BytesIO(content)))
    expected = stored >> 8 if white == 65_535 else (stored * 255 + white // 2) // white
    turned = TURNS.get(orientation, np.asarray)(255 - expected if inverted else expected)
    assert np.array_equal(found.numpy(), np.repeat(turned[None], 3, 0))
    assert read_size(io.BytesIO(content)) == turned.shape


@cases
@given(coloured())
def test_colours_are_read_right(case):
    content, expected = case
    assert np.array_equal(attempt(lambda: read_image(io.BytesIO(content))).permute(1, 2, 0).numpy(), expected)


@cases
@given(
    damaged(st.one_of(grey().map(lambda case: case[0]), coloured().map(lambda case: case[0]), saved())),
    st.sampled_from(
        [Reading(), Reading(transparency=(9, 8, 7)), Reading(value_range=(0, 100)), Reading(max_pixels=50)]
    ),
)
def test_damaged_files_are_read_or_refused(content, reading):
    found = attempt(lambda: read_image(io.BytesIO(content), "it", reading), DataError)
    if found is not None:
        assert (found.shape[0], str(found.dtype)) == (3, "torch.uint8")
        assert found.shape[1] * found.shape[2] <= reading.max_pixels
    fast, full = (attempt(lambda full=full: look_at(io.BytesIO(content), full, reading)) for full in (False, True))
    assert bool(full.problem) == (found is None)
    if found is not None:
        assert full.upright == fast.upright == found.shape[:0:-1]
        assert full.digest
