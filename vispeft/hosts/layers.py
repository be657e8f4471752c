"""The hosts of single layers: linear, norm, convolution, identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispeft.core.units import (
    AffineUnit,
    DeltaUnit,
    InputUnit,
    SequentialUnit,
    Unit,
    WeightUnit,
)
from vispeft.hosts.base import Host, U
from vispeft.hosts.functional import affine, low_rank_linear

__all__ = ["ConvHost", "IdentityHost", "LinearHost", "NormHost", "ReadLinearHost", "ReaderHost", "ShiftlessNormHost"]

_BEFORE_INPUT: tuple[type[Unit], ...] = (WeightUnit, DeltaUnit, SequentialUnit)


COMPOSITION: tuple[type[Unit], ...] = (*_BEFORE_INPUT, InputUnit, AffineUnit)


"""The order in which units are written into a layer. A change of the input comes after everything that reads it."""


class _Foldable(Host):
    """A layer with a weight and a bias into which units can be written."""

    folds: tuple[type[Unit], ...] = (AffineUnit,)
    """The kinds that `read` writes into the tensors, in the order of composition."""
    foldable: tuple[str, ...] = ("weight", "bias")
    """The tensors of a plain layer that hold all of it."""

    def read(self, name: str) -> Tensor | None:
        own = self.own(name)
        value = self.folded(name, self.folds, own)
        # Units may be wider than the base; timm's own code goes on in the base's type.
        like = self.own("weight") if own is None else own
        return value if value is None or like is None else value.to(like.dtype)

    def plain_tensors(self) -> dict[str, Tensor | None]:
        plain = {name: self._plain(name) for name in self.foldable}
        return {name: value for name, value in plain.items() if value is not None}

    def _plain(self, name: str) -> Tensor | None:
        own = self.own(name)
        return self.folded(name, COMPOSITION, None if own is None else own.detach().double())

    def folded(self, name: str, kinds: tuple[type[Unit], ...], value: Tensor | None) -> Tensor | None:
        """Write units into a weight or bias, kind after kind in the order of composition."""
        live = [unit for kind in kinds for unit in self._written(kind)]
        if value is None and live:
            value = self.missing(name, live)
        if value is None:
            return None
        for unit in live:
            value = unit.fold_weight(value) if name == "weight" else self._shifted(value, unit)
        return value

    def _shifted(self, bias: Tensor, unit: Unit) -> Tensor:
        return unit.fold_bias(bias)

    def _written(self, kind: type[U]) -> list[U]:
        """List units in the order in which they are written: of two changes of the input, the nearer one first."""
        units = list(self.units(kind))
        return units[::-1] if issubclass(kind, InputUnit) else units

    def missing(self, name: str, live: Sequence[Unit]) -> Tensor | None:
        """Make the neutral tensor where the base has none and units need one."""
        weight = self.own("weight")
        if name != "bias" or weight is None or not any(unit.shifts() for unit in live):
            return None
        return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)


class LinearHost(_Foldable):
    """An adapted ``nn.Linear``: a changed input, the product, low-rank terms, what follows, then scale and shift."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., out) from (..., in)."""
        for entering in self.units(InputUnit):
            x = entering.enter(x)
        out = self._product(x)
        for following in self.units(SequentialUnit):
            out = following.follow(x, out)
        for unit in self.units(AffineUnit):
            out = affine(out, unit.scale, unit.shift)
        return out

    def read(self, name: str) -> Tensor | None:
        return self.own(name)

    def input_bias(self, unit: InputUnit, dtype: torch.dtype) -> Tensor:
        """Compute what the shift of a changed input adds behind the layer.

        Args:
            unit: The unit that changes it.
            dtype: Type to compute in.

        Returns:
            (out,).
        """
        weight = self.folded("weight", _BEFORE_INPUT, cast(Tensor, self.own("weight")).to(dtype))
        assert weight is not None
        for nearer in self._written(InputUnit):
            if nearer is unit:
                break
            weight = nearer.fold_weight(weight)
        return weight @ unit.input_shift().to(weight.dtype)

    def _shifted(self, bias: Tensor, unit: Unit) -> Tensor:
        return bias + self.input_bias(unit, bias.dtype) if isinstance(unit, InputUnit) else unit.fold_bias(bias)

    def _product(self, x: Tensor) -> Tensor:
        branches = [branch for unit in self.units(DeltaUnit) for branch in unit.branches()]
        weight, bias = self._whole_weight(), self.own("bias")
        return low_rank_linear(x, weight, bias, branches) if branches else F.linear(x, weight, bias)

    def _whole_weight(self) -> Tensor:
        """Give the weight that the product is computed with, in the base's type."""
        own = cast(Tensor, self.own("weight"))
        return cast(Tensor, self.folded("weight", (WeightUnit,), own)).to(own.dtype)


