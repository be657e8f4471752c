"""Sites of the parts that timm families share: fused and split attention projections, plain and gated MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from vispeft.core.families import base_class, check_class
from vispeft.core.sites import Kind, Layout, Site, Slice

__all__ = [
    "Spot",
    "branch_readers",
    "first_layers",
    "is_absent",
    "mlp_sites",
    "projection_sites",
    "query_key_norm_sites",
]


@dataclass(frozen=True)
class Spot:
    """Where a block is, and how its tokens are laid out."""

    width: int
    """Width of its tokens."""
    block: int | None = None
    """Index over all blocks."""
    stage: int | None = None
    """Stage index of a hierarchical model."""
    layout: Layout = "NLC"
    """Order of the axes of its tokens."""

    def site(
        self,
        path: str,
        role: str,
        kind: Kind,
        in_features: int | None = None,
        out_features: int | None = None,
        **more: Any,
    ) -> Site:
        """Make a site there, of the block's width where none is given."""
        more = {"layout": self.layout, **more}
        width_in = self.width if in_features is None else in_features
        width_out = self.width if out_features is None else out_features
        return Site(path, role, kind, width_in, width_out, self.block, self.stage, **more)


def is_absent(module: nn.Module | None) -> bool:
    """Tell whether a place that some models of a family fill is empty in this one."""
    return module is None or base_class(module) is nn.Identity


def projection_sites(attn: Any, path: str, spot: Spot, inner: int) -> Iterator[Site]:
    """Iterate over the query, key and value projections of an attention module, fused or split.

    Args:
        attn: The module.
        path: Its path.
        spot: Where its block is.
        inner: Width of all heads together.

    Yields:
        The fused projection and its slices, or the split projections.
    """
    if getattr(attn, "qkv", None) is None:
        for part in ("q", "k", "v"):
            layer = getattr(attn, f"{part}_proj")
            yield spot.site(f"{path}.{part}_proj", f"attn.{part}", "linear", out_features=layer.out_features)
        return
    # timm keeps q and v biases on the module and reads the projection's weight beside them.
    reads = getattr(attn, "q_bias", None) is not None
    more: dict[str, Any] = {"reads_weight": reads, "owner": path if reads else None}
    yield spot.site(f"{path}.qkv", "attn.qkv", "linear", out_features=3 * inner, **more)
    for index, part in enumerate(("q", "k", "v")):
        rows = Slice(index * inner, (index + 1) * inner)
        yield spot.site(f"{path}.qkv", f"attn.{part}", "linear", out_features=inner, rows=rows, **more)


def query_key_norm_sites(attn: Any, path: str, spot: Spot, rotated: bool) -> Iterator[Site]:
    """Iterate over the norms of queries and keys, where there are any.

    Args:
        attn: The module.
        path: Its path.
        spot: Where its block is.
        rotated: Whether positions are rotated into queries and keys behind the norms.

    Yields:
        Their sites.
    """
    for name in ("q_norm", "k_norm"):
        if is_absent(getattr(attn, name, None)):
            continue
        # The same shift of every key adds the same to every score of a query, which softmax does not see; behind a
        # rotation by position the shifts differ.
        null = ("bias",) if name == "k_norm" and not rotated else ()
        width = attn.head_dim
        yield spot.site(f"{path}.{name}", f"attn.{name}", "norm", width, width, null=null)


def branch_readers(attn: Any, path: str) -> tuple[str, ...]:
    """List the linear layers that read what enters an attention module; none where it keeps their biases itself."""
    if getattr(attn, "q_bias", None) is not None:
        return ()
    if getattr(attn, "qkv", None) is None:
        readers = [f"{path}.{part}_proj" for part in ("q", "k", "v")]
    else:
        readers = [f"{path}.qkv"]
    if getattr(attn, "gate", None) is not None:
        readers.append(f"{path}.gate")
    return tuple(readers)


def mlp_sites(mlp: Any, path: str, spot: Spot) -> Iterator[Site]:
    """Iterate over the sites of a plain or gated MLP, in forward order.

    Args:
        mlp: An `Mlp`, a `GluMlp` (gate and value in one layer) or a `SwiGLU` (two layers).
        path: Its path.
        spot: Where its block is.

    Yields:
        Its sites, the module itself first.

    Raises:
        BackboneError: If it is of another class.
    """
    check_class(path, mlp, (Mlp, GluMlp, SwiGLU))
    hidden = mlp.fc2.in_features
    yield spot.site(path, "mlp", "mlp")
    if base_class(mlp) is SwiGLU:
        yield spot.site(f"{path}.fc1_g", "mlp.fc1_g", "linear", out_features=hidden)
        yield spot.site(f"{path}.fc1_x", "mlp.fc1_x", "linear", out_features=hidden)
    else:
        yield spot.site(f"{path}.fc1", "mlp.fc1", "linear", out_features=mlp.fc1.out_features)
    if base_class(mlp) is GluMlp:
        halves = (Slice(0, hidden), Slice(hidden, 2 * hidden))
        gate, value = reversed(halves) if mlp.gate_last else halves
        yield spot.site(f"{path}.fc1", "mlp.fc1_g", "linear", out_features=hidden, rows=gate)
        yield spot.site(f"{path}.fc1", "mlp.fc1_x", "linear", out_features=hidden, rows=value)
    yield spot.site(f"{path}.act", "mlp.act", "block", hidden, hidden)
    if not is_absent(mlp.norm):
        yield spot.site(f"{path}.norm", "mlp.norm", "norm", hidden, hidden, consumers=(f"{path}.fc2",))
    yield spot.site(f"{path}.fc2", "mlp.fc2", "linear", hidden)


def first_layers(mlp: Any, path: str) -> tuple[str, ...]:
    """List the linear layers that read what enters an MLP."""
    return (f"{path}.fc1_g", f"{path}.fc1_x") if base_class(mlp) is SwiGLU else (f"{path}.fc1",)
