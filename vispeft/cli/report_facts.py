"""What a page says of a finished run, read from its files: neither its backbone nor its data are needed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vispeft.building.classes import find_class, import_class
from vispeft.building.config_files import Node, read_config
from vispeft.cli.evaluate import header_of
from vispeft.cli.runs import CONFIG, LOGS, Run, command_of
from vispeft.errors import ConfigError, FileError, counted
from vispeft.storage.files import ADAPTER_FILE, HEAD_FILE, JSON_FILE
from vispeft.tasks.base import AdapterTask
from vispeft.viz.curves import History, read_history
from vispeft.zoo.adapters import PREFIX

__all__ = ["RunFacts", "check_comparable", "differences", "main_figure"]

_LOADING = ("batch_size", "num_workers", "check", "max_pixels", "root")
"""Settings of data that say how and from where images are read, and not which ones."""


@dataclass(frozen=True)
class RunFacts:
    """A finished run and what its config and its adapter say."""

    run: Run
    """The run."""
    config: Node
    """Values of its config."""
    header: dict[str, Any]
    """The adapter's description."""
    name: str
    """How the page calls the run: as it was given, its directory or ``zoo:NAME``."""

    @classmethod
    def read(cls, place: str | Path) -> RunFacts:
        """Read a run.

        Args:
            place: Its directory, or ``zoo:NAME``.

        Raises:
            FileError: If it is not a finished run, or one of its files cannot be read.
        """
        run = Run.open(place)
        for split in ("validation", "test"):
            run.figures(split)
        name = str(place) if str(place).startswith(PREFIX) else str(run.path)
        return cls(run, read_config(run.config), header_of(run), name)

    @property
    def task(self) -> str:
        """Name of the class of its task."""
        return self._class_of("model").rpartition(".")[2]

    @property
    def method(self) -> str:
        """Name of its method."""
        found = self._of_header("method", "name")
        return str(found) if found else "unknown method"

    @property
    def fields(self) -> dict[str, str]:
        """Fields of the method as text, those without a value left out."""
        found = self._of_header("method", "fields")
        given = found if isinstance(found, dict) else {}
        empty: tuple[Any, ...] = (None, [], {})
        return {str(key): _text(value) for key, value in given.items() if value not in empty}

    @property
    def backbone(self) -> str:
        """Name of its backbone."""
        found = self._of_header("backbone", "name")
        return str(found) if found else "unknown backbone"

    @property
    def data(self) -> str:
        """Name of the class of its data."""
        return self._class_of("data").rpartition(".")[2]

    @property
    def data_settings(self) -> dict[str, str]:
        """Settings that say which images the run was trained on, as text."""
        found = self._section("data").get("init_args")
        given = found if isinstance(found, dict) else {}
        return {str(key): _text(value) for key, value in given.items() if key not in _LOADING}

    @property
    def class_names(self) -> list[str]:
        """Names of its outputs."""
        found = self.header.get("class_names")
        return [str(name) for name in found] if isinstance(found, list) else []

    @property
    def command(self) -> str:
        """The command line that started it."""
        return command_of(self.run.path)

    @property
    def config_text(self) -> str:
        """Its whole config as it stands in the file."""
        return (self.run.path / CONFIG).read_text(encoding="utf-8", errors="backslashreplace")

    @property
    def best_epoch(self) -> int | None:
        """Epoch that was kept, counted from zero."""
        found = self.count("best_epoch")
        return None if found is None else found - 1

    def history(self) -> History:
        """Return its metrics by epoch; empty where its log is gone."""
        with contextlib.suppress(FileError):
            return read_history(self.run.path / LOGS / "csv" / "metrics.csv")
        return {}

    def count(self, *keys: str) -> int | None:
        """Return a whole number of ``metrics.json``; None where there is none, as in runs of earlier versions.

        Args:
            keys: The entry, and those inside of it.
        """
        found: Any = self.run.metrics
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def bytes(self) -> int | None:
        """Bytes of all files of the adapter, its classifier's and its decoder's included."""
        return sum(self.files.values()) if self.files else None

    @property
    def files(self) -> dict[str, int]:
        """Bytes of each of these files; as they are now where ``metrics.json`` says nothing, as in a zoo."""
        sizes = self.run.metrics.get("adapter_bytes")
        if isinstance(sizes, dict):
            return {str(name): size for name, size in sizes.items() if isinstance(size, int)}
        there = (self.run.adapter / name for name in sorted((ADAPTER_FILE, HEAD_FILE, JSON_FILE)))
        return {path.name: path.stat().st_size for path in there if path.is_file()}

    @property
    def trained(self) -> int | None:
        """Parameters that were trained, a classifier's or decoder's included."""
        whole = self.count("parameters", "trained")
        if whole is not None:
            return whole
        parts = [self.count("parameters", name) for name in ("trainable", "trainable_head", "decoder")]
        return None if parts[0] is None else sum(part or 0 for part in parts)

    def _section(self, name: str) -> dict[str, Any]:
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def _class_of(self, section: str) -> str:
        found = self._section(section).get("class_path")
        return str(found) if found else "unknown"

    def _of_header(self, *keys: str) -> Any:
        found: Any = self.header
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def monitored(self) -> tuple[str, bool] | None:
        """Return the figure that selects the task's best epoch, and whether the largest is best.

        None for a task of the user's own, whose class is not known here.
        """
        with contextlib.suppress(ConfigError):
            path = find_class(self._class_of("model"), AdapterTask, kind="task", place="model")
            cls: type[AdapterTask] = import_class(path)
            return cls.monitor.partition("/")[2], cls.monitor_mode == "max"
        return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def main_figure(facts: Sequence[RunFacts]) -> tuple[str, bool]:
    """Choose the figure by which runs of one task are compared: the one that selects their best epochs.

    Args:
        facts: The runs.

    Returns:
        Its name, without the split's, and whether the largest is best. For a task of the user's own it is the first
        figure besides the losses, the largest taken to be best.

    Raises:
        FileError: If the runs have no figure in common.
    """
    measured = [fact.run.figures("test") for fact in facts]
    common = [name for name in measured[0] if all(name in figures for figures in measured)]
    known = facts[0].monitored()
    if known is not None and known[0] in common:
        return known
    others = [name for name in common if not name.startswith("loss")]
    if not (others or common):
        raise FileError(f"{', '.join(fact.name for fact in facts)} have no figure of the test split in common.")
    return (others[0], True) if others else (common[0], False)


