"""The bars of `gpu.py`: largest shares of one row in another, judged from its figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import timm
import torch

__all__ = ["bar_lines", "judged"]

VIT, SWIN = "vit_large_patch16_224", "swin_base_patch4_window7_224"
RANK = 8


class Bar(NamedTuple):
    """One comparison."""

    model: str
    mode: str
    """``off`` for eager rows, ``on`` for compiled ones."""
    name: str
    other: str
    key: str
    """The figure: ``seconds`` or ``peak_bytes``."""
    most: float
    """Largest share."""
    aim: float | None = None
    """A share to aim at."""


BARS = (
    Bar(VIT, "off", "lora", "peft lora", "seconds", 0.85),
    Bar(VIT, "off", "lora", "full", "seconds", 1.15),
    Bar(VIT, "off", "lora", "full", "peak_bytes", 0.72),
    Bar(VIT, "on", "lora", "peft lora", "seconds", 0.85),
    Bar(VIT, "on", "lora", "full", "seconds", 0.92),
    Bar(VIT, "on", "lora", "full", "peak_bytes", 0.72),
    Bar(VIT, "off", "ssf", "full", "seconds", 0.95),
    Bar(VIT, "off", "ssf", "full", "peak_bytes", 0.95),
    Bar(VIT, "on", "ssf", "full", "seconds", 0.95),
    Bar(VIT, "on", "ssf", "full", "peak_bytes", 0.95),
    Bar(VIT, "off", "vqt", "full", "seconds", 0.50, aim=0.40),
    Bar(VIT, "on", "lst", "full", "seconds", 0.60),
    Bar(SWIN, "off", "lora", "peft lora", "seconds", 0.85),
)
LEAST_RATE = 0.45
"""Share of the card's rate in large bfloat16 products that compiled LoRA is to reach."""


def judged(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge the figures.

    Args:
        record: The record of a run.

    Returns:
        For each bar its text, the share that was found (None if a row is missing) and whether it is met.
    """
    figures = record["figures"]
    found = [_judge(bar, figures) for bar in BARS]
    rows = [row for modes in figures.values() for own in modes.values() for row in own.values()]
    counted = [row["waits"] for row in rows if row.get("waits") is not None]
    waits = sum(counted) if counted else None
    found.append(
        {"bar": "no step waits for the device: 0", "found": waits, "met": None if waits is None else not waits}
    )
    return [*found, _utilisation(record)]


def _judge(bar: Bar, figures: dict[str, Any]) -> dict[str, Any]:
    rows = figures.get(bar.model, {}).get(bar.mode, {})
    values = [rows.get(name, {}).get(bar.key) for name in (bar.name, bar.other)]
    share = values[0] / values[1] if all(values) else None
    what = "step" if bar.key == "seconds" else "peak memory"
    text = (
        f"{bar.model}, {'compiled' if bar.mode == 'on' else 'eager'}: {what} of {bar.name} at most {bar.most:.2f} of "
    )
    text += f"{bar.other}'s" + (f" (aim {bar.aim:.2f})" if bar.aim is not None else "")
    return {"bar": text, "found": share, "met": None if share is None else share <= bar.most}


def _utilisation(record: dict[str, Any]) -> dict[str, Any]:
    """Compare the rate of compiled LoRA with that of a large product."""
    row = record["figures"].get(VIT, {}).get("on", {}).get("lora", {})
    rate, share = record.get("rate"), None
    if rate and row.get("seconds"):
        share = operations(VIT) * record["arguments"]["batch"] / row["seconds"] / rate
    text = f"{VIT}, compiled: aim at {LEAST_RATE:.2f} of the rate of a large bfloat16 product"
    return {"bar": text, "found": share, "met": None if share is None else share >= LEAST_RATE}


def operations(name: str) -> float:
    """Count the floating-point operations of a step of LoRA for one image.

    Per token and block of width d with N tokens they are ``48 d^2 + 96 r d + 14 N d``: forward and gradient of the
    frozen products, the low-rank terms, and attention forward and backward.

    Args:
        name: A plain ViT.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    tokens, width = model.pos_embed.shape[1], model.embed_dim
    return float(len(model.blocks) * tokens * (48 * width**2 + 96 * RANK * width + 14 * tokens * width))


def bar_lines(bars: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Write the judgements as a list.

    Args:
        bars: From `judged`.

    Yields:
        Lines of Markdown.
    """
    for bar in bars:
        met = {None: "not measured", True: "met", False: "not met"}[bar["met"]]
        shown = "" if bar["found"] is None else f": {bar['found']:.2f}"
        yield f"- {bar['bar']}{shown}, {met}"
