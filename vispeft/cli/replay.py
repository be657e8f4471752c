"""``vispeft replay``: run a step again that met a value which is not finite, and show where it arose."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from vispeft.cli import runs
from vispeft.cli.common import console, make_parser
from vispeft.cli.config import ConfigCLI
from vispeft.data.base import ImageData
from vispeft.errors import FileError
from vispeft.tasks.failures import FAILURE, Failure, put_back, read_failures
from vispeft.tasks.state import set_random_state
from vispeft.tasks.tracing import Origin, trace

__all__ = ["main", "replay"]

EXAMPLE = f"""example:
  vispeft replay runs/mine/1

A training that meets a loss or a gradient that is not finite stops, and keeps weights, batch and random state of that
step in {FAILURE}. The step is run again from them on the processor, operation by operation, with nothing recomputed or
compiled, until the first value that is not finite."""
_TYPES = {"16": torch.float16, "bf16": torch.bfloat16}


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("replay", "Show where the value arose that stopped a training.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="directory of the run")
    given = parser.parse_args(argv)
    failure, origin = replay(given.run)
    console.print(failure.told, soft_wrap=True)
    if origin is None:
        console.print(
            f"Run again here, all values of the step are finite. It was trained with precision {failure.precision}; on "
            "other hardware sums may overflow that do not here.",
            soft_wrap=True,
        )
        return
    console.print(_table(origin))
    console.print(advice(origin), soft_wrap=True)


def replay(run: str | Path) -> tuple[Failure, Origin | None]:
    """Run the kept step of a run again.

    Args:
        run: Its directory.

    Returns:
        The step, and where its first value that is not finite arises; None if there is none.

    Raises:
        FileError: If the run has kept no step, or it does not fit the run's config.
    """
    place = Path(run)
    if not place.is_dir():
        raise FileError(f"There is no run directory {str(place)!r}; `vispeft train` makes them.")
    kept = read_failures(place)
    cli = ConfigCLI(place / runs.CONFIG, [])
    task, data = cli.model, cli.datamodule
    if isinstance(data, ImageData):
        data.fit_to(task.preprocessing)
        data.setup()
    task.check_data(data)
    cli.prepare_model()
    task.bank.memory = "plain"
    for failure in kept:
        origin = _traced(task, failure)
        if origin is not None:
            return failure, origin
    return kept[0], None


def _traced(task: Any, failure: Failure) -> Origin | None:
    """Run a kept step."""
    put_back(task, failure)
    task.train()
    set_random_state(failure.random)
    with _autocast(failure.precision), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trying to `self.log\\(\\)`.*")  # there is no trainer
        return trace(task, failure.batch, failure.index)


def _autocast(precision: str) -> AbstractContextManager[object]:
    name = precision.partition("-")[0]
    if "mixed" not in precision or name not in _TYPES:
        return nullcontext()
    return torch.autocast("cpu", dtype=_TYPES[name])


def _table(origin: Origin) -> Table:
    table = Table(title="First value that is not finite", show_header=False)
    what = {
        "weight": "a weight, before the step",
        "batch": "the batch",
        "forward": "the forward pass",
        "backward": "the backward pass",
    }
    table.add_row("in", what[origin.kind])
    table.add_row("at", origin.place)
    if origin.operation:
        table.add_row("operation", origin.operation)
    table.add_row("shape", " x ".join(map(str, origin.shape)) or "scalar")
    table.add_row("not finite", f"{origin.broken:,} ({origin.nan:,} NaN)")
    table.add_row("largest input" if origin.operation else "largest of the others", f"{origin.largest:.4g}")
    return table


def advice(origin: Origin) -> str:
    """Say what to do.

    Args:
        origin: Where the value arises.
    """
    if origin.kind == "weight":
        return (
            "An earlier step, or the file it was loaded from, has broken this tensor. Load another, or lower model.lr."
        )
    if origin.kind == "batch":
        return "The images or labels are broken. Look at them with vispeft doctor."
    if origin.nan == 0:
        return "Values left the range of their type. Try trainer.precision bf16-mixed or 32, or a lower learning rate."
    return "Try a lower learning rate (model.lr), trainer.gradient_clip_val 1, or trainer.precision 32."
