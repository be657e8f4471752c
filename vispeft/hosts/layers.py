"""The hosts of single layers: linear, norm, convolution, identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import timm.layers
import torch
from torch import Tensor, nn

from vispeft.core.low_rank import Branch, Dropout
from vispeft.core.origin import Origin, note_origin
from vispeft.core.route import NOTHING, Acting, Routing
from vispeft.core.tracing import in_graph
from vispeft.core.units import AffineUnit, DeltaUnit, InputUnit, LayerPass, Unit, WeightUnit
from vispeft.hosts.affine import affine, affine_linear, affine_norm, may_recover, scaled_linear
from vispeft.hosts.base import Host
from vispeft.hosts.computed import computed_linear
from vispeft.hosts.functional import compute_dtype, computes_again, frozen_linear, leaves_a_graph
from vispeft.hosts.low_rank import low_rank_linear, low_rank_terms, term_linear
from vispeft.hosts.products import as_rows, product
from vispeft.hosts.streams import Streams

__all__ = [
    "BIASES",
    "ConvHost",
    "IdentityHost",
    "LinearHost",
    "NormHost",
    "ReadLinearHost",
    "ReaderHost",
    "ShiftlessNormHost",
]

_BEFORE_INPUT = ("weight", "delta", "sequential")
COMPOSITION = (*_BEFORE_INPUT, "input", "affine")
"""The order, by kind, in which units are merged into a layer. Input units follow the kinds that read the input."""
BIASES = ("q_bias", "k_bias", "v_bias")
"""The biases kept by an attention module that reads the weight of its projection."""


def gained(unit: Unit, before: Tensor, after: Tensor) -> Tensor:
    """Scale a unit's change of a tensor by its gain.

    Args:
        unit: The unit.
        before: The tensor without it.
        after: The tensor with it.
    """
    return after if unit.gain is None else torch.lerp(before.to(after.dtype), after, unit.gain.to(after.dtype))


class _Foldable(Host):
    """A layer with a weight and a bias into which units can be merged."""

    folds: tuple[str, ...] = ("affine",)
    """The kinds of units that `read` merges into the tensors, in the order of composition."""
    foldable: tuple[str, ...] = ("weight", "bias")
    """The tensors of the plain layer."""

    def read(self, name: str) -> Tensor | None:
        """Compute a tensor with the units merged into it, in the base's dtype."""
        own = self.own(name)
        value = self.folded(name, self.folds, own)
        # Units may have a wider dtype than the base; timm's own code continues in the base's.
        like = self.own("weight") if own is None else own
        return value if value is None or like is None else value.to(like.dtype)

    def plain_tensors(self) -> dict[str, Tensor | None]:
        """Compute the tensors of the equivalent plain layer, in double precision."""
        plain = {name: self._plain(name) for name in self.foldable}
        return {name: value for name, value in plain.items() if value is not None}

    def _plain(self, name: str) -> Tensor | None:
        own = self.own(name)
        return self.folded(name, COMPOSITION, None if own is None else own.detach().double())

    def folded(self, name: str, kinds: tuple[str, ...], value: Tensor | None) -> Tensor | None:
        """Merge units into a weight or bias, kind by kind in the order of composition."""
        live = [unit for kind in kinds for unit in self._written(kind)]
        if value is None and live:
            value = self.missing(name, live)
        if value is None:
            return None
        for unit in live:
            after = unit.fold_weight(value) if name == "weight" else self._shifted(value, unit)
            value = gained(unit, value, after)
        return value

    def _shifted(self, bias: Tensor, unit: Unit) -> Tensor:
        return unit.fold_bias(bias)

    def _written(self, kind: str) -> Sequence[Unit]:
        """List units in merging order: of several input units, the one nearest to the layer comes first."""
        units: tuple[Unit, ...] = getattr(self.acting, kind)
        return units[::-1] if kind == "input" else units

    def missing(self, name: str, live: Sequence[Unit]) -> Tensor | None:
        """Create the neutral tensor if the base has none and a unit needs one."""
        weight = self.own("weight")
        if name != "bias" or weight is None or not any(unit.needs_bias() for unit in live):
            return None
        return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)