def check_comparable(facts: Sequence[RunFacts]) -> None:
    """Refuse runs that no figure compares.

    Args:
        facts: The runs.

    Raises:
        ConfigError: If a run was given twice, or the runs are of different tasks.
    """
    places = [fact.run.path.resolve() for fact in facts]
    twice = next((fact for fact, place in zip(facts, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice.name} was given twice. Name each run once.")
    by_task: dict[str, list[str]] = {}
    for fact in facts:
        by_task.setdefault(fact.task, []).append(fact.name)
    if len(by_task) > 1:
        told = "; ".join(f"{task}: {', '.join(names)}" for task, names in by_task.items())
        raise ConfigError(
            f"The runs are of {len(by_task)} different tasks ({told}), whose figures mean different things. Make one "
            "report for each task."
        )


def differences(facts: Sequence[RunFacts]) -> list[str]:
    """Say where runs were not measured on the same data, so that their figures do not compare.

    Args:
        facts: The runs.

    Returns:
        A sentence for each difference; none where there is no difference.
    """
    said = []
    if len(kinds := _distinct({fact.name: fact.data for fact in facts})) > 1:
        said.append(f"The runs have different data: {_told(kinds)}.")
    keys = dict.fromkeys(key for fact in facts for key in fact.data_settings)
    for key in keys:
        values = _distinct({fact.name: fact.data_settings.get(key, "(not set)") for fact in facts})
        if len(values) > 1 and len(kinds) == 1:
            said.append(f"data.{key} differs: {_told(values)}.")
    names = _distinct({fact.name: counted(len(fact.class_names), "output") for fact in facts})
    if len({tuple(fact.class_names) for fact in facts}) > 1:
        said.append(f"The runs have different classes: {_told(names)}.")
    return said


def _distinct(values: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return found


def _told(values: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
