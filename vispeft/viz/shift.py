"""How an adapter changes what passes through the blocks of a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from vispeft.core.modes import evaluating
from vispeft.errors import ConfigError
from vispeft.hosts.model import BANK
from vispeft.viz.names import drawn_names, settings_for
from vispeft.viz.style import SERIES, save

__all__ = ["Shift", "activation_shift", "draw_shift"]


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far the output of one block moves when the adapters act."""

    block: int
    """Index of the block."""
    relative: float
    """Length of the difference over the length of the frozen model's output, averaged over all tokens; 0 without a
    change."""
    cosine: float
    """Cosine between both outputs, averaged over all tokens; 1 without a change of direction."""


@torch.no_grad()
def activation_shift(model: nn.Module, images: Tensor) -> list[Shift]:
    """Compare the outputs of every block with the adapters that act, and with none.

    Prefix tokens and patches are compared; inserted tokens, which the frozen model lacks, are left out.

    Args:
        model: A model with adapters, some of which act.
        images: Normalised images (B, 3, H, W) on the model's device.

    Returns:
        One entry for each block, in their order.

    Raises:
        ConfigError: If the model has no adapter, or none acts.
        BackboneError: If the images do not fit the model.
    """
    adapted: Any = model
    bank: Any = model.__dict__.get(BANK)
    if bank is None or not bank.active:
        raise ConfigError("No adapter acts on this model, so nothing is shifted. Attach or choose one before.")
    every = frozenset(range(bank.view.depth))
    with evaluating(model):
        after = adapted.run(images, taken=every).taps
        with bank.disabled():
            before = adapted.run(images, taken=every).taps
    return [_compared(block, before[block], after[block]) for block in sorted(every)]


def _compared(block: int, before: Tensor, after: Tensor) -> Shift:
    """Compare outputs (..., D)."""
    old, new = before.float().flatten(0, -2), after.float().flatten(0, -2)
    lengths = old.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    relative = cast(Tensor, (new - old).norm(dim=1) / lengths).mean()
    return Shift(block=block, relative=float(relative), cosine=float(F.cosine_similarity(old, new, dim=1).mean()))


def draw_shift(shifts: Mapping[str, Sequence[Shift]], path: str | Path) -> Path:
    """Draw the shift of each block: its relative length, and the cosine.

    Args:
        shifts: Results of `activation_shift` by the name of the adapter.
        path: The PNG file.

    Returns:
        The PNG file.

    Raises:
        ConfigError: If there is nothing to draw.
        FileError: If the picture cannot be written.
    """
    if not any(shifts.values()):
        raise ConfigError("There is no shift to draw.")
    names = drawn_names([*shifts])
    with matplotlib.rc_context(settings_for([*shifts])):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, (name, found) in enumerate(zip(names, shifts.values(), strict=True)):
            blocks = [shift.block for shift in found]
            style = {"color": SERIES[index % 8], "marker": "o", "ms": 4, "label": name}
            left.plot(blocks, [shift.relative for shift in found], **style)
            right.plot(blocks, [shift.cosine for shift in found], **style)
        left.set(xlabel="block", ylabel="length of the change / length before", ylim=(0, None))
        right.set(xlabel="block", ylabel="cosine of before and after")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(names) > 1:
            left.legend(fontsize=8)
        return save(figure, path)
