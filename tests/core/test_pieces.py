"""Work in pieces: what may be gone on with, and what another piece of work finds in its folder."""

import pytest

from vispeft.errors import ConfigError, FileError
from vispeft.storage.locks import InUseError, hold
from vispeft.storage.pieces import PARTS, PLAN, Pieces


def pieces(tmp_path, **plan):
    return Pieces(place=tmp_path / "work", what="thing", plan={"size": 4, "names": ["a", "b"], **plan}, ending=".bin")


def nothing():
    """The work is not finished."""


def begin(work, *starts):
    with work.held(nothing):
        for start in starts:
            work.write(start, b"piece")


def left(work):
    return sorted(str(path.relative_to(work.place)) for path in work.place.rglob("*"))


def test_the_same_work_goes_on_and_other_work_is_refused(tmp_path):
    begin(pieces(tmp_path), 0, 4)
    begin(pieces(tmp_path), 8)
    assert [pieces(tmp_path).path(start).read_bytes() for start in (0, 4, 8)] == [b"piece"] * 3
    with pytest.raises(ConfigError, match=r"unfinished thing, which was begun with other settings \(size, names\)"):
        begin(pieces(tmp_path, size=5, names=["a"]))
    (tmp_path / "work" / PLAN).write_bytes(b"{")
    with pytest.raises(FileError, match="cannot be read"):
        begin(pieces(tmp_path))


def test_other_work_may_begin_where_there_is_no_piece_yet(tmp_path):
    begin(pieces(tmp_path))
    (tmp_path / "work" / PARTS / ".000000000.bin.part").write_bytes(b"half")
    other = pieces(tmp_path, size=5)
    begin(other, 0)
    with pytest.raises(ConfigError, match="begun with other settings"):
        begin(pieces(tmp_path))
    assert left(other) == [PARTS, f"{PARTS}/000000000.bin", PLAN]


def test_behind_a_kill_the_same_work_alone_is_cleared_up(tmp_path):
    work = pieces(tmp_path)
    begin(work, 0)
    pieces(tmp_path, size=5).clear_behind_a_kill()
    assert left(work) == [PARTS, f"{PARTS}/000000000.bin", PLAN]
    with hold(work.place / ".lock", "it"):
        work.clear_behind_a_kill()
        assert work.path(0).exists()
        with pytest.raises(InUseError, match=r"thing .* is in use"):
            begin(work)
    work.clear_behind_a_kill()
    assert left(work) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "work").write_bytes(b"")
    with pytest.raises(FileError, match=r"--out is .*work, where nothing can be written"):
        begin(pieces(tmp_path))
