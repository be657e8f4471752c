"""Signals that ask a command to stop, and the messages when one does or when a disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from vispeft.errors import FileError

__all__ = ["Stopped", "command_to_go_on", "disk_is_full", "own_code", "stopped_by_signals", "tell_how_to_go_on"]

own_code: list[str] = []
"""Modules of the user's own that the command has named: one that goes on with a run has to name them again."""

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl+C, the end of a queue's or a container's time, and a terminal that is closed."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space on the disk, in the user's share of it, or in one file."""


_AGAIN = 0.1
"""Seconds after which a signal that came during an import is sent again."""


class Stopped(BaseException):
    """A signal asked the process to stop. Like KeyboardInterrupt no error, so that nothing handles it by mistake."""

    def __init__(self, number: int) -> None:
        """Store the signal.

        Args:
            number: Its number.
        """
        super().__init__(number)
        self.number = number
        self.hint = ""
        """One more sentence, on how to go on."""

    @property
    def status(self) -> int:
        """The exit status that shells expect of a process which a signal has ended."""
        return 128 + self.number

    def __str__(self) -> str:
        """Say which signal it was, and how to go on."""
        return f"Stopped by {signal.Signals(self.number).name}. {self.hint}".rstrip()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` when a signal asks the process to stop, instead of ending it in the middle of a file.

    Signals that were to be ignored, as under nohup, stay ignored. Outside of the main thread nothing is changed, as
    Python allows handlers there alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, already = os.getpid(), _imports(sys._getframe())

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker that was forked: it ends as it would have without this handler
            if before[number] is signal.default_int_handler:
                signal.default_int_handler(number, frame)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if _imports(frame) > already:
            again = threading.Timer(_AGAIN, os.kill, (owner, number))
            again.daemon = True
            again.start()
            return
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _imports(frame: FrameType | None) -> int:
    """Count the frames of imports: a library's code there may swallow an exception, or be left half done."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return count


def command_to_go_on(place: object, further: Sequence[str] = (), *, by: str = "--resume") -> str:
    """Compose the command that goes on with a run, with the user's code that was loaded for it.

    Args:
        place: The run's directory.
        further: Arguments that the run's config does not hold, such as those for the devices that there are.
        by: What to do with the run: ``--resume`` or ``--finish``.
    """
    code = [part for name in own_code for part in ("--code", name)]
    return shlex.join(["vispeft", "train", by, str(place), *further, *code])


@contextlib.contextmanager
def tell_how_to_go_on(place: object, further: Sequence[str] = (), *, by: str = "--resume") -> Iterator[None]:
    """Add to the message of a stop, or of a full disk, how a run is gone on with.

    Args:
        place: The run's directory.
        further: As `command_to_go_on` takes them.
        by: As `command_to_go_on` takes it.

    Raises:
        FileError: If the disk is full.
    """
    command = command_to_go_on(place, further, by=by)
    try:
        yield
    except Stopped as stopped:
        stopped.hint = stopped.hint or f"Go on by {command}"
        raise
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise FileError(
            f"The disk of {place} is full. Free some space, then go on by {command} ({_reason(error)})"
        ) from error


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error was raised because a file could not grow.

    Args:
        error: The error; those behind it count as well.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # errors that were raised again may stand behind each other
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())
