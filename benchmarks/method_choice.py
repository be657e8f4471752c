"""The answer with which ``docs/methods/README.md`` opens: one table of what was run on one's own data, and what to try.

`method_pages.py` puts it into the page. Every figure comes from a JSON file in ``benchmarks/results``; a cell without a
run says so.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FEWSHOT = {"dinov2_vit_s14": "DINOv2-S/14", "vit_tiny": "vit_tiny", "swin_tiny": "swin_tiny"}
"""Backbones of the few-shot columns, by the folder of their results."""
BYTES = "swin_tiny"
"""The backbone whose files are counted: the one with most runs."""
TILES = {"frozen": "linear_probe"}
CHARACTERS = {"linear": "linear_probe"}
"""Rows of other tables under the names of methods; others have the method's."""
FULL = "full fine-tuning"
"""Row of `activations.py` that steps and memory are compared with."""
NONE = "-"


class Results:
    """What was measured."""

    def __init__(self, folder: Path) -> None:
        """Read the files.

        Args:
            folder: ``benchmarks/results``.
        """
        self.few = {name: _read(folder / "fewshot" / name) for name in FEWSHOT}
        self.tiles = _read(folder / "earth")
        self.characters = _read(folder / "metric_learning")
        self.scenes = _read(folder / "multitask")
        path = folder / "activations_vit_s.json"
        self.steps: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else {}

    def fewshot(self, backbone: str, name: str) -> list[float]:
        """Return test accuracies of a method, in percent, by seed."""
        return [100 * run["test"] for run in self.few[backbone] if run["method"] == name and "test" in run]

    def miou(self, name: str) -> list[float]:
        """Return mIoU on the test tiles, by seed."""
        return [
            run["test"]["miou"]
            for run in self.tiles
            if TILES.get(run["method"], run["method"]) == name and "test" in run
        ]

    def recall(self, name: str) -> list[float]:
        """Return recall@1 on the test characters, by seed."""
        return [
            run["test"]["recall@1"]
            for run in self.characters
            if CHARACTERS.get(run.get("row", ""), run.get("row")) == name and "test" in run
        ]

    def stored(self, name: str) -> int | None:
        """Return the bytes of a method's file on `BYTES`, its classifier included."""
        return next((int(run["stored_bytes"]) for run in self.few[BYTES] if run["method"] == name), None)

    def cost(self, name: str) -> tuple[float, float] | None:
        """Return time of a step and bytes kept for the backward pass, relative to full fine-tuning."""
        if name not in self.steps or FULL not in self.steps:
            return None
        own, whole = self.steps[name], self.steps[FULL]
        return own["seconds"]["median"] / whole["seconds"]["median"], own["saved_bytes"] / whole["saved_bytes"]

    def gain(self, row: str) -> float | None:
        """Return the mean change of a multi-task row's five figures over the decoders alone, in percent."""
        runs = {name: [run["test"] for run in self._best(name)] for name in (row, "decoders")}
        if not all(runs.values()):
            return None
        better = {"semseg/miou": 1, "sal/miou": 1, "normals/mean": -1, "depth/rmse": -1, "edge/odsf": 1}
        means = {
            name: {figure: statistics.mean(test[figure] for test in tests) for figure in better}
            for name, tests in runs.items()
        }
        changes = [sign * (means[row][figure] / means["decoders"][figure] - 1) for figure, sign in better.items()]
        return 100 * statistics.mean(changes)

    def _best(self, row: str) -> list[dict[str, Any]]:
        """Return the tested runs of a row at the rate that was run with most seeds, which validation chose."""
        runs = [run for run in self.scenes if (run.get("data"), run.get("row")) == ("scenes", row) and "test" in run]
        rates = [run["lr"] for run in runs]
        return [run for run in runs if run["lr"] == max(rates, key=rates.count)]


def _read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return NONE
    missing = "" if len(values) >= 3 else f" ({len(values)} seed{'s' * (len(values) > 1)})"
    return f"{statistics.mean(values):.{digits}f}{missing}"


