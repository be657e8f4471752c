"""Whether the inputs of scales and shifts can be recovered from their outputs: asked of the device once per step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vispeft.core.generated import steps_taken
from vispeft.core.units import AffineUnit

__all__ = ["RECOVERY", "Recoveries", "recoverable"]

RECOVERY = 64
"""Largest factor by which recovering an affine map's input from its output may amplify rounding errors."""


def recoverable(scale: Tensor, shift: Tensor) -> Tensor:
    """Tell for each channel whether the input of an affine map can be recovered from its output.

    With ``out`` rounded to ``eps |out|``, ``(out - shift) / scale`` is off by ``eps (|y| + |shift| / |scale|)``.

    Args:
        scale: (channels,).
        shift: (channels,).

    Returns:
        Booleans (channels,); False where a value is not a number.
    """
    return scale.abs() * RECOVERY >= shift.abs() + 1


class Recoveries:
    """The answers for the units of one model.

    The host needs an answer before it can go on, so that every question waits for the device. All units are asked at
    once, and again after a step of any optimiser or a counted change of a tensor.
    """

    def __init__(self) -> None:
        """Begin without answers."""
        self._held: dict[int, tuple[AffineUnit, tuple[Any, ...], bool]] = {}
        self.questions = 0
        """How often the device was asked."""

    def drop(self) -> None:
        """Forget all answers."""
        self._held.clear()

    def of(self, unit: AffineUnit, units: Iterable[AffineUnit]) -> bool:
        """Return whether the input of a unit can be recovered in all channels.

        Args:
            unit: The unit.
            units: All units that act, to ask for them too.
        """
        held = self._held.get(id(unit))
        if held is None or held[1] != _state(unit):
            alike = {id(other): other for other in (unit, *units) if _is_like(other, unit)}
            self._ask(list(alike.values()))
            held = self._held[id(unit)]
        return held[2]

    def _ask(self, units: list[AffineUnit]) -> None:
        with torch.no_grad():
            fits = recoverable(torch.cat([u.scale for u in units]), torch.cat([u.shift for u in units]))
            ends = torch.tensor([u.scale.numel() for u in units]).cumsum(0).to(fits.device, non_blocking=True)
            misses = (~fits).cumsum(0)[ends - 1].tolist()
        self.questions += 1
        for unit, before, after in zip(units, [0, *misses[:-1]], misses, strict=True):
            self._held[id(unit)] = unit, _state(unit), before == after


def _is_like(unit: AffineUnit, other: AffineUnit) -> bool:
    return unit.scale.device == other.scale.device and unit.scale.dtype == other.scale.dtype


def _state(unit: AffineUnit) -> tuple[Any, ...]:
    scale, shift = unit.scale, unit.shift
    return steps_taken(), scale.data_ptr(), scale._version, shift.data_ptr(), shift._version
