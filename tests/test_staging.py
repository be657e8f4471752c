"""Files that appear whole or not at all, and locks, with processes that are killed between any two steps."""

import os
import signal

import pytest

from vispeft.errors import ConfigError, FileError
from vispeft.interop import staging
from vispeft.interop.staging import check_free, staged
from vispeft.storage import locks
from vispeft.storage.locks import InUseError, hold


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, content="new"):
    with staged(folder / "a.pt2", folder / "a.json") as place:
        place.write_text(content)
        place.with_suffix(".json").write_text(content)


def in_a_child(do):
    """Run a function in a process that is killed where the function ends."""
    child = os.fork()
    if child == 0:
        try:
            do()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def killed_after(folder, moves):
    """Write in a process that is killed after it has moved so many files."""

    def do():
        replace, left = staging.Path.replace, [moves]

        def counted(self, target):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return replace(self, target)

        staging.Path.replace = counted
        write(folder, "half")

    in_a_child(do)


@pytest.mark.parametrize("moves", [0, 1])
def test_half_a_pair_of_a_killed_process_is_in_nobodys_way(tmp_path, moves):
    killed_after(tmp_path, moves)
    assert len([name for name in names(tmp_path) if not name.startswith(".")]) == moves
    check_free(tmp_path / "a.pt2", tmp_path / "a.json")
    write(tmp_path)
    assert names(tmp_path) == ["a.json", "a.pt2"]
    assert (tmp_path / "a.pt2").read_text() == (tmp_path / "a.json").read_text() == "new"


def test_a_whole_pair_of_a_killed_process_stays(tmp_path):
    killed_after(tmp_path, 2)
    with pytest.raises(ConfigError, match="exists already"):
        write(tmp_path)
    assert names(tmp_path) == ["a.json", "a.pt2"]
    assert (tmp_path / "a.pt2").read_text() == "half"


def test_the_lock_of_a_process_that_was_killed_behind_its_last_file_goes(tmp_path):
    in_a_child(lambda: hold(tmp_path / ".a.pt2.lock", "The file").__enter__())
    (tmp_path / "a.pt2").write_text("whole")
    with pytest.raises(ConfigError, match="exists already"):
        check_free(tmp_path / "a.pt2", tmp_path / "a.json")
    assert names(tmp_path) == ["a.pt2"]


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(FileError, match=r"could not be written \(File name too long\)"):
        check_free(tmp_path / ("a" * 300 + ".pt2"))


def test_a_file_of_somebody_elses_is_not_taken_back(tmp_path):
    killed_after(tmp_path, 1)
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"a\.json exists already"):
        check_free(tmp_path / "a.pt2", tmp_path / "a.json")
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "mine"


def test_temporary_files_of_earlier_versions_go_and_others_stay(tmp_path):
    for name in (".a.pt2.x1y2z3_4", ".b.pt2.x1y2z3_4", ".a.pt2.notes"):
        (tmp_path / name).touch()
    for folder, content in ((".a.pt2.abcdefgh", "a.pt2"), (".a.pt2.original", "notes.txt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / content).touch()
    write(tmp_path)
    assert names(tmp_path) == [".a.pt2.notes", ".a.pt2.original", ".b.pt2.x1y2z3_4", "a.json", "a.pt2"]


def test_an_error_or_a_stop_leaves_nothing(tmp_path):
    def stop(error):
        with staged(tmp_path / "a.pt2") as place:
            place.write_text("half")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            stop(error)
    assert names(tmp_path) == []


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path):
    lock = tmp_path / ".lock"
    with hold(lock, "The cache") as waited:
        assert not waited
        with pytest.raises(InUseError, match="The cache is in use by another thread"), hold(lock, "The cache"):
            pass

        def try_it():
            locks._held.clear()  # what another process would know
            try:
                with hold(lock, "The cache"):
                    pass
            except InUseError as error:
                (tmp_path / "said").write_text(str(error))

        in_a_child(try_it)
    assert f"in use by process {os.getpid()} on" in (tmp_path / "said").read_text()

    def die():
        with hold(lock, "The cache"):
            os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(die)
    assert lock.exists()
    with hold(lock, "The cache"):
        assert lock.exists()
    assert not lock.exists()
    with pytest.raises(FileError, match="cannot be locked"), hold(tmp_path / "none/.lock", "The cache"):
        pass


def test_a_lock_can_be_waited_for(tmp_path):
    lock = tmp_path / ".lock"
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        with hold(lock, "The cache"):
            os.write(go, b"x")
            locks.time.sleep(0.3)
            (tmp_path / "done").touch()
        os._exit(0)
    os.read(ready, 1)
    with hold(lock, "The cache", wait=True) as waited:
        assert waited
        assert (tmp_path / "done").exists()
    os.waitpid(child, 0)


def test_a_lock_is_never_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keys")
    (tmp_path / ".lock").symlink_to(precious)
    with pytest.raises(FileError, match="cannot be locked"), hold(tmp_path / ".lock", "The run"):
        pass
    assert precious.read_text() == "keys"
