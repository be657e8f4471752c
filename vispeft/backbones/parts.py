"""Sites of parts common to several timm families: fused or split attention projections, plain or gated MLPs."""

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
    """The position of a block in the model, and the width and layout of its tokens."""

    width: int
    """Width of the tokens."""
    block: int | None = None
    """Index among all blocks."""
    stage: int | None = None
    """Stage index of a hierarchical model."""
    layout: Layout = "NLC"
    """Order of the axes of the tokens."""

    def site(
        self,
        path: str,
        role: str,
        kind: Kind,
        in_features: int | None = None,
        out_features: int | None = None,
        **more: Any,
    ) -> Site:
        """Create a site here, by default with the block's width."""
        more = {"layout": self.layout, **more}
        width_in = self.width if in_features is None else in_features
        width_out = self.width if out_features is None else out_features
        return Site(path, role, kind, width_in, width_out, self.block, self.stage, **more)


def is_absent(module: nn.Module | None) -> bool:
    """Return whether an optional module is absent (None or an identity)."""
    return module is None or base_class(module) is nn.Identity


def projection_sites(attn: Any, path: str, spot: Spot, inner: int) -> Iterator[Site]:
    """Iterate over the query, key and value projections of an attention module, fused or split.

    Args:
        attn: The module.
        path: Its path.
        spot: The position of its block.
        inner: Total width of all heads.

    Yields:
        The fused projection and its slices, or the split projections.
    """
    if getattr(attn, "qkv", None) is None:
        for part in ("q", "k", "v"):
            layer = getattr(attn, f"{part}_proj")
            yield spot.site(f"{path}.{part}_proj", f"attn.{part}", "linear", out_features=layer.out_features)
        return
    # timm keeps the q and v biases in the attention module, which also reads the projection's weight.
    reads = getattr(attn, "q_bias", None) is not None
    more: dict[str, Any] = {"reads_weight": reads, "owner": path if reads else None}
    yield spot.site(f"{path}.qkv", "attn.qkv", "linear", out_features=3 * inner, **more)
    for index, part in enumerate(("q", "k", "v")):
        rows = Slice(index * inner, (index + 1) * inner)
        yield spot.site(f"{path}.qkv", f"attn.{part}", "linear", out_features=inner, rows=rows, **more)


def query_key_norm_sites(attn: Any, path: str, spot: Spot, rotated: bool) -> Iterator[Site]:
    """Iterate over the norms of queries and keys, if any.

    Args:
        attn: The module.
        path: Its path.
        spot: The position of its block.
        rotated: Whether rotary position embedding follows the norms.

    Yields:
        Their sites.
    """
    for name in ("q_norm", "k_norm"):
        if is_absent(getattr(attn, name, None)):
            continue
        # A common shift of all keys adds a constant to all scores of a query, to which softmax is invariant; after
        # rotation by position the shifts differ.
        null = ("bias",) if name == "k_norm" and not rotated else ()
        width = attn.head_dim
        yield spot.site(f"{path}.{name}", f"attn.{name}", "norm", width, width, null=null)


def branch_readers(attn: Any, path: str) -> tuple[str, ...]:
    """List the linear layers that read an attention module's input; none if it keeps their biases itself."""
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
        spot: The position of its block.

    Yields:
        Its sites, starting with the module itself.

    Raises:
        BackboneError: If it is of an unsupported class.
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
    """List the linear layers that read an MLP's input."""
    return (f"{path}.fc1_g", f"{path}.fc1_x") if base_class(mlp) is SwiGLU else (f"{path}.fc1",)