def affine_by(unit: AffineUnit, x: Tensor, routing: Routing | None = None) -> Tensor:
    """Scale and shift by a unit, (..., channels).

    Args:
        unit: The unit.
        x: The input.
        routing: The route of the model, which knows whether the input can be recovered; None to ask for this unit.
    """
    if unit.gain is None:
        recovers = None
        if routing is not None and may_recover(x, unit.scale):
            recovers = routing.memory != "plain" and routing.recovers(unit)
        return affine(x, unit.scale, unit.shift, recovers)
    return affine(x, 1 + unit.gain * (unit.scale - 1), unit.gain * unit.shift)


def _changed(units: Sequence[WeightUnit], weight: Tensor) -> Tensor:
    """Compute the weight that units change as a whole, in the dtype of the frozen one."""
    value = weight
    for unit in units:
        value = gained(unit, value, unit.fold_weight(value))
    return value.to(weight.dtype)


def terms_of(units: Sequence[DeltaUnit]) -> list[Branch]:
    """List the low-rank terms of units, their gains included."""
    terms: list[Branch] = []
    for unit in units:
        gain, own = unit.gain, unit.branches()
        terms += own if gain is None else [dataclasses.replace(term, b=term.b * gain) for term in own]
    return terms


def _computes_alone(x: Tensor, weight: Tensor) -> bool:
    """Return whether nothing records a product, and its operands have its type."""
    return not (torch.is_grad_enabled() or leaves_a_graph()) and weight.dtype == x.dtype == compute_dtype(x, weight)


def _before(acting: Acting, x: Tensor) -> Tensor:
    """Apply the units that act on the input."""
    for unit in acting.input:
        x = gained(unit, x, unit.transform_input(x))
    return x


def _after(acting: Acting, x: Tensor, out: Tensor, routing: Routing) -> Tensor:
    """Apply the units that act on the output."""
    for following in acting.sequential:
        out = gained(following, out, following.after(x, out))
    for unit in acting.affine:
        out = affine_by(unit, out, routing)
    return out


class LinearHost(_Foldable):
    """An adapted ``nn.Linear``: input units, product, low-rank terms, sequential units, scale and shift."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., out) from (..., in)."""
        acting, casts = self.acting, self.routing.casts
        if acting.lone is not None and not in_graph():
            term = term_linear(x, self, acting.lone, casts, self.routing.memory == "leaner")
            if term is not None:
                return term
        if acting.scaling is not None and not in_graph():
            scaled = scaled_linear(x, self, acting.scaling, casts)
            if scaled is not None:
                return scaled
        x = _before(acting, x) if acting.input else x
        if acting.weight:
            out = low_rank_terms(x, self._computed(acting, x), terms_of(acting.delta))
            return _after(acting, x, out, self.routing)
        weight, bias = cast(Tensor, self.own("weight", acting)), self.own("bias", acting)
        if acting.affine and self._keeps_input(x, weight, bias, acting):
            return affine_linear(x, weight, bias, acting.affine[0].scale, acting.affine[0].shift)
        if acting.delta:
            out = low_rank_linear(x, weight, bias, terms_of(acting.delta), casts)
        elif acting.routed and _computes_alone(x, weight):
            # The product of a single adapter's term (`term_linear`), which is faster than `F.linear`.
            out = product(as_rows(x), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])
        else:
            out = frozen_linear(x, weight, bias, casts, acting is NOTHING and self.routing.memory == "leaner")
        return _after(acting, x, out, self.routing) if acting.sequential or acting.affine else out

    def _keeps_input(self, x: Tensor, weight: Tensor, bias: Tensor | None, acting: Acting) -> bool:
        """Return whether `affine_linear` serves: for one scale and shift behind a frozen square layer."""
        if self.routing.memory == "plain" or weight.shape[0] != weight.shape[1] or weight.requires_grad:
            return False
        if len(acting.affine) > 1 or acting.delta or acting.sequential or (bias is not None and bias.requires_grad):
            return False
        unit = acting.affine[0]
        return unit.gain is None and weight.dtype == torch.float32 and may_recover(x, unit.scale)

    def split(self, streams: Streams) -> Streams:
        """Run the layer on all streams; branch units read the frozen product as well as the shared output."""
        acting = self.acting
        if not acting.branch:
            return streams.each(self)
        x = _before(acting, streams.tokens)
        if acting.weight:
            frozen = self._computed(acting, x)
        else:
            own = cast(Tensor, self.own("weight", acting))
            frozen = frozen_linear(x, own, self.own("bias", acting), self.routing.casts)
        layer = LayerPass(x, streams.beside, frozen, frozen)
        for term in terms_of(acting.delta):
            between = dataclasses.replace(term, dropout=Dropout(term.dropout.at("hidden"), "hidden"))
            layer.shared = low_rank_terms(layer.dropped(term.dropout.at("input")), layer.shared, [between])
        layer.shared = _after(acting, x, layer.shared, self.routing)
        beside: dict[str, Tensor] = {}
        for unit in acting.branch:
            beside |= unit.branches(layer)
        for unit in acting.branch:
            layer.shared = unit.join(layer, beside)
        others = {name: self(y) for name, y in streams.beside.items() if name not in beside}
        return Streams(layer.shared, {**others, **beside}, streams.rules)

    def read(self, name: str) -> Tensor | None:
        """Return the base's tensor: units act in the forward pass."""
        return self.own(name)

    def input_bias(self, unit: InputUnit, dtype: torch.dtype) -> Tensor:
        """Compute the layer's output for the shift of an input unit: the equivalent output bias.

        Args:
            unit: The input unit.
            dtype: Dtype to compute in.

        Returns:
            (out,).
        """
        weight = self.folded("weight", _BEFORE_INPUT, cast(Tensor, self.own("weight")).to(dtype))
        assert weight is not None
        for nearer in self._written("input"):
            if nearer is unit:
                break
            weight = gained(nearer, weight, nearer.fold_weight(weight))
        return weight @ unit.input_shift().to(weight.dtype)

    def _shifted(self, bias: Tensor, unit: Unit) -> Tensor:
        return bias + self.input_bias(unit, bias.dtype) if isinstance(unit, InputUnit) else unit.fold_bias(bias)

    def no_plain_form(self) -> str | None:
        """Return why no plain layer is equivalent; None if one is."""
        return "no plain layer has several outputs" if self.acting.branch else super().no_plain_form()

    def _computed(self, acting: Acting, x: Tensor) -> Tensor:
        """Compute the product with a weight that units change as a whole, of which no copy is kept."""
        weight, bias = cast(Tensor, self.own("weight", acting)), self.own("bias", acting)
        return computed_linear(x, weight, bias, _changed, acting.weight, self.routing.memory != "plain")


