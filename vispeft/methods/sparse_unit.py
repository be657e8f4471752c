"""The unit of `vispeft.methods.sparse`: values that are added to some entries of a weight, and choices of entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Generator, Tensor, nn

from vispeft.core.sites import Site
from vispeft.core.tracing import in_graph
from vispeft.core.units import WeightUnit, with_rows
from vispeft.errors import ConfigError, FileError
from vispeft.methods.svfit import decompose

__all__ = ["SparseUnit", "Support", "largest_entries", "principal_weights"]

Support = Literal["random", "magnitude", "gradient", "lift", "gps", "given"]


def largest_entries(scores: Tensor, count: int) -> Tensor:
    """Find the largest entries of a matrix.

    Args:
        scores: Of any shape.
        count: Number of entries.

    Returns:
        Their positions in row-major order, int64 (count,), rising.
    """
    return scores.flatten().topk(count, sorted=False).indices.sort().values


def largest_of_rows(scores: Tensor, count: int) -> Tensor:
    """Find the largest entries of each row of a matrix.

    Args:
        scores: (rows, columns).
        count: Number of entries of a row.

    Returns:
        Their positions in row-major order, int64 (rows * count,), rising.
    """
    columns = scores.topk(count, dim=1, sorted=False).indices
    starts = torch.arange(0, scores.numel(), scores.shape[1], device=scores.device)
    return (columns + starts[:, None]).flatten().sort().values


def principal_weights(weight: Tensor, rank: int, place: str = "this layer") -> Tensor:
    """Compute the magnitudes of a weight's approximation of low rank, by which LIFT chooses.

    Args:
        weight: (out, ...).
        rank: Rank of the approximation.
        place: Where the weight is, for messages.

    Returns:
        (out, columns), in double precision.
    """
    u, s, v = decompose(weight, place)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).abs()


class _Seen(torch.autograd.Function):
    """A weight whose gradient is shown to an observer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, observer: Callable[[Tensor], None]) -> Tensor:
        ctx.observer = observer
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.observer(grad.detach())
        return grad, None


