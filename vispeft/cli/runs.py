"""Run directories: claiming one, filling it, and reading it later."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vispeft.errors import ConfigError, FileError
from vispeft.storage.files import JSON_FILE, write_atomically
from vispeft.zoo.adapters import ADAPTER

__all__ = [
    "ADAPTER",
    "CHECKPOINTS",
    "CONFIG",
    "LOGS",
    "METRICS",
    "PLOTS",
    "Run",
    "begin",
    "begun",
    "claim",
    "command_of",
    "write_json",
    "write_text",
]

CHECKPOINTS, LOGS, PLOTS = "checkpoints", "logs", "plots"
CONFIG, METRICS = "config.yaml", "metrics.json"


def claim(out: str | Path | None, config: Path) -> Path:
    """Create the directory of a new run.

    Args:
        out: The requested directory; None takes the next number under ``runs/<config name>``.
        config: The run's config.

    Returns:
        The directory, empty.

    Raises:
        ConfigError: If it is not empty.
        FileError: If it cannot be created.
    """
    try:
        if out is None:
            return _next_number(Path("runs") / config.stem)
        place = Path(out)
        place.mkdir(parents=True, exist_ok=True)
        found = _listing(place)
    except OSError as error:
        raise FileError(f"The run directory {out or 'runs'} could not be made ({error.strerror}).") from error
    if METRICS in found:
        raise ConfigError(f"{place} holds a finished run, which is not overwritten. Choose another --out.")
    if found:
        raise ConfigError(
            f"{place} is not empty (found {', '.join(found[:4])}), and what is there is not overwritten. "
            f"{'Go on with it by --resume, choose' if CONFIG in found else 'Choose'} another --out, or remove it."
        )
    return place


def _listing(place: Path) -> list[str]:
    """List a run directory, without partial files left by a killed process."""
    return sorted(path.name for path in place.iterdir() if not path.name.startswith(f".{CONFIG}."))


def begin(place: Path, config: str, command: str) -> None:
    """Write the config of a run, after which it can be resumed.

    Args:
        place: Its directory.
        config: The whole config.
        command: The command line, written as a comment above the config.

    Raises:
        FileError: If it cannot be written.
    """
    write_text(place / CONFIG, f"# {' '.join(command.splitlines())}\n{config}")


def command_of(place: Path) -> str:
    """Return the command line that started a run.

    Args:
        place: Its directory.
    """
    with (place / CONFIG).open(encoding="utf-8") as file:
        return file.readline().removeprefix("# ").rstrip("\n")


def begun(path: str | Path) -> bool:
    """Whether a run directory has its config, so it can be resumed.

    Args:
        path: The directory.

    Raises:
        FileError: If there is no such directory, or it is not a run directory.
    """
    place = Path(path)
    if not os.path.isdir(place):
        raise FileError(f"There is no run directory {str(place)!r} to resume; `vispeft train` makes them.")
    found = _listing(place)
    if found and CONFIG not in found:
        numbered = sorted(int(name) for name in found if name.isdecimal() and (place / name / CONFIG).is_file())
        hint = f" Did you mean {place / str(numbered[-1])}?" if numbered else ""
        raise FileError(f"{place} is no run directory: it has no {CONFIG} (found {', '.join(found[:4])}).{hint}")
    return bool(found)


def _next_number(base: Path) -> Path:
    base.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in base.iterdir() if path.name.isdecimal()), default=0)
    while True:
        number += 1
        place = base / str(number)
        try:
            place.mkdir()  # fails if another run has taken the number meanwhile
        except FileExistsError:
            continue
        return place


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        FileError: If it cannot be written.
    """
    write_atomically({path: text.encode()})


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file atomically.

    Raises:
        FileError: If it cannot be written.
    """
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    """Its directory."""
    metrics: dict[str, Any]
    """Content of ``metrics.json``."""

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a finished run.

        Args:
            path: Its directory.

        Raises:
            FileError: If it is not a finished run.
        """
        place = Path(path)
        if not os.path.isdir(place):
            raise FileError(f"There is no run directory {str(place)!r}; `vispeft train` makes them.")
        missing = [name for name in (CONFIG, METRICS, f"{ADAPTER}/{JSON_FILE}") if not os.path.isfile(place / name)]
        if missing:
            numbered = sorted(p.name for p in place.iterdir() if p.name.isdecimal() and (p / METRICS).is_file())
            hint = f" Did you mean {place / numbered[-1]}?" if numbered else ""
            raise FileError(f"{place} is no finished run: {', '.join(missing)} is missing.{hint}")
        try:
            metrics = json.loads((place / METRICS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileError(f"{place / METRICS} cannot be read: {error}.") from error
        return cls(place, metrics)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / CONFIG

    @property
    def adapter(self) -> Path:
        """The adapter's directory."""
        return self.path / ADAPTER
