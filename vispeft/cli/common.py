"""Helpers shared by all commands: output, clean errors, quiet libraries."""

from __future__ import annotations

import argparse
import io
import logging
import os
import platform
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.text import Text

from vispeft.cli.stopping import Stopped, stopped_by_signals
from vispeft.errors import ConfigError, VispeftError, printable_lines

__all__ = ["console", "make_parser", "one_line", "quiet_libraries", "run_tool", "versions"]


class PlainConsole(Console):
    """A console that prints names and paths as they are: no brackets or colons of them are markup."""

    def __init__(self) -> None:
        """Switch markup off, which a call may switch on for text of its own."""
        super().__init__(markup=False, emoji=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Convert text, cells of tables too; control characters are escaped."""
        return super().render_str(printable_lines(text), **settings)


console = PlainConsole()
"""Where commands print."""


def run_tool(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command and print an expected error as one message.

    Args:
        main: The command, a function of the arguments without the program's name.
        argv: The arguments; by default those of the process.

    Returns:
        The exit status: 0, or 2 after an expected error, or 128 and the number of the signal that stopped the command.
        With ``VISPEFT_DEBUG=1`` an expected error keeps its traceback.
    """
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        with stopped_by_signals():
            main(sys.argv[1:] if argv is None else argv)
    except (Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        print(stopped, file=sys.stderr)
        return stopped.status
    except VispeftError as error:
        if os.environ.get("VISPEFT_DEBUG") == "1":
            raise
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        return 2
    except Exception as error:
        if os.environ.get("VISPEFT_DEBUG") == "1" or not _is_lightnings(error):
            raise
        print(f"error: Lightning refuses these settings: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def _is_lightnings(error: Exception) -> bool:
    """Whether Lightning refused its settings; never imports Lightning itself.

    It has an error of its own for this, and raises ValueError as well.
    """
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    if exceptions is not None and isinstance(error, exceptions.MisconfigurationException):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return isinstance(error, ValueError) and raised_in.startswith("lightning.pytorch.")


def quiet_libraries() -> None:
    """Print vispeft's log lines plainly, and hide messages of libraries that users cannot act on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("vispeft")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO)
    ours.propagate = False
    # Lightning's devices, tips and seeds. Importing it sets the levels of its packages, and not of the modules in them.
    packages = ("lightning.pytorch", "lightning.fabric")
    modules = (*(f"{name}.utilities.rank_zero" for name in packages), "lightning_utilities.core.rank_zero")
    for name in (*packages, *modules):
        logging.getLogger(name).setLevel(logging.WARNING)
    # In-memory data are fastest without workers, and a frozen backbone in evaluation mode is intended.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
    # Caused inside Lightning and timm by newer releases of torch; nothing to change here.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.layers\.interpolate")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\..*|torch\..*")


class _Parser(argparse.ArgumentParser):
    """Report a wrong command line like every other error."""

    def error(self, message: str) -> Any:
        """Raise instead of exiting the process.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}. {one_line(self.format_usage())} (--help says more)")


def make_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """Create a command's parser.

    Args:
        command: The command's name.
        description: One sentence on the command.
        example: Lines that can be copied, with explanations.
    """
    return _Parser(
        prog=f"vispeft {command}",
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def one_line(text: str) -> str:
    """Join the lines of a text.

    Args:
        text: The text.
    """
    return " ".join(text.split())


def versions() -> dict[str, str]:
    """List the versions of libraries that affect results."""
    found = {"python": platform.python_version()}
    for name in ("vispeft", "torch", "torchvision", "timm", "lightning", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