class SparseUnit(WeightUnit):
    """Values that are added to some entries of a weight."""

    positions: Tensor
    """The entries, int32 (count,), in the rows of the site in row-major order; each at most once."""
    left_positions: Tensor
    """Of a ``lift`` schedule: entries that no longer train and keep their changes, int32 (m,), none of them above."""
    left_values: Tensor
    """Their changes, (m,)."""
    observer: Callable[[Tensor], None] | None = None
    """What is shown the gradient of the whole weight (rows, columns) in backward passes; not saved."""
    dense: Tensor | None = None
    """A change of all entries (rows, columns) while entries are looked for (`vispeft.methods.sparse_start`)."""

    def __init__(
        self, site: Site, count: int, support: Support, rank: int, schedule: str = "fixed", per_row: bool = False
    ) -> None:
        """Allocate the values, (count,).

        Args:
            site: The layer, or a slice of one.
            count: Number of entries.
            support: How they are chosen.
            rank: Rank of the approximation, for ``lift``.
            schedule: When they change; with ``lt`` their number is decided by data.
            per_row: Whether each row has equally many.
        """
        super().__init__()
        self.site, self.support, self.rank, self.given = site, support, rank, False
        self.schedule, self.per_row = schedule, per_row
        self.start, self.stop = site.span
        self.size = site.out_features * site.columns
        self.values = nn.Parameter(torch.empty(count))
        self.register_buffer("positions", torch.empty(count, dtype=torch.int32))
        if schedule == "lift":
            self.register_buffer("left_positions", torch.empty(0, dtype=torch.int32))
            self.register_buffer("left_values", torch.empty(0))

    def chosen(self, scores: Tensor) -> Tensor:
        """Find the entries with the largest scores, as many as train.

        Args:
            scores: (rows, columns).

        Returns:
            int64 (count,), rising.
        """
        if self.per_row:
            return largest_of_rows(scores.flatten(1), len(self.values) // len(scores))
        return largest_entries(scores, len(self.values))

    def prepare(self, weight: Tensor) -> None:
        """Choose the entries that the frozen weight decides."""
        if self.support == "magnitude":
            self.positions.copy_(self.chosen(weight.flatten(1).abs()))
        elif self.support == "lift":
            self.positions.copy_(self.chosen(principal_weights(weight, self.rank, self.site.key)))

    def reset(self, generator: Generator) -> None:
        """Start at zero; draw the entries that nothing else decides.

        Raises:
            ConfigError: If they should be given and are not.
        """
        self.values.zero_()
        if self.support == "given" and not self.given:
            raise ConfigError(
                "Sparse(support='given') needs source, a safetensors file with the entries of each layer, unless the "
                "adapter is loaded from a file."
            )
        if self.support not in ("random", "gradient", "gps"):
            return
        if self.per_row:
            scores = torch.rand(self.site.out_features, self.site.columns, generator=generator)
            self.positions.copy_(self.chosen(scores))
            return
        drawn = torch.randperm(self.size, generator=generator)[: len(self.values)]
        self.positions.copy_(drawn.sort().values)

    def put(self, positions: Tensor) -> None:
        """Train other entries, in any number, from zero on; before the optimiser's first step.

        Args:
            positions: The entries, whole numbers (count,), rising.
        """
        self.values.data = self.values.data.new_zeros(len(positions))
        self.positions = positions.to(self.positions)

    def takes(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Accept any number of entries where the schedule decides it, at most all of them."""
        free = {"lt": "", "lift": "left_"}.get(self.schedule)
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if free is None or set(shapes) != set(own):
            return False
        fixed = all(shapes[name] == own[name] for name in own if name not in (f"{free}values", f"{free}positions"))
        count = shapes[f"{free}values"]
        least = 0 if free else 1
        return fixed and count == shapes[f"{free}positions"] and len(count) == 1 and least <= count[0] <= self.size

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Add the values to the rows of (out, columns)."""
        dtype = torch.promote_types(weight.dtype, self.values.dtype)
        rows = weight[self.start : self.stop].to(dtype)
        flat = rows.reshape(-1).index_add(0, self.positions, self.values.to(dtype))
        if self.schedule == "lift":
            flat = flat.index_add(0, self.left_positions, self.left_values.to(dtype))
        changed = flat.view(rows.shape)
        if self.dense is not None:
            changed = changed + self.dense.view(rows.shape)
        if self.observer is not None and torch.is_grad_enabled() and not in_graph():
            changed = cast(Tensor, _Seen.apply(changed, self.observer))
        return with_rows(weight, self.start, changed)

    def file_tensors(self) -> dict[str, Tensor]:
        """Return values and entries in rising order of the entries."""
        found = {}
        for kind in ("", "left_") if self.schedule == "lift" else ("",):
            order = self.get_buffer(f"{kind}positions").argsort()
            values = self.left_values if kind else self.values.detach()
            found |= {f"{kind}values": values[order], f"{kind}positions": self.get_buffer(f"{kind}positions")[order]}
        return found

    def codecs(self) -> Mapping[str, str]:
        """Store the gaps between entries, and values with short exponents."""
        coded = {"positions": "rice", "values": "floats"}
        return coded if self.schedule != "lift" else {**coded, "left_positions": "rice", "left_values": "floats"}

    def keep_encoded(self, name: str, stored: Tensor) -> None:
        """Check the entries that were just loaded; encoding them again gives the same bytes."""
        if not name.endswith("positions"):
            return
        entries = self.get_buffer(name)
        if len(entries) and not 0 <= int(entries.min()) <= int(entries.max()) < self.size:
            raise FileError(
                f"{self.site.key}: entry {int(entries.max())} is to change, and the weight has {self.size:,}."
            )
