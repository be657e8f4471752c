"""Prefix tuning (Li and Liang, ACL 2021; in the form of He et al., ICLR 2022, arXiv 2110.04366)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import check_roles_in, check_share, check_whole
from vispeft.core.generated import MakesTensors
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import PrefixUnit, SharedUnit
from vispeft.errors import ConfigError

__all__ = ["Prefix", "PrefixMLP", "PrefixSlot", "PrefixTables", "check_network", "prefix_count", "prefix_items"]

SPREAD = 0.02
"""Standard deviation of the start of tables (public code)."""


class PrefixTables(PrefixUnit):
    """Keys and values of one attention, trained as they are."""

    def __init__(self, length: int, width: int) -> None:
        """Make room for the tables.

        Args:
            length: Number of keys.
            width: Width of all heads together.
        """
        super().__init__()
        self.keys = nn.Parameter(torch.empty(length, width))
        self.values = nn.Parameter(torch.empty(length, width))

    def reset(self, generator: Generator) -> None:
        """Draw both tables near zero."""
        self.keys.normal_(0.0, SPREAD, generator=generator)
        self.values.normal_(0.0, SPREAD, generator=generator)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Give the tables."""
        return self.keys, self.values


class PrefixMLP(MakesTensors, SharedUnit):
    """A small network that makes the tables of all attention modules: ``outer(tanh(inner(embedding)))``."""

    def __init__(self, length: int, width: int, middle: int, total: int, dropout: float) -> None:
        """Make room for the network.

        Args:
            length: Number of keys.
            width: Width of the embedding.
            middle: Width of the layer in between.
            total: Widths of all tables together.
            dropout: Share of what it makes that is dropped while training.
        """
        super().__init__()
        self.dropout = dropout
        self.embedding = nn.Parameter(torch.empty(length, width))
        self.inner = nn.Linear(width, middle)
        self.outer = nn.Linear(middle, total)

    def reset(self, generator: Generator) -> None:
        """Draw the embedding from a unit normal and the layers as PyTorch does."""
        self.embedding.normal_(generator=generator)
        for layer in (self.inner, self.outer):
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)

    def tables(self, start: int, width: int) -> tuple[Tensor, Tensor]:
        """Compute the keys and the values of one attention; in evaluation once for each state of the network.

        Args:
            start: First column of the keys among all tables; the values follow.
            width: Width of each.

        Returns:
            Keys and values, (length, width) each.
        """
        sources = (self.embedding, self.inner.weight, self.inner.bias, self.outer.weight, self.outer.bias)
        return self.once(start, sources, partial(self._tables, start, width))

    def _tables(self, start: int, width: int) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.inner(self.embedding))
        keys, values = (
            F.linear(hidden, self.outer.weight[columns], self.outer.bias[columns])
            for columns in (slice(start, start + width), slice(start + width, start + 2 * width))
        )
        return F.dropout(keys, self.dropout, self.training), F.dropout(values, self.dropout, self.training)

    def file_tensors(self) -> dict[str, Tensor]:
        """Give nothing: a file holds the tables."""
        return {}