class ReadLinearHost(LinearHost):
    """A linear layer whose weight the model reads: units are merged into the weight on every read.

    If its owner calls it instead (low-rank terms or changes of the weight act, see `ReaderHost`), it works as a
    `LinearHost`.
    """

    folds = COMPOSITION
    foldable = ("weight",)

    def read(self, name: str) -> Tensor | None:
        """Compute a tensor with the units merged into it."""
        return _Foldable.read(self, name)


class ReaderHost(Host):
    """An attention module that reads ``qkv.weight`` and keeps the biases itself (SwinV2, EVA-02).

    The biases are computed on read from the units of the projection. If only low-rank terms and changes of the weight
    act, which leave the biases unchanged, timm's ``qkv_bias_separate`` makes the module call the projection, whose host
    adds the terms cheaply and keeps no changed weight. The bias is then added in place after the layer, which would be
    wrong for other kinds of units.
    """

    qkv: nn.Linear

    @property
    def qkv_bias_separate(self) -> bool:
        """Whether timm calls the projection and adds the biases separately."""
        acting = self._projection()
        if acting.affine:
            return False
        return bool(acting.delta or acting.input or acting.weight) or bool(self.__dict__["qkv_bias_separate"])

    def read(self, name: str) -> Tensor | None:
        """Compute a tensor; a bias of the projection includes the projection's units."""
        value = self.own(name)
        # A projection that is called applies its input units itself; the biases must include them only if it is read.
        read_whole = value is not None and name in BIASES and bool(self._projection().affine)
        return self._whole_bias(name, value) if read_whole and value is not None else value

    def _whole_bias(self, name: str, value: Tensor) -> Tensor:
        """Merge the projection's units into one of the biases."""
        start = BIASES.index(name) * value.numel()
        rows = slice(start, start + value.numel())
        whole = value
        acting = self._projection()
        for entering in acting.input:
            added = cast(LinearHost, self.qkv).input_bias(entering, value.dtype)[rows]
            whole = gained(entering, whole, whole + added)
        for unit in acting.affine:
            whole = gained(unit, whole, unit.scale[rows] * whole + unit.shift[rows])
        return whole.to(value.dtype)

    def acts(self) -> bool:
        """Return whether a unit acts here or changes a bias of the projection."""
        return super().acts() or self._changes_biases()

    def plain_tensors(self) -> dict[str, Tensor | None]:
        """Compute the tensors of the equivalent plain module, in double precision."""
        if not self._changes_biases():
            return super().plain_tensors() if super().acts() else {}
        # timm's key bias is a non-persistent buffer: a shift there needs one plain bias of the projection.
        biases = [self._whole_bias(name, cast(Tensor, self.own(name)).detach().double()) for name in BIASES]
        return {"qkv.bias": torch.cat(biases), **dict.fromkeys(BIASES)}

    def _projection(self) -> Acting:
        """Return the units that act at the projection."""
        return self.qkv.acting if isinstance(self.qkv, Host) else NOTHING

    def _changes_biases(self) -> bool:
        acting = self._projection()
        return bool(acting.affine or acting.input)


