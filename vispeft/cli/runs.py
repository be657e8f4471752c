"""Run directories: claiming one, filling it, and reading it later."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vispeft.errors import ConfigError, FileError, brief
from vispeft.storage.disk import write_atomically
from vispeft.storage.files import JSON_FILE
from vispeft.storage.form import shown
from vispeft.storage.header import strict_values
from vispeft.storage.leftovers import finish_save, remove_partial
from vispeft.storage.locks import clear, hold
from vispeft.storage.places import check_folder
from vispeft.zoo.adapters import ADAPTER, PREFIX, backbone_names, find_adapter, zoo_hint
from vispeft.zoo.folder import own_zoo
from vispeft.zoo.index import read_index

__all__ = [
    "ADAPTER",
    "CHECKPOINTS",
    "CONFIG",
    "LOGS",
    "METRICS",
    "PLOTS",
    "TRACKERS",
    "Run",
    "begin",
    "begun",
    "check_claim",
    "check_empty",
    "claim",
    "clear_lock",
    "command_of",
    "finished",
    "held",
    "is_unfinished",
    "mark_finished",
    "mark_unfinished",
    "names_run",
    "refuse_segmentor",
    "remove_empty",
    "withdraw",
    "write_json",
    "write_text",
]

CHECKPOINTS, LOGS, PLOTS = "checkpoints", "logs", "plots"
CONFIG, METRICS = "config.yaml", "metrics.json"
TRACKERS = "trackers.json"
"""Which runs of their trackers a run goes on in."""
_LOCK, _UNFINISHED = ".lock", ".unfinished"


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
        check_empty(place)
    except OSError as error:
        raise FileError(f"The run directory {out or 'runs'} could not be made ({error.strerror}).") from error
    return place


def check_claim(out: str | Path | None, config: Path) -> None:
    """Refuse what `claim` would refuse, before the work. Nothing is made.

    Args:
        out: The requested directory; None for a number under ``runs/<config name>``.
        config: The run's config.

    Raises:
        ConfigError: If it is not empty.
        FileError: If it cannot be made.
    """
    place = Path("runs") / config.stem if out is None else Path(out)
    check_folder(place, "The run directory")
    if out is not None and os.path.isdir(place):
        check_empty(place)


def check_empty(place: Path) -> None:
    """Refuse a directory that holds anything but its lock.

    `claim` does so too, and another run may have filled the directory before this one has the lock.

    Args:
        place: The directory of a new run.

    Raises:
        ConfigError: If it is not empty.
        OSError: If it cannot be read.
    """
    found = _listing(place)
    if METRICS in found:
        raise ConfigError(f"{place} holds a finished run, which is not overwritten. Choose another --out.")
    if found:
        raise ConfigError(
            f"{place} is not empty (found {', '.join(found[:4])}), and these are not overwritten. "
            f"{'Go on with it by --resume, choose' if CONFIG in found else 'Choose'} another --out, or remove it."
        )


def _listing(place: Path) -> list[str]:
    """List a run directory, without its lock and partial files left by a killed process."""
    return sorted(path.name for path in place.iterdir() if not path.name.startswith((f".{CONFIG}.", _LOCK)))


@contextlib.contextmanager
def held(place: Path) -> Iterator[None]:
    """Keep other processes out of a run directory, and tidy it, while a block of code runs.

    Args:
        place: The directory.

    Raises:
        InUseError: If another process trains in it.
        FileError: If it cannot be written.
    """
    with hold(place / _LOCK, f"The run directory {place}"):
        _tidy(place)
        yield


def clear_lock(place: Path) -> None:
    """Remove the lock of a process that was killed behind its last step.

    Args:
        place: The run's directory.
    """
    clear(place / _LOCK)


def _tidy(place: Path) -> None:
    """Remove what a killed process left half-written."""
    finish_save(place / ADAPTER)
    remove_partial(place, CONFIG, METRICS, TRACKERS, _UNFINISHED)
    remove_partial(place / PLOTS, ".png")
    remove_partial(place / LOGS / "csv", ".csv")
    remove_partial(place / CHECKPOINTS, ".ckpt")


def withdraw(place: Path) -> None:
    """Remove what a run has written that was refused before its first step, so that its name can be given again.

    Args:
        place: Its directory, whose lock this process holds. `remove_empty` removes the directory, behind the lock.
    """
    for name in (LOGS, PLOTS, CHECKPOINTS):
        shutil.rmtree(place / name, ignore_errors=True)
    for name in (CONFIG, TRACKERS):
        (place / name).unlink(missing_ok=True)


def remove_empty(place: Path) -> None:
    """Remove a run directory if nothing is in it, such as the lock of another process.

    Args:
        place: The directory.
    """
    with contextlib.suppress(OSError):
        place.rmdir()


def finished(place: Path) -> bool:
    """Whether a run is finished, with all of its pictures.

    Args:
        place: Its directory.
    """
    return (place / METRICS).is_file() and not is_unfinished(place)


def is_unfinished(place: Path) -> bool:
    """Whether a run with ``metrics.json`` has something left to do: further epochs, or pictures.

    Args:
        place: Its directory.
    """
    return (place / _UNFINISHED).is_file()


def mark_unfinished(place: Path) -> None:
    """Note that a run has something left to do, although its ``metrics.json`` exists.

    Args:
        place: Its directory.

    Raises:
        FileError: If the note cannot be written.
    """
    write_text(place / _UNFINISHED, "")


def mark_finished(place: Path) -> None:
    """Remove the note of `mark_unfinished`.

    Args:
        place: The run's directory.
    """
    (place / _UNFINISHED).unlink(missing_ok=True)


def begin(place: Path, config: str, command: str) -> None:
    """Write the config of a run, after which it can be resumed.

    Args:
        place: Its directory.
        config: The whole config.
        command: The command line, written as a comment above the config.

    Raises:
        FileError: If it cannot be written.
    """
    printable = command.encode(errors="backslashreplace").decode()
    write_text(place / CONFIG, f"# {' '.join(printable.splitlines())}\n{config}")


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
    refuse_segmentor(place, found)
    if found and CONFIG not in found:
        numbered = sorted(int(name) for name in found if name.isdecimal() and (place / name / CONFIG).is_file())
        hint = f" Did you mean {place / str(numbered[-1])}?" if numbered else ""
        raise FileError(f"{place} is no run directory: it has no {CONFIG} (found {', '.join(found[:4])}).{hint}")
    return bool(found)


def refuse_segmentor(place: Path, found: Sequence[str]) -> None:
    """Refuse a run of mmsegmentation, and say how its own tools do the same.

    Args:
        place: The run directory.
        found: Names in it.

    Raises:
        FileError: If it is one.
    """
    configs = [name for name in found if name.endswith(".py")]
    if CONFIG in found or not configs:
        return
    config = place / configs[0]
    weights = sorted((name for name in found if name.endswith(".pth")), key=lambda name: (place / name).stat().st_mtime)
    checkpoint = place / weights[-1] if weights else "CHECKPOINT"
    raise FileError(
        f"{place} is a run of mmsegmentation, whose config is code, and this command reads runs of `vispeft train "
        f"CONFIG.yaml`. To go on: vispeft train {config} --resume {place}. To measure: python tools/test.py {config} "
        f"{checkpoint}, which is mmsegmentation's. For the rest, model = mmseg.apis.init_model('{config}', "
        f"'{checkpoint}'); mmseg.apis.inference_model(model, IMAGES) predicts, and vispeft.mmseg.merge(model, OUT) "
        "merges, after which mmdeploy exports."
    )


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
    """Write a JSON file atomically; a number that is not finite becomes null.

    Raises:
        FileError: If it cannot be written.
    """
    write_text(path, json.dumps(strict_values(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def names_run(place: str) -> bool:
    """Whether a text names a directory or an adapter of the zoo, and no config, model or backbone of the zoo.

    Args:
        place: The text.
    """
    if place.startswith(PREFIX):
        return place.removeprefix(PREFIX) not in backbone_names()
    return os.path.isdir(place)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    """Its directory."""
    metrics: dict[str, Any]
    """Content of ``metrics.json``."""
    foreign: bool = False
    """Whether it was pulled from elsewhere, so that nothing is built from its config unchecked."""

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a finished run.

        Args:
            path: Its directory; or ``zoo:NAME``, since the folder of an adapter in a zoo has what a run leaves.

        Raises:
            FileError: If it is not a finished run, or its figures cannot be read.
            UnknownNameError: If the zoo has no such adapter.
        """
        if str(path).startswith(PREFIX):
            return cls._opened(find_adapter(str(path)))
        place = Path(path)
        if not os.path.isdir(place):
            raise FileError(
                f"There is no run directory {str(place)!r}; `vispeft train` makes them.{zoo_hint(str(path))}"
            )
        refuse_segmentor(place, _listing(place))
        adapter = JSON_FILE if os.path.isfile(place / JSON_FILE) else f"{ADAPTER}/{JSON_FILE}"  # as in a zoo, or below
        missing = [name for name in (CONFIG, METRICS, adapter) if not os.path.isfile(place / name)]
        if missing:
            numbered = sorted(p.name for p in place.iterdir() if p.name.isdecimal() and (p / METRICS).is_file())
            hint = f" Did you mean {place / numbered[-1]}?" if numbered else ""
            if CONFIG not in missing:
                hint = f" To end it: vispeft train --resume {place} goes on, and --finish {place} takes its best epoch."
            raise FileError(f"{place} is no finished run: {', '.join(missing)} is missing.{hint}")
        return cls._opened(place)

    @classmethod
    def _opened(cls, place: Path) -> Run:
        """Read the figures of a run."""
        try:
            metrics = json.loads((place / METRICS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise cls(place, {})._changed(brief(error)) from error
        if not isinstance(metrics, dict):
            raise cls(place, {})._changed(f"It is {shown(metrics)}; keys with values are needed.")
        return cls(place, metrics, _is_foreign(place))

    def figures(self, split: str) -> dict[str, float | None]:
        """Return the figures of a split in ``metrics.json``; None for one that was not measured.

        Args:
            split: validation or test.

        Raises:
            FileError: If they are missing, or no numbers.
        """
        found = self.metrics.get(split)
        if not isinstance(found, dict) or not all(v is None or _is_number(v) for v in found.values()):
            raise self._changed(f"Its entry {split!r} is {shown(found)}; names with numbers are needed.")
        return found

    def number(self, *keys: str) -> float:
        """Return a number in ``metrics.json``.

        Args:
            keys: The entry, and those inside of it.

        Raises:
            FileError: If it is missing, or no number.
        """
        found: Any = self.metrics
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if not _is_number(found):
            raise self._changed(f"Its entry {'.'.join(keys)!r} is {shown(found)}; a number is needed.")
        return found

    def _changed(self, found: str) -> FileError:
        return FileError(
            f"{self.path / METRICS} is not as a run writes it. {found} Remove the file, and `vispeft train --finish "
            f"{self.path}` measures the run again."
        )

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / CONFIG

    @property
    def adapter(self) -> Path:
        """The adapter's directory, which in a zoo is that of the run."""
        return self.path if (self.path / JSON_FILE).is_file() else self.path / ADAPTER


def _is_foreign(place: Path) -> bool:
    """Return whether a folder lies in the user's own zoo and was not made here, however it was named."""
    found, zoo = place.resolve(), own_zoo().resolve()
    if found.parent != zoo:
        return False
    entry = read_index(zoo).get(found.name)
    return entry is None or entry.source is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
