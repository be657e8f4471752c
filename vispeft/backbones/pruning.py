"""Narrow copies of a backbone by structural pruning: the channels with the largest weights are kept.

Follows the public code of LST (ylsung/Ladder-Side-Tuning at 1798e82): layer by layer, the rows of a weight with the
largest sums of absolute values are kept, and the next layer keeps the matching columns. Each layer that writes to the
residual stream chooses its own channels, so that the kept channels differ between layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vispeft.core.families import frozen_tensor
from vispeft.core.sites import Site, View
from vispeft.hosts.running import Rung

__all__ = ["prune", "strongest"]

Named = Iterator[tuple[str, Tensor]]
MERGED = 4
"""Number of neighbouring patches that patch merging concatenates."""


def strongest(importance: Tensor, number: int, groups: int = 1) -> Tensor:
    """Choose the rows with the largest sums of absolute values.

    Args:
        importance: (rows, ...).
        number: Number of rows to keep.
        groups: Number of equal groups of rows (heads) that each keep the same number; 1 if the numbers do not divide.

    Returns:
        Their indices in increasing order, (number,).
    """
    score = importance.abs().flatten(1).sum(1)
    rows = len(score)
    if rows % groups or number % groups:
        groups = 1
    best = score.view(groups, -1).topk(number // groups, dim=1).indices
    first = torch.arange(groups, device=best.device).unsqueeze(1) * (rows // groups)
    return (best + first).flatten().sort().values


def prune(view: View, model: nn.Module, rungs: Sequence[Rung], per_head: bool) -> dict[str, Tensor]:
    """Extract a narrow network from a backbone.

    A bias that the backbone lacks is left out. Of a gated MLP the value part is used, with rows chosen by the product
    with the gate.

    Args:
        view: The backbone's description.
        model: The backbone; only its own tensors are read, not those of adapters.
        rungs: The network's size beside every block.
        per_head: Whether to keep the same number of query, key and value channels in each head.

    Returns:
        Float32 tensors by name: ``blocks.<block>.attn.qkv.weight``, ``merging.<first block>.norm.weight``,
        ``norm.weight`` and so on.
    """
    walk = _Walk(view, model)
    found: dict[str, Tensor] = {}
    stage = rungs[0].stage
    embed = next(view.at("patch_embed"))
    kept = strongest(walk.weight(embed), rungs[0].width)
    for rung in rungs:
        if rung.stage != stage:
            stage = rung.stage
            kept = walk.merging(rung, kept, found)
        kept = walk.attention(rung, kept, per_head, found)
        kept = walk.mlp(rung, kept, found)
    norm = next((site for site in view.at("final_norm", "fc_norm") if walk.tensor(site, "weight") is not None), None)
    walk.take(found, "norm", norm, kept)
    return found


class _Walk:
    """The layers of a backbone in forward order; each step returns the channels kept after the layer."""

    def __init__(self, view: View, model: nn.Module) -> None:
        self.view, self.model = view, model
        self.by_role = {(site.block, site.role): site for site in view.sites if site.block is not None}

    def tensor(self, site: Site, name: str) -> Tensor | None:
        """Return a tensor of the base without adapters: for a slice its rows, and a bias also from the site's owner."""
        held = frozen_tensor(self.model.get_submodule(site.path), name)
        if held is None and name == "bias" and site.owner is not None:
            return self._float(frozen_tensor(self.model.get_submodule(site.owner), f"{site.part}_bias"))
        value = self._float(held)
        return value if value is None or site.rows is None else value[site.rows.start : site.rows.stop]

    def weight(self, site: Site) -> Tensor:
        """Return a weight that must exist."""
        value = self.tensor(site, "weight")
        assert value is not None, f"{site.path} has no weight"
        return value

    @staticmethod
    def _float(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().float()

    def take(self, found: dict[str, Tensor], name: str, site: Site | None, rows: Tensor) -> None:
        """Keep the entries of a norm."""
        for tensor in () if site is None else ("weight", "bias"):
            assert site is not None
            value = self.tensor(site, tensor)
            if value is not None:
                found[f"{name}.{tensor}"] = value[rows]

    def layer(self, found: dict[str, Tensor], name: str, site: Site, rows: Tensor, columns: Tensor) -> None:
        """Keep rows and columns of a linear layer."""
        found[f"{name}.weight"] = self.weight(site)[rows][:, columns]
        bias = self.tensor(site, "bias")
        if bias is not None:
            found[f"{name}.bias"] = bias[rows]

    def attention(self, rung: Rung, kept: Tensor, per_head: bool, found: dict[str, Tensor]) -> Tensor:
        """Keep the same rows of queries, keys and values, chosen by the product of the three weights."""
        place = f"blocks.{rung.block}"
        self.take(found, f"{place}.norm1", self.by_role[rung.block, "norm1"], kept)
        parts = [self.by_role[rung.block, f"attn.{part}"] for part in ("q", "k", "v")]
        product = torch.stack([self.weight(part)[:, kept] for part in parts]).prod(0)
        heads = self.view.heads[rung.block]
        rows = strongest(product, rung.width, heads if per_head and heads == rung.heads else 1)
        found[f"{place}.attn.qkv.weight"] = torch.cat([self.weight(part)[rows][:, kept] for part in parts])
        biases = [self.tensor(part, "bias") for part in parts]
        if any(bias is not None for bias in biases):
            none = torch.zeros(len(rows), device=rows.device)
            found[f"{place}.attn.qkv.bias"] = torch.cat([none if bias is None else bias[rows] for bias in biases])
        self._table(rung, found)
        proj = self.by_role[rung.block, "attn.proj"]
        out = strongest(self.weight(proj)[:, rows], rung.width)
        self.layer(found, f"{place}.attn.proj", proj, out, rows)
        return out

    def _table(self, rung: Rung, found: dict[str, Tensor]) -> None:
        """Keep the relative-position bias unchanged, if the number of heads is the same."""
        site = self.by_role.get((rung.block, "rel_pos"))
        name = "relative_position_bias_table"
        table = None if site is None else self.tensor(site, name)
        if table is not None and table.shape[1] == rung.heads:
            found[f"blocks.{rung.block}.attn.{name}"] = table

    def mlp(self, rung: Rung, kept: Tensor, found: dict[str, Tensor]) -> Tensor:
        """Keep rows of the first layer and the matching columns of the second."""
        place = f"blocks.{rung.block}"
        self.take(found, f"{place}.norm2", self.by_role[rung.block, "norm2"], kept)
        parts = [self.by_role.get((rung.block, f"mlp.fc1{part}")) for part in ("_x", "_g")]
        first = [part for part in parts if part is not None] or [self.by_role[rung.block, "mlp.fc1"]]
        product = torch.stack([self.weight(part)[:, kept] for part in first]).prod(0)
        rows = strongest(product, rung.hidden)
        self.layer(found, f"{place}.mlp.fc1", first[0], rows, kept)
        second = self.by_role[rung.block, "mlp.fc2"]
        out = strongest(self.weight(second)[:, rows], rung.width)
        self.layer(found, f"{place}.mlp.fc2", second, out, rows)
        return out

    def merging(self, rung: Rung, kept: Tensor, found: dict[str, Tensor]) -> Tensor:
        """Keep the matching entries of all concatenated neighbours, and choose the output channels."""
        norm, reduction = (
            next(site for site in self.view.at(role) if site.stage == rung.stage)
            for role in ("downsample.norm", "downsample.reduction")
        )
        wide = norm.in_features // MERGED
        joined = torch.cat([kept + neighbour * wide for neighbour in range(MERGED)])
        self.take(found, f"merging.{rung.block}.norm", norm, joined)
        out = strongest(self.weight(reduction)[:, joined], rung.width)
        self.layer(found, f"merging.{rung.block}.reduction", reduction, out, joined)
        return out
