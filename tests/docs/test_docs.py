"""The documentation is true: its code runs, its links lead somewhere, the files and targets it names exist.

Python blocks of one page share a namespace and run in order, in an empty directory. A block that needs something that
is not here (a download, a GPU) has the line ``<!-- no-run -->`` before it and is only compiled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pytest
import torch

from vispeft.cli.main import COMMANDS
from vispeft.resources import config_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))] if p.is_file()
]
NO_RUN = "<!-- no-run -->"
TRAINS = (
    "catalogue",
    "few_photos",
    "four_tasks",
    "mmseg",
    "quickstart",
    "resume",
    "segmentation",
    "tiles_and_masks",
    "troubleshooting",
)
"""Pages whose code trains, which takes longest; they run with the slow tests."""
FOLDERS = {name.partition("/")[0] for name in config_names()}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    """Number of its first line of code in the page, from one."""
    language: str
    """What stands behind the fence."""
    text: str
    """The code."""
    run: bool
    """Whether it is to be run."""


def blocks(page: Path) -> list[Block]:
    """Find the fenced blocks of a page."""
    found: list[Block] = []
    opened: tuple[int, str, bool] | None = None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        fence = re.match(r"\s*```\s*(\w*)", line)
        if fence is None:
            continue
        if opened is None:
            opened = (number + 1, fence[1], number < 2 or lines[number - 2].strip() != NO_RUN)
        else:
            first, language, run = opened
            found.append(Block(first, language, "\n".join(lines[first - 1 : number - 1]), run))
            opened = None
    assert opened is None, f"{page.name}:{opened and opened[0] - 1} opens a block that is never closed"
    return found


def compiled(block: Block, page: Path) -> CodeType:
    """Compile a block as a script of its own."""
    # Empty lines in front make a traceback point into the page.
    return compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page_id(page), marks=[pytest.mark.slow] if page.stem in TRAINS else [])
        for page in PAGES
        if any(block.language == "python" for block in blocks(page))
    ],
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: dict[str, object]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for block in blocks(page):
        if block.language != "python":
            continue
        code = compiled(block, page)
        if block.run:
            exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page_id(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page: Path) -> None:
    """Every ``make`` target, command, script and config that a command or a `code` word names is there."""
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"{page_id(page)} names `make {target}`"
    for path in re.findall(r"\b(?:tools|benchmarks|configs)/[\w/.-]+\.(?:py|yaml|json|sh)\b", text):
        assert (ROOT / path).is_file(), f"{page_id(page)} names {path}"
    shown = "\n".join(block.text for block in blocks(page) if block.language == "bash")
    lines = re.findall(r"^vispeft .*", shown, re.MULTILINE) + re.findall(r"^ {4}(vispeft .*)", text, re.MULTILINE)
    for command, *arguments in (line.split()[1:] for line in lines + re.findall(r"`(vispeft [^`]+)`", text)):
        assert command in COMMANDS or command.startswith("-"), f"{page_id(page)} names `vispeft {command}`"
        configs = [name for name in arguments if name.partition("/")[0] in FOLDERS]
        assert set(configs) <= set(config_names()), f"{page_id(page)} names {configs}"