def lines(folder: Path, shares: Mapping[str, float | None]) -> Iterator[str]:
    """Make the section.

    Args:
        folder: ``benchmarks/results``.
        shares: Trained share of a ViT-B/16 by method, from 0 to 1; None where the method refuses it.

    Yields:
        Lines of Markdown.
    """
    found = Results(folder)
    yield from ("## Which method?", "", *advice(found), "")
    yield from (
        "| method | " + " | ".join(FEWSHOT.values()) + " | tiles | characters | trained | bytes | step | kept |",
        "|---|" + "--:|" * (len(FEWSHOT) + 6),
    )
    rows = {name: row(found, name, share) for name, share in shares.items()}
    measured = [name for name, cells in rows.items() if any(cell != NONE for cell in cells[1:6])]
    for name in measured:
        yield " | ".join(rows[name]).join(("| ", " |"))
    others = [f"[{name}]({name}.md)" for name in rows if name not in measured]
    if others:
        yield from ("", f"Not measured on these data: {', '.join(others)}. {TOY}")
    yield from ("", *KEY, "")


TOY = (
    "Methods that change weights are compared with each other [on a toy](../benchmarks.md#changes-of-weights-on-a-toy)."
)
KEY = (
    "*DINOv2-S/14*, *vit_tiny*, *swin_tiny*: test accuracy in percent with 100 training images of a class of "
    "Fashion-MNIST; the last two were [pretrained on these very classes](../benchmarks.md#few-shot-fashion-mnist), so "
    "that there is little to gain. *tiles*: mIoU of [climates on satellite tiles]"
    "(../benchmarks.md#climates-of-satellite-tiles), DINOv2-S. *characters*: recall@1 on [characters that were never "
    "trained on](../metric_learning.md#comparison), DINOv2-S. *trained*: trained parameters of a ViT-B/16, in percent "
    "of the backbone's, without the classifier. *bytes*: of the file for swin_tiny, classifier included. *step*, "
    "*kept*: time of a training step and activations kept for the backward pass, relative to full fine-tuning "
    "([ViT-S/16, 8 images](../benchmarks.md#memory-and-time-of-a-step)). Means over three seeds, unless another number "
    f"is given; {NONE}: not measured.",
)


def row(found: Results, name: str, share: float | None) -> list[str]:
    """Make the cells of a method.

    Args:
        found: The results.
        name: Registry name.
        share: Trained share of a ViT-B/16, from 0 to 1; None where the method refuses it.
    """
    stored, cost = found.stored(name), found.cost(name)
    return [
        f"[{name}]({name}.md)",
        *(_mean(found.fewshot(backbone, name), 1) for backbone in FEWSHOT),
        _mean(found.miou(name), 3),
        _mean(found.recall(name), 3),
        NONE if share is None else f"{100 * share:.2f} %",
        _bytes(stored),
        *((NONE, NONE) if cost is None else (f"{cost[0]:.2f}", f"{cost[1]:.2f}")),
    ]


def advice(found: Results) -> Iterator[str]:
    """Say what to try first, with the figures that say so.

    Args:
        found: The results.

    Yields:
        Three sentences.
    """

    def few(name: str) -> str:
        return _mean(found.fewshot("dinov2_vit_s14", name), 1)

    def kept(name: str) -> str:
        cost = found.cost(name)
        return NONE if cost is None else f"{cost[1]:.2f}"

    yield (
        f"**Classification and retrieval**: start with [lora](lora.md), which merges into the backbone and lies beside "
        f"full fine-tuning: {few('lora')} against {few('full')} % with few images on DINOv2-S ({few('linear_probe')} % "
        f"by the probe), recall@1 {_mean(found.recall('lora'), 3)} against {_mean(found.recall('full'), 3)}."
    )
    yield ""
    yield (
        f"**Dense prediction and many tasks**: for one task start with [ssf](ssf.md) (mIoU "
        f"{_mean(found.miou('ssf'), 3)} against {_mean(found.miou('lora'), 3)} of lora and "
        f"{_mean(found.miou('linear_probe'), 3)} of the decoder alone), for several dense tasks on one image "
        "with [mtlora](mtlora.md), which computes them in one pass "
        f"({_percent(found.gain('mtlora'))} over decoders alone on [generated scenes](../multitask.md#comparison)), "
        "and for many separate tasks with one small adapter each, such as lora of 1 bit (preset `bi_lora`: "
        f"{_bytes(found.stored('bi_lora'))} bytes and {_mean(found.fewshot(BYTES, 'bi_lora'), 1)} % on swin_tiny)."
    )
    yield ""
    yield (
        f"**Least memory**: [linear_probe](linear_probe.md) keeps {kept('linear_probe')} of the activations of full "
        f"fine-tuning, [vqt](vqt.md) {kept('vqt')} and [lst](lst.md) {kept('lst')}, since no gradient passes the "
        "backbone; where that is not accurate enough, take lora with `memory: leaner` ([speed](../speed.md))."
    )


def _bytes(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:+.0f} %"