class PrefixSlot(PrefixUnit):
    """Keys and values of one attention, made by the network that all of them share."""

    def __init__(self, width: int, start: int) -> None:
        """Remember which tables these are.

        Args:
            width: Width of all heads together.
            start: First column of the keys among all tables; the values follow.
        """
        super().__init__()
        self.width, self.start = width, start

    def reset(self, generator: Generator) -> None:
        """Have nothing to start."""

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Compute the tables."""
        return cast(PrefixMLP, self.lender).tables(self.start, self.width)

    @torch.no_grad()
    def file_tensors(self) -> dict[str, Tensor]:
        """Give the tables as they are without dropout, under the names of `PrefixTables`."""
        network = cast(PrefixMLP, self.lender)
        mode = network.training
        network.training = False
        keys, values = self.keys_values()
        network.training = mode
        return {"keys": keys.clone(), "values": values.clone()}


def prefix_items(sites: list[Site], view: View, length: int, mid_dim: int | None, dropout: float) -> Iterator[PlanItem]:
    """Plan keys and values at attention sites.

    Args:
        sites: Sites of the role ``attn.core``.
        view: The model's description.
        length: Number of keys.
        mid_dim: Width inside the network that makes the tables; None for tables alone.
        dropout: Share of what the network makes that is dropped while training.

    Yields:
        The network first, where there is one, at the first block; then one item per site.
    """
    if mid_dim is None:
        for site in sites:
            yield PlanItem(site, "prefix", partial(PrefixTables, length, site.in_features))
        return
    block, total = next(view.blocks_of(sites)), 2 * sum(site.in_features for site in sites)
    build = partial(PrefixMLP, length, block.out_features, mid_dim, total, dropout)
    network = PlanItem(block, "prefix_mlp", build)
    yield network
    start = 0
    for site in sites:
        yield PlanItem(site, "prefix", partial(PrefixSlot, site.in_features, start), lender=network.key)
        start += 2 * site.in_features


def prefix_count(sites: list[Site], view: View, length: int, mid_dim: int | None) -> int:
    """Count the parameters of a prefix: ``2 l`` times the sum of widths S, or ``l D + (D + 1) mid + (mid + 1) 2 S``.

    Args:
        sites: Sites of the role ``attn.core``.
        view: The model's description.
        length: Number of keys, l.
        mid_dim: Width inside the network that makes the tables; None for tables alone.
    """
    total = 2 * sum(site.in_features for site in sites)
    if mid_dim is None:
        return length * total
    width = next(view.blocks_of(sites)).out_features
    return length * width + (width + 1) * mid_dim + (mid_dim + 1) * total


def check_network(method: Method, mid_dim: int | None, dropout: float) -> None:
    """Refuse dropout where no network makes the tables.

    Args:
        method: The method, for messages.
        mid_dim: Width inside the network, or None.
        dropout: Share of its outputs dropped while training.

    Raises:
        ConfigError: If there is dropout and no network.
    """
    if dropout and mid_dim is None:
        raise ConfigError(
            f"{type(method).__name__}: dropout acts on the outputs of the network; give mid_dim, or leave it 0."
        )


@register
@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """Keys and values of an adapter's own in every attention, the same for all images and without a position.

    Tokens attend to them beside each other; no token is added. They stand behind the norms and rotations of keys; on
    Swin in front of every window, with a position bias and a mask of zero. On SwinV2 (form of this project) a learned
    key is compared by cosine like every other, and its position bias is what the model makes of a zero.

    With `mid_dim` a small network makes the tables while training. A file holds the tables alone: an adapter that was
    loaded has no network and trains its tables.
    """

    length: int = 16
    """Number of keys and values; 5 to 50 on images, 200 in language."""
    mid_dim: int | None = None
    """Width inside the network that makes the tables (800 in the public code); None for tables alone."""
    dropout: float = 0.0
    """Share of what the network makes that is dropped while training."""

    name: ClassVar[str] = "prefix"
    paper: ClassVar[str] = "https://arxiv.org/abs/2101.00190"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(length=16), FGVC.sized(length=16))
    default_roles: ClassVar[tuple[str, ...]] = ("attn.core",)

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_whole(self, "length", "mid_dim")
        check_share(self, "dropout")
        check_network(self, self.mid_dim, self.dropout)
        check_roles_in(self, ("attn.core",), "Keys and values are added where softmax is.")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put keys and values at each attention."""
        yield from prefix_items(self.sites(view), view, self.length, self.mid_dim, self.dropout)

    def file_method(self) -> Method:
        """Give the method without the network, whose tables a file holds."""
        return dataclasses.replace(self, mid_dim=None, dropout=0.0)

    def parameter_count(self, view: View) -> int:
        """Count ``2 l`` times the sum of widths, or the network."""
        return prefix_count(self.sites(view), view, self.length, self.mid_dim)
