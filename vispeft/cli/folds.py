"""``vispeft train CONFIG --folds N``: cross-validation, with one run per fold."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vispeft.cli import runs
from vispeft.cli.common import console
from vispeft.cli.config_keys import split_overrides
from vispeft.cli.evaluation import metrics_table
from vispeft.errors import ConfigError, UnknownNameError

__all__ = ["FOLDS", "Train", "folds_table", "summarise", "train_folds"]

Train = Callable[[Path, Sequence[str], Path, str], object]
"""Function that trains into a directory, or resumes there: config, overrides, directory, command."""

FOLDS = "folds.json"


def train_folds(
    config: Path,
    overrides: Sequence[str],
    folds: int,
    train: Train,
    *,
    out: str | Path | None = None,
    command: str = "",
) -> Path:
    """Train once per fold, with that fold as test split, or as validation split of metric learning, and summarise.

    The same call continues a stopped one: finished folds are skipped, and an unfinished one is resumed.

    Args:
        config: The YAML file.
        overrides: Arguments such as ``["--model.lr", "1e-3"]``.
        folds: Number of folds.
        train: Function that trains one fold.
        out: Directory of the runs; None takes ``runs/<config name>-<folds>-folds``.
        command: The command line, for ``folds.json``.

    Returns:
        The directory, with a run per fold and ``folds.json``.

    Raises:
        ConfigError: If the data cannot be divided into folds, or the directory was started with other settings.
        VispeftError: If a fold cannot be trained.
    """
    if folds < 2:
        raise ConfigError(f"--folds is {folds}; at least 2 are needed.")
    taken = [key for key, _ in split_overrides(overrides) if key in ("data.folds", "data.fold")]
    if taken:
        raise ConfigError(f"--{taken[0]} was given with --folds, which sets it. Leave one of them out.")
    base = Path(out) if out is not None else Path("runs") / f"{config.stem}-{folds}-folds"
    places = [base / f"fold-{fold}" for fold in range(folds)]
    beyond = base / f"fold-{folds}"
    if os.path.exists(beyond):
        raise ConfigError(
            f"{base} was begun with more than {folds} folds: it holds {beyond.name}. Choose another --out."
        )
    for fold, place in enumerate(places):
        console.rule(f"Fold {fold + 1} of {folds}")
        own = [*overrides, "--data.folds", str(folds), "--data.fold", str(fold)]
        _train(train, config, own, place, command)
    result = {"command": command, **summarise([runs.Run.open(place) for place in places])}
    runs.write_json(base / FOLDS, result)
    console.print(folds_table(result["test"]))
    console.print(f"{base / FOLDS} holds these figures.", soft_wrap=True)
    return base


def _train(train: Train, config: Path, overrides: Sequence[str], place: Path, command: str) -> None:
    try:
        train(config, overrides, place, command)
    except UnknownNameError as error:
        if "'data.folds'" not in str(error):
            raise
        raise ConfigError(
            "--folds was given, and the config's data module has no settings folds and fold, so its images cannot be "
            "dealt into folds. Use a module that draws its splits itself, such as ImageFolderData or ImageListData."
        ) from error


def summarise(finished: Sequence[runs.Run]) -> dict[str, Any]:
    """Summarise the results of all folds.

    Args:
        finished: The run of each fold.

    Returns:
        Per split the metrics of each fold, their mean and their standard deviation (of a sample), and seconds. A figure
        that was not measured in one of the folds has no mean.
    """
    result: dict[str, Any] = {"folds": len(finished), "runs": [run.path.name for run in finished]}
    for split in ("validation", "test"):
        rows = [run.figures(split) for run in finished]
        columns = {name: [row.get(name) for row in rows] for name in rows[0]}
        result[split] = {
            "per_fold": rows,
            "mean": {name: _over_folds(statistics.fmean, values) for name, values in columns.items()},
            "std": {name: _over_folds(statistics.stdev, values) for name, values in columns.items()},
        }
    result["seconds"] = sum(run.number("seconds", "total") for run in finished)
    return result


def _over_folds(summary: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return summary(measured) if len(measured) == len(values) else None


def folds_table(figures: Mapping[str, Any]) -> Table:
    """Format the results of a split as a table.

    Args:
        figures: One split of the result of `summarise`.
    """
    rows = {f"fold {number}": row for number, row in enumerate(figures["per_fold"], start=1)}
    table = metrics_table({**rows, "mean": figures["mean"], "deviation": figures["std"]}, "test split of each run")
    if table.row_count == len(rows) + 2:
        table.rows[len(rows) - 1].end_section = True
    return table
