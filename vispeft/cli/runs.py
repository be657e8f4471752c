"""Run directories: claiming one, filling it, and reading it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vispeft.adapters.files import JSON_FILE, write_atomically
from vispeft.errors import ConfigError, FileError

__all__ = ["ADAPTER", "CHECKPOINTS", "CONFIG", "LOGS", "METRICS", "PLOTS", "Run", "claim", "write_json", "write_text"]

ADAPTER, CHECKPOINTS, LOGS, PLOTS = "adapter", "checkpoints", "logs", "plots"
CONFIG, METRICS = "config.yaml", "metrics.json"


def claim(out: str | Path | None, config: Path) -> Path:
    """Make the directory of a new run.

    Args:
        out: The directory asked for; None takes the next number under ``runs/<config name>``.
        config: The run's config.

    Returns:
        The directory, empty.

    Raises:
        ConfigError: If it holds something already.
        FileError: If it cannot be made.
    """
    try:
        if out is None:
            return _next_number(Path("runs") / config.stem)
        place = Path(out)
        place.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in place.iterdir())
    except OSError as error:
        raise FileError(f"The run directory {out or 'runs'} could not be made ({error.strerror}).") from error
    if METRICS in found:
        raise ConfigError(f"{place} holds a finished run, which is not overwritten. Choose another --out.")
    if found:
        raise ConfigError(
            f"{place} is not empty (found {', '.join(found[:4])}), and what is there is not overwritten. "
            "Choose another --out, or remove it."
        )
    return place


def _next_number(base: Path) -> Path:
    base.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in base.iterdir() if path.name.isdecimal()), default=0)
    while True:
        number += 1
        place = base / str(number)
        try:
            place.mkdir()  # fails when another run took the number in the meantime
        except FileExistsError:
            continue
        return place


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        FileError: If it cannot be written.
    """
    write_atomically({path: text.encode()})


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all.

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
    """What ``metrics.json`` says."""

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a finished run.

        Args:
            path: Its directory.

        Raises:
            FileError: If it is none.
        """
        place = Path(path)
        if not place.is_dir():
            raise FileError(f"There is no run directory {str(place)!r}; tools/train.py makes them.")
        missing = [name for name in (CONFIG, METRICS, f"{ADAPTER}/{JSON_FILE}") if not (place / name).is_file()]
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
