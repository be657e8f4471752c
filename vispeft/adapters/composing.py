"""Composing adapters into a new one: sums, averages, TIES, DARE and terms of low rank, on changes of weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Generator, Tensor, nn

from vispeft.adapters.archive import FileBank
from vispeft.adapters.carriers import Carrier, carry_tensors, carry_terms
from vispeft.adapters.changes import Change, Class, read_change
from vispeft.adapters.heads import LowBitHead
from vispeft.adapters.stacking import check_weights
from vispeft.compose.arithmetic import Sign, dare, draw_mask, ties, weighted_sum
from vispeft.compose.low_rank import Term, compress, concatenate, decompose
from vispeft.core.route import Route
from vispeft.core.sites import Site
from vispeft.errors import ConfigError, UnknownNameError

__all__ = ["ComposeBank", "Composed", "How"]

How = Literal["average", "sum", "concat", "svd", "ties", "dare"]
_SHARED = frozenset({"average", "dare"})
"""The ways whose weights are 1 / n by default; those of the others are 1."""
_ELECTING = frozenset({"ties", "dare"})
"""The ways that take single entries away, after which a term is not of low rank."""


@dataclass(frozen=True)
class Part:
    """One adapter of a composition."""

    name: str
    """Its name on the model."""
    method: str
    """Its method."""
    kind: Class
    """Its class of composition."""
    weight: float
    """Its weight."""
    digest: str
    """sha256 of its tensors."""


@dataclass(frozen=True)
class Composed:
    """The result of `AdapterBank.compose`."""

    name: str
    """The new adapter."""
    how: How
    """How it was made."""
    parts: tuple[Part, ...]
    """The adapters that it was made of."""
    method: str
    """The method that holds it: ``lora``, ``sparse``, ``full`` or ``linear_probe``."""
    rank: int | None
    """Rank of its terms; None if it has none."""
    kept_energy: float | None
    """Share of the sum of squared singular values that a lower rank kept, over all layers; None if none was cut."""
    layers: dict[str, float]
    """The same by layer."""
    head: str | None
    """The adapter whose classifier it has, ``average`` of all, or None."""
    settings: dict[str, Any]
    """Density, sign and seed, where they matter."""

    def made_of(self) -> dict[str, Any]:
        """Return plain values for the file."""
        return {
            "how": self.how,
            "parts": [dict(vars(part)) for part in self.parts],
            "head": self.head,
            "rank": self.rank,
            "kept_energy": self.kept_energy,
            **self.settings,
        }


@dataclass(frozen=True)
class _Request:
    """What was asked for."""

    how: How
    names: tuple[str, ...]
    weights: tuple[float, ...]
    rank: int | None
    density: float
    sign: Sign | None
    seed: int

    @property
    def elects(self) -> bool:
        """Whether single entries are taken away."""
        return self.how in _ELECTING

    def settings(self) -> dict[str, Any]:
        """Return what decides the entries."""
        if not self.elects:
            return {}
        seed = {"seed": self.seed} if self.how == "dare" else {}
        return {"density": self.density, "sign": self.sign, **seed}


class ComposeBank(FileBank):
    """Arithmetic of adapters."""

    def route(self, names: tuple[str, ...], task: str | None, weights: tuple[float, ...] = ()) -> Route:
        """Return the route of a choice of adapters."""
        raise NotImplementedError

    def compose(
        self,
        name: str,
        names: Sequence[str],
        *,
        how: How = "average",
        weights: Sequence[float] | None = None,
        rank: int | None = None,
        head: str | None = None,
        density: float = 0.5,
        sign: Sign | None = None,
        seed: int = 0,
    ) -> Composed:
        """Make a new adapter of changes of weights, ``W + sum_j c_j D_j``; it then acts alone.

        Sums are of changes, never of factors. Low-rank terms stay such: their exact sum has the sum of the ranks.
        Adapters whose change depends on the weights (DoRA, masks, scale and shift) enter by ``W' - W``. A negative
        weight takes a change away.

        Args:
            name: Name of the new adapter.
            names: The adapters.
            how: ``average`` (weights 1 / n by default), ``sum``, ``concat`` (a sum of low-rank terms, as such),
                ``svd`` (a sum, approximated at `rank`), ``ties`` or ``dare``.
            weights: A multiplier of each change; by default 1 / n for ``average`` and ``dare``, else 1.
            rank: Rank of the result, approximated by its singular values; by default that of the exact sum, and for
                ``svd`` the largest rank of the adapters.
            head: The adapter whose classifier the new one gets; by default the weighted average of all, for which they
                must have the same classes.
            density: For ``ties`` and ``dare``: share of the entries to keep, above 0 and at most 1.
            sign: For ``ties`` (``total`` by default) and ``dare`` (none by default): elect the sign of each place by
                the sum of entries (``total``) or by their number (``frequency``).
            seed: For ``dare``: seed of the entries that are dropped.

        Returns:
            What was made, with the energy that a lower rank kept.

        Raises:
            UnknownNameError: If there is no such adapter or way.
            ConfigError: If an adapter is no change of weights or has tasks, weights are of another number or not
                finite, a rank is above the exact one, classes differ and no `head` is named, or the name is taken.
            MergeError: If the model is merged.
        """
        request = self._request(names, how, weights, rank, density, sign, seed)
        self.check_ready("compose adapters")
        if head is not None and head not in self._entries:
            raise UnknownNameError("adapter", head, self._entries)
        classifier, owner = self._composed_head(request, head)
        with self.changing("compose adapters"):  # which act one by one meanwhile, in evaluation mode
            changes = {part: self._change(part) for part in request.names}
            carrier, layers = self._carried(request, changes)
        parts = tuple(
            Part(part, self._entries[part].method.name, changes[part].kind, weight, self._digest(part))
            for part, weight in zip(request.names, request.weights, strict=True)
        )
        kept, total = (sum(pair[i] for pair in layers.values()) for i in (0, 1))
        found = Composed(
            name=name,
            how=how,
            parts=parts,
            method=carrier.method.name,
            rank=getattr(carrier.method, "rank", None),
            kept_energy=kept / total if total else 1.0 if layers else None,  # of adapters that change nothing: all
            layers={key: pair[0] / pair[1] if pair[1] else 1.0 for key, pair in layers.items()},
            head=owner,
            settings=request.settings(),
        )
        self.place(name, carrier, classifier)
        self._entries[name].notes |= {**self._shared_notes(request.names, owner), "made_of": found.made_of()}
        return found

    def place(self, name: str, carrier: Carrier, head: nn.Module | None, tasks: Sequence[str] | None = None) -> None:
        """Add an adapter with given tensors, and make it the only one that acts.

        Args:
            name: Its name.
            carrier: Its method and tensors.
            head: Its classifier; None for none.
            tasks: Its tasks, where each has a copy of all units.
        """
        # Modules draw random values when created, which these replace.
        with torch.random.fork_rng(devices=[]), self.adding(carrier.method, name, tasks, None):
            if self.view.head_path is not None:
                self._heads.put(name, head)
                if head is None:
                    self._heads.drop(name)
            self.declare(name)
            self.load_state_dict(carrier.tensors, name)

    def _request(
        self,
        names: Sequence[str],
        how: How,
        weights: Sequence[float] | None,
        rank: int | None,
        density: float,
        sign: Sign | None,
        seed: int,
    ) -> _Request:
        """Check what was asked for, before anything is computed."""
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ConfigError(f"compose(..., {names!r}): give a list of names of adapters.")
        chosen = tuple(self._label(name) for name in names)
        if len(set(chosen)) < len(chosen):
            raise ConfigError(f"An adapter was named twice: {', '.join(chosen)}. Give it a larger weight.")
        if how not in get_args(How):
            raise UnknownNameError("way to compose", how, get_args(How))
        asked = f"compose(how={how!r}, weights={weights!r})"
        each = 1 / len(chosen) if how in _SHARED else 1.0
        given = (each,) * len(chosen) if weights is None else check_weights(asked, chosen, weights)
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ConfigError(f"compose(rank={rank!r}): a whole number, at least 1, is needed.")
        if rank is not None and how == "concat":
            raise ConfigError(f"compose(how='concat', rank={rank}): the exact sum has the rank it has; take how='svd'.")
        if not isinstance(density, int | float) or not 0 < density <= 1:
            raise ConfigError(f"compose(density={density!r}): a share above 0 and at most 1 is needed.")
        if sign is not None and sign not in get_args(Sign):
            raise UnknownNameError("way to elect a sign", sign, get_args(Sign))
        if how == "ties":
            sign = sign or "total"
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ConfigError(f"compose(seed={seed!r}): a whole number from 0 on is needed.")
        return _Request(how, chosen, given, rank, float(density), sign, seed)

    def _change(self, name: str) -> Change:
        """Read the change of one adapter, which acts alone meanwhile in this thread."""
        with self._routing.using(self.route((name,), None)):
            return read_change(self, name)

    # ------------------------------------------------------------------ the result

    def _carried(
        self, request: _Request, changes: Mapping[str, Change]
    ) -> tuple[Carrier, dict[str, tuple[float, float]]]:
        """Compute the result, and by layer the kept energy and the whole one, where a rank was cut."""
        low = [(change.terms, weight) for change, weight in zip(changes.values(), request.weights, strict=True)]
        if not request.elects and all(terms is not None for terms, _ in low):
            exact = _sums([(cast("dict[Site, Term]", terms), weight) for terms, weight in low])
            rank = _rank_of(request, low, {site: term.rank for site, term in exact.items()})
            if rank is None:
                return carry_terms(self, exact), {}
            cut = {site: compress(term, rank) for site, term in exact.items()}
            return carry_terms(self, {site: found[0] for site, found in cut.items()}), _energies(cut)
        if request.how == "concat":
            dense = [name for name, change in changes.items() if change.terms is None]
            raise ConfigError(
                f"compose(how='concat'): {', '.join(dense)} changes weights by no low-rank term, so there is "
                "nothing to concatenate. Take how='sum', or how='svd' with a rank."
            )
        total = _elected(request, [self._dense(change) for change in changes.values()])
        sizes = {key: min(change.flatten(1).shape) for key, change in total.items() if change.ndim > 1}
        rank = _rank_of(request, low, sizes)
        if rank is None:
            return carry_tensors(self, total), {}
        sites = {f"{s.path}.weight": s for s in self.view.sites if s.rows is None and s.kind in ("linear", "conv")}
        others = sorted(set(total) - set(sites))
        if others:
            raise ConfigError(
                f"compose(rank={rank}): the adapters change {others[0]}, which no low-rank term of a layer's weight "
                "holds. Leave rank out."
            )
        made = {sites[key]: decompose(change.flatten(1).double(), rank) for key, change in total.items()}
        return carry_terms(self, {site: found[0] for site, found in made.items()}), _energies(made)

    def _dense(self, change: Change) -> dict[str, Tensor]:
        """Return the change of each tensor, that of low-rank terms multiplied out."""
        if change.terms is None:
            return change.tensors
        base, found = dict(self.base_tensors()), {}
        for site, term in change.terms.items():
            key = f"{site.path}.weight"
            weight = base[key]
            if key not in found:
                kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
                found[key] = torch.zeros(weight.shape, dtype=kind, device=weight.device)
            start, stop = site.span
            found[key].view(weight.shape[0], -1)[start:stop] += term.product().to(found[key].dtype)
        return found

    # ------------------------------------------------------------------ classifiers and notes

    def _composed_head(self, request: _Request, head: str | None) -> tuple[nn.Module | None, str | None]:
        """Return the classifier of the result, and whose it is."""
        owners = [name for name in request.names if self._heads.get(name) is not None]
        if head is not None or len(owners) < 2:
            owner = head if head is not None else next(iter(owners), None)
            return (None, None) if owner is None else (self._plain_head(owner), owner)
        classes = {name: self._entries[name].notes.get("class_names") for name in owners}
        heads = {name: self._plain_head(name) for name in owners}
        shapes = {name: {k: tuple(t.shape) for k, t in found.state_dict().items()} for name, found in heads.items()}
        first = owners[0]
        for name in owners[1:]:
            if classes[name] != classes[first] or shapes[name] != shapes[first]:
                told = [_described(classes[owner], heads[owner]) for owner in (first, name)]
                raise ConfigError(
                    f"The classifiers of {first!r} and {name!r} cannot be averaged: {told[0]} there, {told[1]} here. "
                    f"Name the one to keep: head={first!r} (--head {first})."
                )
        weights = [weight for name, weight in zip(request.names, request.weights, strict=True) if name in owners]
        if any(weight < 0 for weight in weights) or not sum(weights):
            raise ConfigError(
                f"The weights are {weights}, and an average of classifiers needs weights of at least 0. Name the one "
                f"to keep: head={first!r} (--head {first})."
            )
        mean = self._plain_head(first)
        states = [heads[name].state_dict() for name in owners]
        shares = [weight / sum(weights) for weight in weights]
        mean.load_state_dict({key: weighted_sum([state[key] for state in states], shares) for key in states[0]})
        return mean, "average"

    def _plain_head(self, name: str) -> nn.Module:
        """Return a copy of an adapter's classifier as a plain layer."""
        head = self._heads.get(name)
        if head is None:
            raise ConfigError(f"Adapter {name!r} has no classifier to keep.")
        if not isinstance(head, nn.Linear):
            if isinstance(head, nn.Identity):
                return nn.Identity()
            raise ConfigError(
                f"The classifier of {name!r} is a {type(head).__name__}, which is neither averaged nor copied. Name "
                "another one with head=."
            )
        plain = nn.Linear(head.in_features, head.out_features, head.bias is not None).to(head.weight)
        plain.load_state_dict(head.state_dict())
        if isinstance(head, LowBitHead):
            plain.weight.data = head.matrix("weight").detach().clone()
        return plain

    def _shared_notes(self, names: Sequence[str], owner: str | None) -> dict[str, Any]:
        """Return the notes for the result's users: those of the classifier's owner, without figures."""
        notes = self._entries[names[0] if owner is None or owner == "average" else owner].notes
        kept = {key: notes[key] for key in ("class_names", "preprocessing", "output") if notes.get(key) is not None}
        return kept if owner is not None else {key: kept[key] for key in kept if key == "preprocessing"}

    def _digest(self, name: str) -> str:
        """Compute a digest of an adapter's tensors, its classifier's included."""
        digest = hashlib.sha256()
        for key, tensor in sorted({**self.stored_tensors(name), **self._head_state(name)}.items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _described(classes: Any, head: nn.Module) -> str:
    count = getattr(head, "out_features", 0)
    return f"{count} outputs" + (f" ({', '.join(map(str, classes[:3]))}, ...)" if classes else "")


def _sums(low: Sequence[tuple[Mapping[Site, Term], float]]) -> dict[Site, Term]:
    """Concatenate the terms of each site."""
    sites = dict.fromkeys(site for terms, _ in low for site in terms)
    found = {}
    for site in sites:
        own = [(terms[site], weight) for terms, weight in low if site in terms]
        found[site] = concatenate([term for term, _ in own], [weight for _, weight in own])
    return found


def _rank_of(request: _Request, low: Sequence[tuple[Any, float]], exact: Mapping[Any, int]) -> int | None:
    """Return the rank to cut to; None to keep the exact one."""
    rank = request.rank
    if rank is None and request.how == "svd":
        rank = max((term.rank for terms, _ in low if terms is not None for term in terms.values()), default=None)
        if rank is None:
            raise ConfigError(
                "compose(how='svd'): none of the adapters is of low rank, so give the rank of the result."
            )
    most = max(exact.values(), default=0)
    if rank is not None and rank > most:
        raise ConfigError(
            f"compose(rank={rank}): the exact result has rank {most}. Take at most that, or leave rank out."
        )
    return rank


def _elected(request: _Request, changes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Combine changes tensor by tensor; where an adapter changes nothing, its change is zero."""
    names = dict.fromkeys(name for change in changes for name in change)
    generator = Generator().manual_seed(request.seed)
    found = {}
    for name in names:
        like = next(change[name] for change in changes if name in change)
        own = [change.get(name, torch.zeros_like(like)) for change in changes]
        if request.how == "ties":
            found[name] = ties(own, request.weights, request.density, request.sign or "total")
        elif request.how == "dare":
            masks = [draw_mask(like.shape, request.density, generator) for _ in own]
            found[name] = dare(own, request.weights, request.density, masks, request.sign)
        else:
            found[name] = weighted_sum(own, request.weights)
    for name, change in found.items():
        if not math.isfinite(float(change.abs().sum())):
            raise ConfigError(f"The result of compose is not finite at {name}. Look at the adapters' tensors.")
    return found


def _energies(cut: Mapping[Site, tuple[Term, float, float]]) -> dict[str, tuple[float, float]]:
    return {site.key: (kept, total) for site, (_, kept, total) in cut.items()}
