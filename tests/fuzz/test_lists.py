"""Hostile label lists and folder trees: read right, or refused with one of our errors, quickly and without a trace.

``FUZZ_CASES=2000 pytest tests/fuzz`` tries more of them.
"""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.data.published import Painter
from vispeft.data import ImageFolderData, ImageListData, JsonData, MaskFolderData, find_images
from vispeft.data.trees import EXTENSIONS
from vispeft.errors import VispeftError

CASES = int(os.environ.get("FUZZ_CASES", "25"))
SECONDS = 2.0
"""Longest time a case may take."""

cases = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
numbers = itertools.count()


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with the photos that lists name; each case gets a folder of its own inside."""
    folder = tmp_path_factory.mktemp("outside")
    for number in range(6):
        Painter(number).paint(folder / f"photos/{number}.jpg")
    return folder


def shot(folder):
    """Everything in a folder: names, kinds, sizes, times."""
    found = {}
    for place, _, names in os.walk(os.fsencode(folder)):
        for name in names:
            status = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = status.st_mode, status.st_size, status.st_mtime_ns
    return found


def attempt(outside, action):
    """Run an action that may refuse its input; nothing may change on the disk, and it may not take long."""
    before, start = shot(outside), time.process_time()
    try:
        return action()
    except VispeftError:
        return None
    finally:
        assert time.process_time() - start < SECONDS
        assert shot(outside) == before


# ------------------------------------------------------------------ lists

odd_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
odd_names = st.one_of(
    odd_text,
    st.sampled_from(["", ".", "..", "/etc/passwd", "../x.jpg", "C:\\x.jpg", "\\\\a\\b.jpg", "a/../../b.jpg", "photos"]),
    st.sampled_from([f"photos/{number}.jpg" for number in range(6)]),
)
odd_labels = st.one_of(
    odd_text,
    st.integers(-3, 9).map(str),
    st.sampled_from(
        ["", "-", "nan", "1e5", "²", "9" * 5000, "1,2", "0.5", "[b]", "\ud800".encode(errors="replace").decode()]
    ),
)
odd_lines = st.tuples(odd_names, st.sampled_from([" ", "\t", ",", ";", "  ", ""]), odd_labels).map("".join)
odd_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["\ud800", 10**400])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=6,
)


def inspect(data):
    """List and check data; the images must lie in the root and have a target each."""
    report = data.report()
    for split in report.listing.splits.values():
        assert len(split.source) == len(split.targets)
        for path in split.source.paths:
            assert os.path.normpath(path).startswith(os.path.normpath(data.root))
    for finding in report.findings:
        finding.line().encode()
    return report


@cases
@given(
    content=st.one_of(
        st.lists(odd_lines, max_size=12).map(lambda lines: "\n".join(lines).encode()), st.binary(max_size=80)
    ),
    ending=st.sampled_from([".txt", ".csv"]),
    target=st.sampled_from(["class", "multilabel", "regression"]),
)
@example(content=b'photos/0.jpg "\n"photos/1.jpg 1\n""', ending=".txt", target="class")
@example(content=b"photos/0.jpg\0 1", ending=".txt", target="class")
def test_text_lists(outside, content, ending, target):
    path = outside / f"list{ending}"
    path.write_bytes(content)
    attempt(outside, lambda: inspect(ImageListData(train_list=str(path), target=target)))


@cases
@given(
    pairs=st.lists(st.tuples(odd_names, odd_values), max_size=8),
    target=st.sampled_from(["class", "multilabel", "regression"]),
)
def test_json_lists(outside, pairs, target):
    body = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs)
    path = outside / "list.json"
    path.write_text(f"{{{body}}}")
    attempt(outside, lambda: inspect(JsonData(train_list=str(path), target=target)))


plain = st.text("abcXYZ019_-.é", min_size=1, max_size=6).map(lambda text: f"x{text}x")


@cases
@given(
    labels=st.dictionaries(plain, plain, min_size=2, max_size=6),
    separator=st.sampled_from([" ", "\t", ",", ", ", ";"]),
    quoted=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    frame=st.sampled_from([("", ""), ("\ufeff", ""), ("# mine\n\n", "\n\n"), ("path,label\n", "")]),
)
def test_lists_of_any_usual_form_are_read_right(outside, labels, separator, quoted, end, frame):
    mark = '"' if quoted else ""
    lines = (f"{mark}photos/{name}.jpg{mark}{separator}{mark}{label}{mark}" for name, label in labels.items())
    path = outside / "list.txt"
    path.write_text(frame[0] + end.join(lines) + frame[1], encoding="utf-8", newline="")
    listing = ImageListData(train_list=str(path)).read()
    split = listing.splits["train"]
    found = {
        Path(p).stem: listing.class_names[i] for p, i in zip(split.source.paths, split.targets.tolist(), strict=True)
    }
    assert found == labels


# ------------------------------------------------------------------ trees

FOLDERS = (
    "train",
    "val",
    "valid",
    "test",
    "cat",
    "dog",
    "images",
    "masks",
    ".hidden",
    "__MACOSX",
    "x.jpg",
    "new\nline",
    b"caf\xe9",
)
FILES = ("1.jpg", "2.png", "3.jfif", "._1.jpg", "notes.txt", b"\xe9.png", "4.PNG")
LINKS = (".", "..", "../..", "cat", "gone.jpg", "1.jpg", "self.jpg", "/dev/zero", "/dev/null")

folders = st.lists(st.sampled_from(FOLDERS), min_size=0, max_size=3).map(lambda parts: [os.fsencode(p) for p in parts])
entries = st.lists(
    st.tuples(folders, st.sampled_from(FILES).map(os.fsencode), st.sampled_from(["image", "text", "empty", "pipe"])),
    max_size=14,
)
links = st.lists(st.tuples(folders, st.sampled_from(["self.jpg", "more", "test"]), st.sampled_from(LINKS)), max_size=4)


def build(root, photo, entries, links):
    """Make a tree; what does not fit to what is there already is left out of it."""
    os.makedirs(root)
    for folder, name, kind in entries:
        place = os.path.join(os.fsencode(root), *folder)
        try:
            os.makedirs(place, exist_ok=True)
            if kind == "pipe":
                os.mkfifo(os.path.join(place, name))
            elif not os.path.exists(os.path.join(place, name)):
                with open(os.path.join(place, name), "xb") as file:
                    file.write({"image": photo, "text": b"text", "empty": b""}[kind])
        except (FileExistsError, NotADirectoryError):
            continue
    for folder, name, target in links:
        place = os.path.join(os.fsencode(root), *folder)
        if os.path.isdir(place) and not os.path.lexists(os.path.join(place, name.encode())):
            os.symlink(target.encode(), os.path.join(place, name.encode()))


def reachable(root):
    """The image files below a folder, by their real paths; found in another way than by the readers."""
    above = {os.path.realpath(path) for path in (root, *Path(root).parents)}
    seen, found, waiting = set(), set(), [os.path.realpath(root)]
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        for name in os.listdir(place):
            path = os.path.realpath(os.path.join(place, name))
            if name.startswith(".") or name == "__MACOSX":
                continue
            if os.path.isdir(path) and path not in above:
                waiting.append(path)
            elif os.path.isfile(path) and os.path.splitext(name)[1].lower() in EXTENSIONS:
                found.add(path)
    return found


@cases
@given(entries=entries, links=links)
def test_trees(outside, entries, links):
    root = outside / f"tree{next(numbers)}"
    build(root, (outside / "photos/0.jpg").read_bytes(), entries, links)
    try:
        found = attempt(outside, lambda: find_images(root))
        real = {os.path.realpath(path) for path in found or () if os.path.exists(path)}
        assert real == reachable(root)
        attempt(outside, lambda: inspect(ImageFolderData(root=str(root))))
        attempt(outside, lambda: inspect(MaskFolderData(root=str(root), class_names=["a", "b"])))
    finally:
        shutil.rmtree(os.fsencode(root))
