"""Token merging inside a forward pass: matching, averaging, sizes for the attention, and the way back.

The merging of ToMe (arXiv 2210.09461; details as in the public code, facebookresearch/ToMe). Prefix and inserted tokens
are protected: they stand in front, are never merged, and keep their order. State covers the patch tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vispeft.core.route import Routing

__all__ = ["Match", "MergeStep", "Merged", "Merging", "match", "merge", "unmerged", "without_merging"]


class Match(NamedTuple):
    """Which patch tokens become one. Tokens at even positions of the sequence may go into tokens at odd ones."""

    kept: Tensor
    """(B, A - r): the even tokens that stay, as numbers among the A even ones."""
    sources: Tensor
    """(B, r): those that go, the most similar first."""
    targets: Tensor
    """(B, r): the token each one goes into, as numbers among the odd ones."""


class Merged(NamedTuple):
    """What the merges of earlier blocks did to the patch tokens."""

    size: Tensor
    """(B, n), float: the number of patches in each token."""
    source: Tensor
    """(B, N), int64: the token that each of the N patches went into."""


class Merging(NamedTuple):
    """What one block is asked to merge."""

    r: int
    """Tokens to merge away; 0 if only the attention has to know the sizes."""
    protected: int
    """Number of tokens in front of the patches."""
    proportional: bool
    """Whether the attention weighs keys by their sizes."""


def match(metric: Tensor, r: int, protected: int) -> Match:
    """Match patch tokens by the cosine similarity of their metrics.

    Args:
        metric: (B, n, width) of the patch tokens.
        r: Tokens to merge away; at most half of the tokens are.
        protected: Number of tokens in front of them, which decides who stands at an even position.
    """
    kind = metric.dtype if metric.dtype == torch.float64 else torch.float32
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        unit = F.normalize(metric.detach().to(kind), dim=-1)
        even, odd = _halves(unit, protected)
        similarity, nearest = (even @ odd.transpose(1, 2)).max(dim=-1)
        order = similarity.argsort(dim=-1, descending=True, stable=True)
        r = min(r, metric.shape[1] // 2)
        sources, kept = order[:, :r], order[:, r:]
        if protected:  # without a protected token, the public code leaves them in the order of similarity
            kept = kept.sort(dim=-1).values
        return Match(kept, sources, nearest.gather(1, sources))


def merge(patches: Tensor, size: Tensor, found: Match, protected: int) -> tuple[Tensor, Tensor]:
    """Average matched tokens by their sizes; even tokens that stay come first, odd ones behind them.

    Args:
        patches: (B, n, D).
        size: (B, n).
        found: The matches.
        protected: Number of tokens in front of the patches.

    Returns:
        Tokens (B, n - r, D) and their sizes (B, n - r).
    """
    even, odd = _halves(patches, protected)
    even_size, odd_size = _halves(size, protected)
    going = even_size.gather(1, found.sources)
    total = odd_size.scatter_add(1, found.targets, going)
    # Shares of the sum: a token that nothing goes into has the share 1, and stays as it is.
    shares = (going / total.gather(1, found.targets)).to(patches.dtype).unsqueeze(-1)
    joined = odd * (odd_size / total).to(patches.dtype).unsqueeze(-1)
    joined = joined.scatter_add(1, _wide(found.targets, patches), _rows(even, found.sources) * shares)
    return (
        torch.cat([_rows(even, found.kept), joined], dim=1),
        torch.cat([even_size.gather(1, found.kept), total], dim=1),
    )


def places(found: Match, count: int, protected: int) -> Tensor:
    """Compute the place of each token behind a merge.

    Args:
        found: The matches.
        count: Number n of patch tokens before the merge.
        protected: Number of tokens in front of them.

    Returns:
        (B, n), int64.
    """
    stay, batch = found.kept.shape[1], found.kept.shape[0]
    device = found.kept.device
    evens = found.kept.new_empty(batch, stay + found.sources.shape[1])
    evens = evens.scatter(1, found.kept, torch.arange(stay, device=device).expand(batch, -1))
    evens = evens.scatter(1, found.sources, found.targets + stay)
    odds = torch.arange(stay, stay + count - evens.shape[1], device=device).expand(batch, -1)
    # Even and odd positions of the sequence, in their order among the patches.
    order = torch.arange(count, device=device)
    back = torch.cat([*_halves(order[None], protected)], dim=1)[0].argsort()
    return torch.cat([evens, odds], dim=1)[:, back]


class MergeStep:
    """The merge of one block in one forward pass: the attention reads sizes from it, and leaves its keys there."""

    def __init__(self, merging: Merging, merged: Merged | None) -> None:
        """Begin a block.

        Args:
            merging: What the block is asked to merge.
            merged: What earlier blocks did; None if nothing was merged yet.
        """
        self.merging, self.merged = merging, merged
        self.metric: Tensor | None = None

    def read(self, keys: Tensor) -> None:
        """Take the attention's keys, (B, heads, N, width of a head), before their norm; their mean is the metric."""
        if self.merging.r:
            self.metric = keys.detach().mean(dim=1)

    def bias(self, like: Tensor) -> Tensor | None:
        """Compute the logarithms of the sizes, (B, 1, 1, N), to add to the scores; None where they are all 0.

        Args:
            like: A tensor of the type that is needed.
        """
        if self.merged is None or not self.merging.proportional:
            return None
        return F.pad(self.merged.size.log(), (self.merging.protected, 0)).to(like.dtype)[:, None, None]

    def merge(self, tokens: Tensor) -> tuple[Tensor, Merged | None]:
        """Merge the tokens behind the attention branch.

        Args:
            tokens: (B, N, D), protected ones first.

        Returns:
            The tokens that are left, and what has been merged so far.
        """
        protected = self.merging.protected
        patches = tokens[:, protected:]
        batch, count = patches.shape[:2]
        if self.metric is None or count < 2:
            return tokens, self.merged
        if self.merged is None:
            kind = tokens.dtype if tokens.dtype == torch.float64 else torch.float32
            each = torch.arange(count, device=tokens.device).expand(batch, -1)
            merged = Merged(torch.ones(batch, count, dtype=kind, device=tokens.device), each)
        else:
            merged = self.merged
        found = match(self.metric[:, protected:], self.merging.r, protected)
        joined, size = merge(patches, merged.size, found, protected)
        source = places(found, count, protected).gather(1, merged.source)
        return torch.cat([tokens[:, :protected], joined], dim=1), Merged(size, source)


def unmerged(tokens: Tensor, merged: Merged | None) -> Tensor:
    """Give each patch the token that it went into; a mean over the patches is then weighted by the sizes.

    Args:
        tokens: (B, n, D), prefix and inserted tokens first.
        merged: What was merged; None for nothing.

    Returns:
        (B, N, D).
    """
    if merged is None:
        return tokens
    protected = tokens.shape[1] - merged.size.shape[1]
    return torch.cat([tokens[:, :protected], _rows(tokens[:, protected:], merged.source)], dim=1)


@contextmanager
def without_merging(routing: Routing) -> Iterator[None]:
    """Merge no tokens in a ``with`` block, for checks whose rounding could change a choice of tokens.

    Args:
        routing: The routing of the model, which no other thread runs.
    """
    before, routing.merging = routing.merging, None
    try:
        yield
    finally:
        routing.merging = before


def _halves(patches: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """Split patch tokens (B, n, ...) by whether they stand at even or odd positions of the whole sequence."""
    first = protected % 2
    return patches[:, first::2], patches[:, 1 - first :: 2]


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """Expand numbers of rows (B, r) over the channels of `like`."""
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Take rows (B, r) of tokens (B, n, D)."""
    return tokens.gather(1, _wide(index, tokens))