class ReadLinearHost(LinearHost):
    """A linear layer whose weight the model reads: units are written into the weight on every read.

    Where the owner calls it after all (low-rank terms only, see `ReaderHost`), it acts as a `LinearHost`.
    """

    folds = COMPOSITION
    foldable = ("weight",)

    def read(self, name: str) -> Tensor | None:
        return _Foldable.read(self, name)


class ReaderHost(Host):
    """An attention module that reads ``qkv.weight`` and keeps the biases itself (SwinV2, EVA-02).

    The biases are computed on read from the units of the projection. For low-rank terms alone, which leave the biases
    as they are, timm's own switch makes the module call the projection, whose host then adds the terms cheaply; the
    switch adds the bias behind the layer and in place, which is wrong for everything else.
    """

    qkv: nn.Linear

    @property
    def qkv_bias_separate(self) -> bool:
        """Tell timm whether to call the projection and add the biases itself."""
        if self._projection_has(AffineUnit):
            return False
        return self._projection_has(DeltaUnit, InputUnit) or bool(self.__dict__["qkv_bias_separate"])

    def read(self, name: str) -> Tensor | None:
        value = self.own(name)
        # A projection that is called changes its input itself; only where its weight is read must biases hold it all.
        read_whole = value is not None and name in _BIASES and self._projection_has(AffineUnit)
        return self._whole_bias(name, value) if read_whole and value is not None else value

    def _whole_bias(self, name: str, value: Tensor) -> Tensor:
        """Write the projection's units into one of the biases."""
        start = _BIASES.index(name) * value.numel()
        rows = slice(start, start + value.numel())
        whole = value
        for entering in self._projection_units(InputUnit):
            whole = whole + cast(LinearHost, self.qkv).input_bias(entering, value.dtype)[rows]
        for unit in self._projection_units(AffineUnit):
            whole = unit.scale[rows] * whole + unit.shift[rows]
        return whole.to(value.dtype)

    def acts(self) -> bool:
        return super().acts() or self._projection_has(AffineUnit, InputUnit)

    def plain_tensors(self) -> dict[str, Tensor | None]:
        if not self._projection_has(AffineUnit, InputUnit):
            return super().plain_tensors() if super().acts() else {}
        # timm's key bias is a buffer that no state dict holds: a shift there needs one plain bias of the projection.
        biases = [self._whole_bias(name, cast(Tensor, self.own(name)).detach().double()) for name in _BIASES]
        return {"qkv.bias": torch.cat(biases), **dict.fromkeys(_BIASES)}

    def _projection_units(self, kind: type[U]) -> Iterator[U]:
        if isinstance(self.qkv, Host):
            yield from self.qkv.units(kind)

    def _projection_has(self, *kinds: type[Unit]) -> bool:
        return any(True for kind in kinds for _ in self._projection_units(kind))


_BIASES = ("q_bias", "k_bias", "v_bias")


class ConvHost(_Foldable):
    """An adapted convolution: scale and shift are written into weight and bias on read."""


class NormHost(_Foldable):
    """An adapted norm: scale and shift are written into weight and bias on read.

    Nothing but the norm's own input is then kept for the backward pass.
    """

    def missing(self, name: str, live: Sequence[Unit]) -> Tensor | None:
        unit = next(self.units(AffineUnit))
        fill = torch.ones if name == "weight" else torch.zeros
        return fill(unit.scale.numel(), dtype=unit.scale.dtype, device=unit.scale.device)


class ShiftlessNormHost(NormHost):
    """An adapted norm that has a weight only (RMSNorm): the shift is added behind it."""

    foldable = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shape of `x`."""
        out = super().forward(x)
        shift = self.trailing_shift()
        return out if shift is None else out + shift.to(out.dtype)

    def trailing_shift(self) -> Tensor | None:
        """Sum up what is added behind the norm, (width,)."""
        total: Tensor | None = None
        for unit in self.units(AffineUnit):
            total = unit.shift if total is None else unit.scale * total + unit.shift
        return total


class IdentityHost(Host):
    """An affine map where the model has an identity (the place of the last norm under average pooling)."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shape of `x`."""
        for unit in self.units(AffineUnit):
            x = affine(x, unit.scale, unit.shift)
        return x

    def no_plain_form(self) -> str | None:
        return "the model has an identity here, and no plain layer scales and shifts in its place"
