"""Porting: an adapter carried to another checkpoint of the same architecture (PortLLM, arXiv 2410.10870).

A change that was trained on W_0 is used on W_1 as it is. That holds for small updates of a backbone and fails quietly
for large ones, so the distance between the two is measured first.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vispeft.adapters.carriers import Carrier, carry_tensors, carry_terms
from vispeft.adapters.changes import class_of
from vispeft.adapters.composing import ComposeBank
from vispeft.adapters.entry import Entry
from vispeft.adapters.holder import BankState
from vispeft.compose.low_rank import decompose
from vispeft.core.families import describe, unwrap
from vispeft.core.sites import View
from vispeft.core.units import Unit, WeightUnit
from vispeft.errors import BaseMismatchError, ConfigError
from vispeft.storage.fingerprint import base_tensors, function_of, pool_of

__all__ = ["REFUSE_ABOVE", "WARN_ABOVE", "Drift", "PortBank", "Ported", "check_architecture", "check_drift"]

logger = logging.getLogger(__name__)

WARN_ABOVE, REFUSE_ABOVE = 0.02, 0.10
"""Relative drift of the backbone from which on porting warns, and refuses by default. Provisional: in a toy (a small
network trained on for 50 to 600 steps on noisy images) a ported LoRA kept 0.82 of 0.85 accuracy at a drift of 0.009,
0.69 at 0.039, 0.64 at 0.109 and 0.27 at 0.291."""

RANK = 1e-5
"""Smallest singular value, over the largest one, that counts for the rank of a difference in float32."""


@dataclass(frozen=True)
class Drift:
    """How far the weights of two backbones are apart."""

    total: float | None
    """``|W_1 - W_0| / |W_0|`` over all tensors (Frobenius); None if the old weights are not there."""
    layers: dict[str, float | None]
    """The same by layer; None for one whose old weights are not there and differ."""

    def __str__(self) -> str:
        """Say it in percent."""
        return "unknown" if self.total is None else f"{100 * self.total:.2f} %"


@dataclass(frozen=True)
class Ported:
    """The result of `AdapterBank.port`."""

    bank: Any
    """The bank of the new backbone, an `AdapterBank`."""
    name: str
    """The adapter on it."""
    method: str
    """The method that it has there."""
    drift: Drift
    """How far the new backbone is from the old one."""
    notes: tuple[str, ...]
    """What a user should know."""


class PortBank(ComposeBank):
    """Porting of adapters."""

    def port(
        self, model: nn.Module, name: str | None = None, *, allow_drift: bool = False, as_delta: bool = False
    ) -> Ported:
        """Carry an adapter and its classifier to another checkpoint of the same architecture.

        Additive changes (LoRA, sparse changes and others) are used as they are; SVFit, whose singular vectors are those
        of the old weights, and copies of whole tensors become differences first. Rules that depend on the weights
        (DoRA, masks, scale and shift) are applied to the new ones, unless `as_delta` is set. Prompts, bottlenecks and
        side networks are copied. Classifiers of the two backbones themselves are not compared, and may have other
        classes. The bank of this model is left as it is.

        Args:
            model: The new backbone, a timm model with or without adapters; it is changed in place as by `attach`.
            name: The adapter; may be left out where only one acts.
            allow_drift: Also port where the weights are more than 10 % apart.
            as_delta: Carry the difference ``W' - W_0`` in place of a rule that depends on the weights.

        Returns:
            The bank of the new backbone, and how far the two backbones are apart.

        Raises:
            BaseMismatchError: If the architecture is another one, or the weights are more than 10 % apart.
            ConfigError: If the adapter has a name that is taken there, or `as_delta` is set and it is no change of
                weights.
        """
        self.check_ready("port an adapter")
        label = self._label(name)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"port({model!r}): give the new backbone, such as one of vispeft.create_model.")
        if unwrap(model) is self._model:
            raise ConfigError("port(...): the new backbone is this model itself. Give another one.")
        view = describe(model)
        check_architecture(self, unwrap(model), view)
        drift = measure(self, unwrap(model), view)
        notes = [*check_drift(drift, allow_drift), *_types(self._model, unwrap(model))]
        entry = self._entries[label]
        head = self._heads.get(label)
        if isinstance(head, nn.Linear) and pool_of(self._model) != pool_of(unwrap(model)):
            raise BaseMismatchError(
                f"The adapter's classifier was trained with pooling {pool_of(self._model)!r}, and the new backbone has "
                f"{pool_of(unwrap(model))!r}. Create it with global_pool={pool_of(self._model)!r}."
            )
        with cast(Any, type(self)).opened(model) as bank:
            with self.changing("port an adapter"):
                carrier, said = self._ported(label, entry, bank, as_delta)
            tasks = list(entry.tasks) if entry.per_task and entry.tasks else None
            bank.place(label, carrier, None if head is None else copy.deepcopy(head), tasks)
            kept = {key: value for key, value in entry.notes.items() if key != "metrics"}
            made_of = {
                "how": "port",
                "parts": [{"name": label, "method": entry.method.name, "digest": self._digest(label)}],
                "drift": "unknown" if drift.total is None else drift.total,
            }
            bank._entries[label].notes |= {**kept, "made_of": made_of}
        return Ported(bank, label, carrier.method.name, drift, (*notes, *said))

    def _ported(self, label: str, entry: Entry, bank: BankState, as_delta: bool) -> tuple[Carrier, list[str]]:
        """Return the method and tensors for the new backbone, and what to say of them."""
        if entry.units and (as_delta or _needs_delta(entry, self._model)):
            return self._as_delta(label, entry, bank)
        if any(unit.kind == "selection" for unit in entry.units.values()):
            return Carrier(entry.method, _moved_copies(self, entry, bank)), []
        stored = entry.method.file_method()
        tensors = entry.state() if stored == entry.method else entry.file_tensors()
        tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        return Carrier(stored, tensors), _said(entry, self._model)

    def _as_delta(self, label: str, entry: Entry, bank: BankState) -> tuple[Carrier, list[str]]:
        """Turn an adapter into a difference of weights."""
        change = self._change(label)
        if change.terms is not None:
            return carry_terms(bank, change.terms), []
        layers = {f"{s.path}.weight": s for s in bank.view.sites if s.rows is None and s.kind in ("linear", "conv")}
        said = f"The {entry.method.name} adapter is a difference of weights now, W' - W_0"
        if change.tensors and set(change.tensors) <= set(layers):
            matrices = {layers[key]: tensor.flatten(1).double() for key, tensor in change.tensors.items()}
            rank = max(int(torch.linalg.matrix_rank(matrix, rtol=RANK)) for matrix in matrices.values())
            if all(rank * sum(matrix.shape) < matrix.numel() for matrix in matrices.values()):
                found = {site: decompose(matrix, rank)[0] for site, matrix in matrices.items()}
                return carry_terms(bank, found), [f"{said}, of rank {rank} at most."]
        return carry_tensors(bank, change.tensors), [f"{said}."]


def _needs_delta(entry: Entry, model: nn.Module) -> bool:
    """Whether a term that does not depend on other changes is computed from the frozen weight (SVFit)."""
    weights = [unit for unit in entry.units.values() if isinstance(unit, WeightUnit)]
    reads = any(
        type(unit).prepare is not Unit.prepare and unit._non_persistent_buffers_set - {"gain"} for unit in weights
    )
    return reads and class_of(entry, model) == "additive"


def _said(entry: Entry, model: nn.Module) -> list[str]:
    """Return what to say of an adapter that is carried over as it is."""
    kinds = {unit.kind for unit in entry.units.values()} - {"shared", "depth"}
    if kinds - {"weight", "delta", "input", "sequential", "affine"}:
        return [f"The tensors of {entry.method.name} are copied as they are; nothing is known of how well that does."]
    if kinds and class_of(entry, model) == "dependent":
        return [f"The rule of {entry.method.name} is applied to the new weights; as_delta carries W' - W_0 instead."]
    return []


def _moved_copies(old: BankState, entry: Entry, new: BankState) -> dict[str, Tensor]:
    """Return copies of tensors for the new backbone: ``W_1 + (W' - W_0)``."""
    before, after = dict(old.base_tensors()), dict(new.base_tensors())
    found = {}
    for item in entry.plan:
        for name, tensor in entry.units[item.key].state_dict().items():
            key = f"{item.site.path}.{name}" if item.site.path else name
            change = tensor.detach().double() - before[key].double()
            if change.shape != after[key].shape:
                change = _resized(key, change, after[key], new)
            found[f"{item.key}.{name}"] = (after[key].double() + change).to(tensor.dtype)
    return found


def _resized(key: str, tensor: Tensor, like: Tensor, bank: BankState) -> Tensor:
    """Interpolate position embeddings (1, N, D) to the number of tokens of another image size."""
    if not key.endswith("pos_embed") or tensor.ndim != 3:
        raise BaseMismatchError(
            f"The adapter has a copy of {key} of shape {tuple(tensor.shape)}, and the new backbone's is "
            f"{tuple(like.shape)}; only position embeddings are interpolated. Create it for images of the same size."
        )
    prefix = bank.view.num_prefix_tokens
    side = math.isqrt(like.shape[1] - prefix)
    resampled = resample_abs_pos_embed(tensor.float(), [side, side], num_prefix_tokens=prefix)
    if resampled.shape != like.shape:
        raise BaseMismatchError(
            f"{key} has shape {tuple(tensor.shape)}, which cannot be interpolated to {tuple(like.shape)}: position "
            "embeddings of square images can. Create the new backbone for square images."
        )
    return resampled.to(tensor.dtype)


# ------------------------------------------------------------------ two backbones


def check_architecture(old: BankState, model: nn.Module, view: View) -> None:
    """Refuse a backbone of another architecture.

    Args:
        old: The bank of the old one.
        model: The new one.
        view: Its description.

    Raises:
        BaseMismatchError: If class, names or shapes of tensors, heads, activations or norms differ. Position tensors
            may have other shapes, and classifiers are not compared.
    """
    say = "This is another architecture, and an adapter is ported between checkpoints of one architecture alone"
    if old.view.model_class != view.model_class:
        raise BaseMismatchError(
            f"{say}: the old backbone is a {old.view.model_class}, the new one a {view.model_class}. Train the adapter "
            "on the new backbone."
        )
    before = {key: tuple(tensor.shape) for key, tensor in old.base_tensors()}
    after = {key: tuple(tensor.shape) for key, tensor in base_tensors(model, view.head_path)}
    other = [key for key in {**before, **after} if (key in before) != (key in after)]
    if other:
        where = "old" if other[0] in before else "new"
        raise BaseMismatchError(
            f"{say}: only the {where} backbone has {other[0]}. Train the adapter on the new backbone."
        )
    for key, shape in before.items():
        if shape != after[key] and key.rpartition(".")[2] not in view.size_bound:
            raise BaseMismatchError(
                f"{say}: {key} has shape {shape} in the old backbone, {after[key]} in the new one. Train the adapter "
                "on the new backbone."
            )
    functions = [{**function_of(m, v), "pool": ""} for m, v in ((old.model, old.view), (model, view))]
    for key in functions[0]:
        if functions[0][key] != functions[1].get(key):
            raise BaseMismatchError(
                f"{say}: {key} is {functions[0][key]} in the old backbone, {functions[1].get(key)} in the new one."
            )


@torch.no_grad()
def measure(old: BankState, model: nn.Module, view: View) -> Drift:
    """Measure how far the weights of two backbones of one architecture are apart, layer by layer.

    Args:
        old: The bank of the old one.
        model: The new one.
        view: Its description.
    """
    squares: dict[str, list[float]] = {}
    for key, before, after in _pairs(dict(old.base_tensors()), dict(base_tensors(model, view.head_path)), view):
        pair = squares.setdefault(key.rpartition(".")[0] or key, [0.0, 0.0])
        pair[0] += float((after - before).square().sum())
        pair[1] += float(before.square().sum())
    layers: dict[str, float | None] = {key: _ratio(*pair) for key, pair in squares.items()}
    return Drift(_ratio(sum(p[0] for p in squares.values()), sum(p[1] for p in squares.values())), layers)


def _pairs(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], view: View
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Iterate over the tensors of two backbones, in double precision; positions of another size are interpolated."""
    for key, old in before.items():
        new = after[key]
        if not old.is_floating_point():
            continue
        wide, other = old.detach().double().cpu(), new.detach().double().cpu()
        if old.shape != new.shape:
            if not key.endswith("pos_embed"):
                continue  # tables of another window have no counterpart
            side = math.isqrt(new.shape[1] - view.num_prefix_tokens)
            wide = resample_abs_pos_embed(wide.float(), [side, side], num_prefix_tokens=view.num_prefix_tokens).double()
            if wide.shape != other.shape:
                continue
        yield key, wide, other


def _ratio(difference: float, size: float) -> float:
    return math.sqrt(difference / size) if size else (0.0 if not difference else math.inf)


def check_drift(drift: Drift, allow_drift: bool) -> list[str]:
    """Warn of backbones that are apart, and refuse those too far.

    Args:
        drift: What was measured.
        allow_drift: Whether a large one is accepted.

    Returns:
        What was warned of.

    Raises:
        BaseMismatchError: If they are more than 10 % apart and that is not accepted.
    """
    worst = max(drift.layers, key=lambda key: drift.layers[key] or 0.0, default="")
    most = f"; most in {worst} ({100 * (drift.layers[worst] or 0.0):.1f} %)" if worst and drift.total else ""
    if drift.total is None:
        said = "The old backbone is not there, so nobody knows how far the new one is from it. Measure the adapter."
    elif drift.total <= WARN_ABOVE:
        return []
    elif drift.total <= REFUSE_ABOVE or allow_drift:
        said = (
            f"The new backbone is {drift} away from the old one{most}; above {WARN_ABOVE:.0%} a ported adapter loses "
            "accuracy. Measure it, and refit its classifier on some batches (refit_head)."
        )
    else:
        raise BaseMismatchError(
            f"The new backbone is {drift} away from the old one{most}; above {REFUSE_ABOVE:.0%} a ported adapter is "
            "mostly lost. Train the adapter again, or pass allow_drift=True (--allow-drift) and measure it."
        )
    logger.warning("%s", said)
    return [said]


def _types(old: nn.Module, new: nn.Module) -> list[str]:
    """Say where the two backbones have weights of other precision."""
    kinds = [str(next(m.parameters()).dtype).removeprefix("torch.") for m in (old, new)]
    if kinds[0] == kinds[1]:
        return []
    said = f"The old backbone is in {kinds[0]}, the new one in {kinds[1]}: its rounding is part of the drift."
    logger.warning("%s", said)
    return [said]
