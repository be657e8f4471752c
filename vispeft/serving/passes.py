"""One batch through many adapters: what they share, and what each computes for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vispeft.adapters.bank import AdapterBank
from vispeft.core.model_units import QueryUnit, SideUnit
from vispeft.hosts.base import Host
from vispeft.hosts.running import RunningHost
from vispeft.serving.readers import JointQueries, Reader

__all__ = ["Answering", "Pair", "Served"]

Kind = Literal["probe", "queries", "side", "rows", "alone"]
Pair = tuple[int, str | None]
"""An image of the batch, and an adapter that is to answer it; None for the base."""


@dataclass(frozen=True)
class Served:
    """How an adapter takes part in a pass."""

    kind: Kind
    """``probe`` has a classifier alone; ``queries`` and ``side`` read the frozen pass; ``rows`` changes its rows of the
    batch; ``alone`` needs a pass of its own."""
    unit: Any = None
    """The unit that reads, for ``queries`` and ``side``."""
    head: Callable[[Any], Tensor] | None = None
    """What answers in place of the adapter's classifier, from pooled features (B, width), or from maps."""
    taps: tuple[int, ...] = ()
    """The maps that `head` reads (`RunningHost.maps_of`); empty for pooled features."""

    @classmethod
    def of(
        cls, bank: AdapterBank, name: str, head: Callable[[Any], Tensor] | None = None, taps: Sequence[int] = ()
    ) -> Served:
        """Look at the units of an adapter.

        Args:
            bank: The bank.
            name: The adapter.
            head: What answers in place of its classifier.
            taps: The maps it reads.
        """
        units, chosen = list(bank.units(name).values()), tuple(sorted(set(taps)))
        if not units:
            return cls("probe", None, head, chosen)
        if len(units) == 1 and isinstance(units[0], QueryUnit) and chosen:
            return cls("probe", None, head, chosen)  # queries leave the maps alone
        if len(units) == 1 and isinstance(units[0], QueryUnit | SideUnit) and not chosen:
            return cls("queries" if isinstance(units[0], QueryUnit) else "side", units[0], head)
        return cls("rows" if bank.shares_pass(name) else "alone", None, head, chosen)


class Answering:
    """Answers one batch after the other."""

    def __init__(self, bank: AdapterBank) -> None:
        """Keep the bank.

        Args:
            bank: The bank of the model.
        """
        self.bank = bank
        self.model = cast(RunningHost, bank.model)

    def __call__(self, images: Tensor, pairs: Sequence[Pair], served: Mapping[str | None, Served]) -> list[Tensor]:
        """Answer all pairs with as few passes as possible.

        Args:
            images: (B, C, H, W).
            pairs: Images and adapters.
            served: How each of these adapters takes part.

        Returns:
            For each pair the output of its adapter alone: scores (classes,), or what its head gives.
        """
        answers: list[Tensor | None] = [None] * len(pairs)
        kinds = [served[name].kind for _, name in pairs]
        together = [place for place, kind in enumerate(kinds) if kind != "alone"]
        if together:
            self._together(images, pairs, together, served, answers)
        for name in dict.fromkeys(name for (_, name), kind in zip(pairs, kinds, strict=True) if kind == "alone"):
            places = [place for place, (_, other) in enumerate(pairs) if other == name]
            chosen = images[[pairs[place][0] for place in places]]
            with self.bank.using(cast(str, name)):
                _put(answers, places, self._answer_alone(chosen, served[name]))
        return cast("list[Tensor]", answers)

    def _answer_alone(self, images: Tensor, served: Served) -> Tensor:
        """Answer images under the route of one adapter."""
        if served.head is None:
            out: Tensor = self.model(images)
            return out
        if not served.taps:
            return served.head(self._pooled(self.model.forward_features(images)))
        asked = {"norm": True, "output_fmt": "NCHW", "intermediates_only": True}
        return served.head(self.model.forward_intermediates(images, indices=list(served.taps), **asked))

    def _together(
        self,
        images: Tensor,
        pairs: Sequence[Pair],
        places: Sequence[int],
        served: Mapping[str | None, Served],
        answers: list[Tensor | None],
    ) -> None:
        """Answer pairs by one pass. An image has one row for the frozen pass, and one for each that changes it."""
        rows: dict[Pair, int] = {}
        row_of: dict[int, int] = {}
        for place in places:
            image, name = pairs[place]
            own = name if served[name].kind == "rows" else None
            row_of[place] = rows.setdefault((image, own), len(rows))
        chosen = [image for image, _ in rows]
        batch = images if chosen == list(range(len(images))) else images[chosen]
        by_name: dict[str | None, list[int]] = {}
        for place in places:
            by_name.setdefault(pairs[place][1], []).append(place)
        readers = [
            Reader(cast(str, name), served[name].unit, tuple(row_of[place] for place in own))
            for name, own in by_name.items()
            if served[name].kind == "queries"
        ]
        joint = [JointQueries(readers, len(rows), batch.device)] if readers else []
        sides = [cast(SideUnit, served[name].unit) for name in by_name if served[name].kind == "side"]
        taps = {tap for name in by_name for tap in served[name].taps}
        taken = frozenset(block for side in sides for block in side.reads) | taps
        with self.bank.using(rows=[name for _, name in rows]):
            result = self.model.run(batch, joint, taken=taken)
            needs_pooled = any(served[name].kind != "side" and not served[name].taps for name in by_name)
            pooled = self._pooled(self.model.features(result)) if needs_pooled else None
            maps = dict(zip(sorted(taps), self.model.maps_of(result, batch, sorted(taps)), strict=True))
        reads = {reader.name: found for unit in joint for reader, found in unit.reads(result.kept)}
        for name, own in by_name.items():
            at = [row_of[place] for place in own]
            if served[name].taps:
                head = cast("Callable[[Any], Tensor]", served[name].head)
                _put(answers, own, head([maps[tap][at] for tap in served[name].taps]))
                continue
            if served[name].kind == "side":
                hidden = {block: tap[at] for block, tap in result.taps.items()}
                with self.bank.using(cast(str, name)):
                    features = self._pooled(self.model.features_beside(served[name].unit, hidden))
            else:
                features = cast(Tensor, pooled)[at]
            if name in reads:
                features = served[name].unit.features(features, reads[name])
            _put(answers, own, self._head(name, served[name])(features))

    def _pooled(self, features: Tensor) -> Tensor:
        """Pool the output of `forward_features`, (B, width)."""
        pooled: Tensor = self.model.forward_head(features, pre_logits=True)
        return pooled

    def _head(self, name: str | None, served: Served) -> Callable[[Tensor], Tensor]:
        """Return what turns pooled features into an answer."""
        if served.head is not None:
            return served.head
        own = None if name is None else self.bank.head(name)
        if own is not None:
            return own
        base = self.bank.base_head
        if base is None:
            return nn.Identity()
        # The base's classifier would ask the route which one answers.
        plain = base.replaces if isinstance(base, Host) else type(base)
        return lambda features: cast(Tensor, plain.forward(base, features))


def _put(answers: list[Tensor | None], places: Sequence[int], out: Tensor) -> None:
    for place, own in zip(places, torch.unbind(out), strict=True):
        answers[place] = own
