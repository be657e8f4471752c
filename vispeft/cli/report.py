"""``vispeft report``: finished runs as one page that needs no other file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vispeft.cli.common import console, make_parser
from vispeft.cli.evaluation import MOST_CLASSES, figure
from vispeft.cli.report_facts import RunFacts, check_comparable, differences, main_figure
from vispeft.cli.runs import PLOTS, is_unfinished
from vispeft.errors import ConfigError, FileError, counted
from vispeft.resources import package_version
from vispeft.storage.disk import write_atomically
from vispeft.storage.places import check_folder
from vispeft.viz.comparison import Point, compared_curves, trade_off
from vispeft.viz.curves import curve_figures
from vispeft.viz.page import Picture, draw_page, photograph, vector

__all__ = ["main", "report"]

logger = logging.getLogger(__name__)

EXAMPLE = """example:
  vispeft report runs/digits_ssf/1 --out report.html
  vispeft report runs/digits_ssf/1 runs/digits_lora/1 --out comparison.html

The page holds the figures, the learning curves, the pictures of the test split, the size of the adapter, the config,
the versions and the command; several runs of one task are compared. It is one file without code, asks nothing of the
network, and can be sent as it is. Neither the backbone nor the data are needed. An earlier report is replaced."""

MARK = b"<!-- vispeft report -->"
"""Second line of every page, by which an earlier one is known."""
FIRST = 400
"""Bytes of a file in which the mark is looked for."""
SHOWN = 8
"""Figures that are shown at once; the others are unfolded."""
TITLES = {
    "confusion_matrix": "Confusion matrix of the test split",
    "overlays_test": "Test images, their labels and predictions",
    "strips_test": "Test images with the label and the prediction of each task",
    "neighbours_test": "Test images and their nearest neighbours",
    "embeddings_test": "Embeddings of test images",
    "iou_per_class": "IoU of each class",
    "average_precision": "Average precision of each label",
    "predicted": "Predicted over true values",
    "reliability": "Accuracy over probability",
}
"""Pictures of a run by the stem of the file, in the order of the page."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("report", "Show finished runs on one page that needs no other file.", EXAMPLE)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directory; several of one task are compared")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="the page; default report.html")
    given = parser.parse_args(list(argv))
    out = report(given.runs, given.out)
    told = counted(len(given.runs), "run")
    console.print(f"{told}, {out.stat().st_size / 1e6:.2f} MB: {out}", soft_wrap=True)