class ConvHost(_Foldable):
    """An adapted convolution: weight changes, low-rank terms, scale and shift are merged into it on read."""

    folds = ("weight", "delta", "affine")

    def folded(self, name: str, kinds: tuple[str, ...], value: Tensor | None) -> Tensor | None:
        """Merge units into the weight or bias; units see the weight as a matrix (out, in x height x width)."""
        if value is None or name != "weight":
            return super().folded(name, kinds, value)
        written = super().folded(name, kinds, value.flatten(1))
        return None if written is None else written.view(-1, *value.shape[1:])


_LAYER_NORMS = (nn.LayerNorm.forward, timm.layers.LayerNorm.forward)
"""Forward passes that `_norm_again` repeats; subclasses may compute something else."""


def _norm_again(shape: Sequence[int], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute a norm as the forward pass did, whatever autocast does now."""
    return torch.native_layer_norm(x, shape, weight, bias, eps)[0]


class NormHost(_Foldable):
    """An adapted norm: scale and shift are merged into weight and bias on read.

    The backward pass then needs no activation but the norm's own input. Where nothing acts here, it stands in
    front of an adapted layer, which keeps the norm's input too, in place of its output.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shape of `x`."""
        acting = self.acting
        if acting.scaling is not None and self.replaces.forward in _LAYER_NORMS and not self.fast():
            made = affine_norm(x, cast(Any, self), acting.scaling)
            if made is not None:
                return made
        out: Tensor = super().forward(x)
        # Under autocast a norm in reduced precision returns float32, and outside of it, later, it would not.
        notes = self.routing.memory != "plain" and out.dtype == x.dtype and computes_again(x)
        if not notes or acting is not NOTHING or self.replaces.forward not in _LAYER_NORMS or self.fast():
            return out
        compute = partial(_norm_again, *cast(Any, (self.normalized_shape, self.eps)))
        return note_origin(out, Origin(compute, 3), (x, self.own("weight", acting), self.own("bias", acting)))

    def fast(self) -> bool:
        """Return whether timm computes the norm in another way, with less precision."""
        return bool(getattr(self, "_fast_norm", False))

    def missing(self, name: str, live: Sequence[Unit]) -> Tensor | None:
        """Create the neutral tensor if the base has none."""
        unit = self.acting.affine[0]
        fill = torch.ones if name == "weight" else torch.zeros
        return fill(unit.scale.numel(), dtype=unit.scale.dtype, device=unit.scale.device)


class ShiftlessNormHost(NormHost):
    """An adapted norm without a bias (RMSNorm): the shift is added to its output."""

    foldable = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shape of `x`."""
        out = super().forward(x)
        shift = self.trailing_shift()
        return out if shift is None else out + shift.to(out.dtype)

    def trailing_shift(self) -> Tensor | None:
        """Compute the total shift of the norm's output, (width,); None for none."""
        total: Tensor | None = None
        for unit in self.acting.affine:
            before = torch.zeros_like(unit.shift) if total is None else total
            total = gained(unit, before, unit.scale * before + unit.shift)
        return total


class IdentityHost(Host):
    """An affine map in place of an identity (that of the last norm under average pooling)."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shape of `x`."""
        for unit in self.acting.affine:
            x = affine_by(unit, x, self.routing)
        return x

    def no_plain_form(self) -> str | None:
        """Return why no plain layer is equivalent."""
        return "the model has an identity here, and no plain layer scales and shifts in its place"
