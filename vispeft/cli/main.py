"""``vispeft``: the command line. ``vispeft NAME ...`` and ``tools/NAME.py ...`` call the same function.

Heavy imports happen only when a command runs, so that help is instant.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from vispeft.resources import config_names, package_version

__all__ = ["COMMANDS", "command", "main", "run_command"]

COMMANDS = {
    "compose": "make one adapter of several",
    "demo": "try adapters in a browser, on images of your own",
    "doctor": "check data before training, on one page",
    "embed": "embed images with a finished run, and make an index of them",
    "encode-classes": "write class embeddings by a CLIP, for classifying without training",
    "evaluate": "measure a finished run again, from its files",
    "export": "write a finished run as ONNX, as a torch.export program or as a difference of weights",
    "import-official": "turn an authors' published checkpoint into an adapter directory",
    "inspect": "show the plan of a method without changing anything",
    "merge": "write a finished run as a plain timm model",
    "port": "carry an adapter to another checkpoint of its backbone",
    "predict": "predict images with a finished run",
    "quickstart": "train, merge and reload an adapter on real images",
    "replay": "show where the value arose that stopped a training",
    "report": "show finished runs on one page that needs no other file",
    "search": "find the nearest images of an index for query images",
    "select-features": "keep the features of a VQT adapter that matter",
    "serve": "answer images over HTTP with many adapters of one backbone",
    "train": "train an adapter from a config (--list names the packaged ones)",
    "zoo": "list, check, add and fetch adapters of the zoo",
}
"""Commands with their descriptions. Each is `main` of the module of that name, with underscores for hyphens."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console command ``vispeft``.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        The exit status: 0, or 2 after an expected error.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if given[0] == "--version":
        print(f"vispeft {package_version()}")
        return 0
    return run_command(given[0], given[1:])


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command, and print an expected error as one message.

    Args:
        name: Its name, one of `COMMANDS`.
        argv: Its arguments; by default those of the process.

    Returns:
        The exit status: 0, or 2 after an expected error.
    """
    from vispeft.cli.common import run_tool

    if name == "train" and list(sys.argv[1:] if argv is None else argv) == ["--list"]:
        return run_tool(lambda _: print("\n".join(config_names())), argv)  # without the seconds that PyTorch takes
    return run_tool(lambda arguments: command(name)(arguments), argv)


def command(name: str) -> Callable[[Sequence[str]], None]:
    """Find the function of a command.

    Args:
        name: Its name, one of `COMMANDS`.

    Raises:
        UnknownNameError: If there is no such command.
    """
    if name not in COMMANDS:
        from vispeft.errors import UnknownNameError

        raise UnknownNameError("command", name, COMMANDS, "`vispeft --help` lists them.")
    module = importlib.import_module(f"vispeft.cli.{name.replace('-', '_')}")
    function: Callable[[Sequence[str]], None] = module.main
    return function


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vispeft COMMAND [ARGUMENTS]",
            "",
            "Adapts a frozen timm vision transformer by training a small share of its parameters.",
            "",
            "commands:",
            *lines,
            "",
            "`vispeft COMMAND --help` explains one, with examples; `vispeft --version` names the version.",
        ]
    )
