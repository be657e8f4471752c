"""Folders of the cache: filled once, also by several processes, and without leftovers of killed ones."""

import threading

import pytest

from vispeft.data.made_once import make_once
from vispeft.errors import DataError, FileError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPEFT_CACHE", str(tmp_path))
    return tmp_path / "toys"


def make(write, part=b"1"):
    return make_once("toys", [part], write, "1 MB")


def fill(folder):
    (folder / "image").write_text("whole")


def test_a_folder_is_made_once_for_each_content(cache):
    calls = []
    for part in (b"1", b"1", b"2"):
        home = make(lambda folder: (calls.append(folder), fill(folder)), part)
        assert (home / "image").read_text() == "whole"
    assert len(calls) == 2
    assert len(list(cache.iterdir())) == 2  # without locks and unfinished folders


def test_an_error_leaves_nothing(cache):
    def refuse(folder):
        fill(folder)
        raise DataError("a damaged archive")

    def run_full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="a damaged archive"):
        make(refuse)
    with pytest.raises(FileError, match=r"No space left on device\)\. Set VISPEFT_CACHE .* 1 MB"):
        make(run_full)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("made", [False, True])
def test_leftovers_of_killed_processes_are_removed_by_the_next_call(cache, made):
    if made:
        make(fill)
    for name in (".making-abcd1234", ".making-0123"):
        (cache / name / "inner").mkdir(parents=True)
    (cache / ".lock").write_text("process 1 on elsewhere")
    home = make(fill)
    assert list(cache.iterdir()) == [home]


def test_a_folder_that_another_one_fills_is_left_alone_and_waited_for(cache):
    ready = make(fill, b"ready")
    began, end, calls = threading.Event(), threading.Event(), []

    def slowly(folder):
        calls.append(folder)
        (folder / "half").touch()
        began.set()
        end.wait(60)
        fill(folder)

    first, second = (threading.Thread(target=make, args=(slowly,)) for _ in range(2))
    first.start()
    assert began.wait(60)
    second.start()
    assert make(fill, b"ready") == ready
    assert (calls[0] / "half").exists()
    end.set()
    first.join()
    second.join()
    assert len(calls) == 1
    home = make(slowly)
    assert sorted(path.name for path in home.iterdir()) == ["half", "image"]
    assert sorted(cache.iterdir()) == sorted([home, ready])