def report(runs: str | Path | Sequence[str | Path], out: str | Path = "report.html") -> Path:
    """Show finished runs on one page that needs no other file.

    Args:
        runs: The run directory, or several of one task.
        out: The page. An earlier report is replaced, any other file is not.

    Returns:
        The page.

    Raises:
        ConfigError: If the runs are of different tasks, or another file stands at the page's place.
        FileError: If a run is not finished, or the page cannot be written.
    """
    place = Path(out)
    _check_place(place)
    facts = [RunFacts.read(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if not facts:
        raise ConfigError("No run was given, so there is nothing to show. Name at least one run directory.")
    check_comparable(facts)
    name, largest = main_figure(facts)
    values = {
        "title": facts[0].name if len(facts) == 1 else f"{len(facts)} runs",
        "task": facts[0].task,
        "version": package_version(),
        "comparison": _comparison(facts, name, largest) if len(facts) > 1 else None,
        "runs": [_section(fact, name) for fact in facts],
    }
    write_atomically({place: draw_page("report.html", values)})
    return place


def _check_place(place: Path) -> None:
    """Refuse to write over anything but an earlier report.

    Raises:
        ConfigError: If something else stands there.
        FileError: If nothing can be written there.
    """
    check_folder(place.parent, "The folder of the page")
    try:
        if not place.exists():
            return
        if place.is_dir():
            raise ConfigError(f"--out is {place}, a folder; give a file, such as {place / 'report.html'}.")
        with place.open("rb") as file:
            begin = file.read(FIRST)
    except OSError as error:
        raise FileError(f"--out is {place}, where nothing can be written ({error.strerror}).") from error
    if MARK not in begin:
        raise ConfigError(f"{place} exists already, is no report, and is not overwritten. Choose another --out.")


def _comparison(facts: Sequence[RunFacts], name: str, largest: bool) -> dict[str, Any]:
    """Collect the table and the plots that compare runs."""
    found = [fact.run.figures("test")[name] for fact in facts]
    measured = [value for value in found if value is not None]
    best = (max if largest else min)(measured) if measured else None
    shown = f"{_spaced(name)} (test{'' if largest else ', lower is better'})"
    sizes = {"trained parameters": [fact.trained for fact in facts], "bytes": [fact.bytes for fact in facts]}
    pictures = [_trade_off(facts, found, values, size, shown) for size, values in sizes.items()]
    curves = {fact.name: fact.history().get(f"validation/{name}", ()) for fact in facts}
    if any(curves.values()):
        drawn = compared_curves({key: points for key, points in curves.items() if points}, _spaced(name))
        pictures.append(vector(drawn, f"{_spaced(name)} of the validation split over the epochs"))
    rows = [
        {"fact": fact, "value": figure(value), "validation": figure(fact.run.figures("validation").get(name)),
         "best": value is not None and value == best, "seconds": _seconds(fact)}
        for fact, value in zip(facts, found, strict=True)
    ]  # fmt: skip
    return {
        "figure": _spaced(name),
        "largest": largest,
        "rows": rows,
        "pictures": [picture for picture in pictures if picture is not None],
        "notes": differences(facts),
    }


def _trade_off(
    facts: Sequence[RunFacts],
    values: Sequence[float | None],
    sizes: Sequence[int | None],
    size: str,
    shown: str,
) -> Picture | None:
    """Draw the runs' figures against their sizes; None where no run has both."""
    points = [
        Point(name=f"{index} {fact.method}, {fact.name}", size=cost or 0, value=float("nan") if v is None else v)
        for index, (fact, v, cost) in enumerate(zip(facts, values, sizes, strict=True), start=1)
    ]
    if not any(point.size > 0 and point.value == point.value for point in points):
        return None
    drawn = trade_off(points, size if size != "bytes" else "bytes of the adapter's files", shown)
    return vector(drawn, f"{shown} against {size}")


def _section(fact: RunFacts, name: str) -> dict[str, Any]:
    """Collect what the page says of one run."""
    metrics = fact.run.metrics
    curves, further = _curves(fact, name)
    figures = _figures(fact, name)
    return {
        "fact": fact,
        "figures": figures[:SHOWN],
        "further_figures": figures[SHOWN:],
        "main": _spaced(name),
        "value": figure(fact.run.figures("test").get(name)),
        "curves": curves,
        "further_curves": further,
        "pictures": _pictures(fact),
        "per_output": _per_output(metrics),
        "by_role": _table(metrics, "parameters", "by_role"),
        "files": fact.files,
        "seconds": _seconds(fact),
        "environment": _environment(metrics),
        "unfinished": is_unfinished(fact.run.path),
    }


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _figures(fact: RunFacts, main: str) -> list[tuple[str, str, str]]:
    """Return name, validation and test of each figure, the main ones first."""
    validation, test = fact.run.figures("validation"), fact.run.figures("test")
    known = dict.fromkeys([*test, *validation])
    names = dict.fromkeys([name for name in (main, *_task_mains(fact)) if name in known]) | known
    return [(_spaced(name), figure(validation.get(name)), figure(test.get(name))) for name in names]


def _task_mains(fact: RunFacts) -> list[str]:
    """Return the figure that counts of each task of a run that has several."""
    tasks = fact.run.metrics.get("main_figures")
    return [f"{task}/{name}" for task, name in tasks.items()] if isinstance(tasks, dict) else []


def _curves(fact: RunFacts, main: str) -> tuple[list[Picture], list[Picture]]:
    """Draw the learning curves: loss and main figures, which are shown, and the others."""
    drawn = curve_figures(fact.history(), fact.best_epoch)
    pictures = {name: vector(shown, f"{_spaced(name)} over the epochs") for name, shown in drawn.items()}
    first = [name for name in ("loss", main, *_task_mains(fact)) if name in pictures]
    return [pictures[name] for name in first], [shown for name, shown in pictures.items() if name not in first]


def _pictures(fact: RunFacts) -> list[Picture]:
    """Read the pictures of the test split that the run has drawn; one that cannot be read is left out, and said."""
    found = []
    for stem, title in TITLES.items():
        path = fact.run.path / PLOTS / f"{stem}.png"
        if not path.is_file():
            continue
        try:
            found.append(photograph(path, title))
        except FileError as error:
            logger.warning("%s The page is made without it.", error)
    return found


def _per_output(metrics: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return figures of each class, label or target, by the name of the figure."""
    tables = {
        name.removeprefix("test_"): values
        for name, values in metrics.items()
        if name.startswith("test_") and name.endswith("_per_class")
    }
    by_task = metrics.get("test_iou")
    if isinstance(by_task, dict):
        tables |= {f"IoU of {task}": values for task, values in by_task.items()}
    return {
        _spaced(name): [(str(key), _number(value)) for key, value in list(values.items())[:MOST_CLASSES]]
        for name, values in tables.items()
        if isinstance(values, dict)
    }


def _number(value: Any) -> str:
    return figure(value) if isinstance(value, int | float) else "" if value is None else str(value)


def _table(metrics: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    found: Any = metrics
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return (
        {str(key): value for key, value in found.items() if isinstance(value, int)} if isinstance(found, dict) else {}
    )


def _seconds(fact: RunFacts) -> str:
    found = fact.run.metrics.get("seconds")
    seconds = found.get("training") if isinstance(found, dict) else None
    return f"{seconds:,.0f} s" if isinstance(seconds, int | float) else ""


def _environment(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return device, precision and versions."""
    own = {name: str(metrics[name]) for name in ("device", "precision", "threads", "seed") if name in metrics}
    versions = metrics.get("versions")
    return own | ({str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {})
