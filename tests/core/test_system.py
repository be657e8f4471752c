"""Saves and locks on a system without POSIX calls, on drives without hard links, and under two names of one folder."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vispeft.errors import FileError
from vispeft.storage import system
from vispeft.storage.disk import earlier, settle, write_atomically
from vispeft.storage.leftovers import finish_save
from vispeft.storage.locks import InUseError, hold


class Windows:
    """Its rules: an open file stays where it is, and a locked byte belongs to one opening."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened: dict[int, str] = {}
        self.locked: dict[str, int] = {}
        self.real = {name: getattr(os, name) for name in ("open", "close", "replace", "unlink")}
        patch.setattr(system, "fcntl", None)
        patch.setattr(system, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=self.locking))
        for name in ("open", "close", "replace", "unlink"):
            patch.setattr(os, name, getattr(self, name))
        for name in ("fchmod", "pread", "O_NOFOLLOW", "O_CLOEXEC"):
            patch.delattr(os, name)
        patch.setattr(os, "O_BINARY", 0, raising=False)

    def open(self, path: Any, *rest: Any, **more: Any) -> int:
        descriptor = self.real["open"](path, *rest, **more)
        self.opened[descriptor] = os.path.abspath(path)
        return descriptor

    def close(self, descriptor: int) -> None:
        path = self.opened.pop(descriptor, "")
        if self.locked.get(path) == descriptor:
            del self.locked[path]
        self.real["close"](descriptor)

    def refuse_open(self, *paths: Any) -> None:
        for path in paths:
            if os.path.abspath(path) in self.opened.values():
                raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))

    def replace(self, source: Any, target: Any, **more: Any) -> None:
        self.refuse_open(source, target)
        self.real["replace"](source, target, **more)

    def unlink(self, path: Any, **more: Any) -> None:
        self.refuse_open(path)
        self.real["unlink"](path, **more)

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        assert mode == 2
        assert count == 1
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > 2**20  # a locked byte cannot be read
        if self.locked.setdefault(self.opened[descriptor], descriptor) != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Windows:
    return Windows(monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def no_links(*_: Any) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_files_are_saved_where_open_ones_cannot_be_renamed(windows: Windows, tmp_path: Path) -> None:
    for text in (b"1\n", b"2\r\n\x1a"):
        write_atomically({tmp_path / "a": text, tmp_path / "b": text + b"b"})
        assert contents(tmp_path) == {"a": text, "b": text + b"b"}
    assert not windows.opened


def test_a_save_that_fails_is_undone_there_as_well(windows: Windows, tmp_path: Path) -> None:
    write_atomically({tmp_path / "a": b"1", tmp_path / "b": b"1"})
    with open(tmp_path / "b", "rb") as file:
        windows.opened[file.fileno()] = str(tmp_path / "b")  # a program shows the file
        with pytest.raises(FileError, match="cannot access"):
            write_atomically({tmp_path / "a": b"2", tmp_path / "b": b"2", tmp_path / "c": b"2"})
    assert contents(tmp_path)["a"] == contents(tmp_path)["b"] == b"1"
    windows.opened.clear()
    write_atomically({tmp_path / "a": b"3", tmp_path / "b": b"3"})
    assert contents(tmp_path) == {"a": b"3", "b": b"3"}


def test_a_save_waits_for_another_one_there(windows: Windows, tmp_path: Path) -> None:
    other = system.open_file(tmp_path / ".a.part")
    system.lock_opened(other)
    thread = threading.Thread(target=write_atomically, args=({tmp_path / "a": b"1"},))
    thread.start()
    thread.join(0.1)
    assert not (tmp_path / "a").exists()
    os.close(other)
    thread.join(10)
    assert contents(tmp_path) == {"a": b"1"}


def test_a_lock_there_keeps_others_out_and_goes(windows: Windows, tmp_path: Path) -> None:
    with hold(tmp_path / ".lock", "The folder"):
        other = system.open_file(tmp_path / ".lock")
        with pytest.raises(BlockingIOError):
            system.lock_process(other)
        os.close(other)
    assert contents(tmp_path) == {}
    other = system.open_file(tmp_path / ".lock")
    system.lock_process(other)
    os.write(other, b"process 7")
    with pytest.raises(InUseError, match="in use by process 7"), hold(tmp_path / ".lock", "The folder"):
        pass
    os.close(other)
    with hold(tmp_path / ".lock", "The folder"):
        pass
    assert contents(tmp_path) == {}


def test_a_system_without_any_locks_saves(
    windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(system, "msvcrt", None)
    write_atomically({tmp_path / "a": b"1"})
    with hold(tmp_path / ".lock", "The folder"):
        assert "cannot be locked here (this system has no locks)" in caplog.text
    assert contents(tmp_path) == {"a": b"1"}


def test_drives_without_hard_links_take_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On exFAT the first save worked, and every later one was refused."""
    monkeypatch.setattr(os, "link", no_links)
    write_atomically({tmp_path / "a": b"1", tmp_path / "b": b"1"})
    write_atomically({tmp_path / "a": b"2", tmp_path / "b": b"2"})
    assert contents(tmp_path) == {"a": b"2", "b": b"2"}
    full = OSError(errno.ENOSPC, "No space left on device")

    def cut_off(source: Path, target: Path) -> None:
        target.write_bytes(b"")
        raise full

    monkeypatch.setattr("shutil.copyfile", cut_off)
    with pytest.raises(FileError, match="No space left"):
        write_atomically({tmp_path / "a": b"3", tmp_path / "b": b"3"})
    assert contents(tmp_path) == {"a": b"2", "b": b"2"}


def exit_before(number: int) -> None:
    """Let this process end before a step of the disk, counted from now on."""
    steps = iter(range(100))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **more: Any) -> Any:
            if next(steps) == number:
                os._exit(1)
            return real(*args, **more)

        return step

    for name in ("replace", "unlink", "link"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_before_any_step_leaves_all_files_of_one_save(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where files have no second names, or the folder was copied before the next start."""
    names = ("adapter.safetensors", "head.safetensors", "adapter.json")
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for killed_before in range(20):
        folder = tmp_path / str(killed_before)
        write_atomically({folder / name: b"old" + name.encode() for name in names})
        child = os.fork()
        if not child:
            exit_before(killed_before)
            write_atomically({folder / name: b"new" + name.encode() for name in names})
            os._exit(0)
        killed = os.waitpid(child, 0)[1] != 0
        finish_save(folder)
        found = contents(folder)
        assert found.keys() == set(names)
        assert len({content[:3] for content in found.values()}) == 1, found
        if not killed:
            break
    assert killed_before > 5
    assert found["adapter.json"].startswith(b"new")


def test_an_interrupt_behind_the_last_file_keeps_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bringing the old ones back, a kill on the way left old and new ones beside each other."""
    files = [tmp_path / "a", tmp_path / "b"]
    write_atomically(dict.fromkeys(files, b"1"))
    real = os.unlink

    def interrupted(path: Any, **more: Any) -> None:
        monkeypatch.setattr(os, "unlink", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(dict.fromkeys(files, b"2"))
    assert [path.read_bytes() for path in files] == [b"2", b"2"]
    settle(files)
    assert not any(earlier(path).exists() for path in files)


def test_a_lock_is_one_under_every_name_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened under a second name and closed, the file gave the lock of the first one away."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with hold(tmp_path / "real/.lock", "The folder"):
        for name in ("link/.lock", "real/../real/.lock"):
            with pytest.raises(InUseError, match="another thread"), hold(Path(name), "The folder"):
                pass
        child = os.fork()
        if not child:
            descriptor = system.open_file("real/.lock")
            try:
                system.lock_process(descriptor)
            except BlockingIOError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    with hold(Path("link/.lock"), "The folder"):
        monkeypatch.chdir("real")
    assert not (tmp_path / "real/.lock").exists()
