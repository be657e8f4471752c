"""Checking adapters of a zoo: digests always, figures where the data can be had."""

from __future__ import annotations

from collections.abc import Sequence

from vispeft.cli.common import console
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.cli.zoo_add import measured
from vispeft.cli.zoo_card import figure_text
from vispeft.cli.zoo_facts import CLOSE, reproduces
from vispeft.errors import DataError, FileError, VispeftError, counted
from vispeft.zoo.adapters import ZooAdapter

__all__ = ["verify_all"]


def verify_all(adapters: Sequence[ZooAdapter], *, metrics: bool, overrides: Sequence[str] = ()) -> int:
    """Check adapters one after the other, and print a line for each.

    Args:
        adapters: The adapters.
        metrics: Whether figures are measured again where the data are present.
        overrides: Changes to the sections data and trainer.

    Returns:
        Number of adapters whose figures could not be measured.

    Raises:
        FileError: At the end, if a file was changed, or a figure is another one.
    """
    wrong, unknown = [], 0
    for adapter in adapters:
        name = adapter.entry.name
        try:
            adapter.verify()
            says = f"{counted(len(adapter.entry.files), 'file')} whole"
            if metrics:
                told = _figures(adapter, overrides)
                unknown += told.startswith("figures not checked")
                says = f"{says}; {told}"
        except VispeftError as error:
            wrong.append(name)
            says = f"WRONG: {error}"
        console.print(f"{name}: {says}", soft_wrap=True)
    if wrong:
        raise FileError(f"{len(wrong)} of {counted(len(adapters), 'adapter')} did not pass: {', '.join(wrong[:6])}.")
    return unknown


def _figures(adapter: ZooAdapter, overrides: Sequence[str]) -> str:
    """Measure an adapter and compare its figures with the stated ones."""
    run, entry = Run.open(f"zoo:{adapter.entry.name}"), adapter.entry
    try:
        found = measured(run, overrides)
    except DataError as error:
        load_task(run)  # whatever is wrong with adapter or backbone is no lack of data
        if run.foreign:  # what it needs is what its maker says
            return f"figures not checked: {error}"
        return f"figures not checked: needs {entry.needs or str(error)}"
    now = ", ".join(figure_text(key, found[key]) for key in entry.figures if key in found)
    if set(entry.figures) - set(found) or not reproduces(entry.figures, found):
        stated = ", ".join(figure_text(key, value) for key, value in entry.figures.items())
        raise FileError(f"its figures are {now or 'not there'}, and {stated} is stated (up to {CLOSE:.1%} of each).")
    return f"figures as stated: {now}"
