"""Rein: learned tokens that refine the patch tokens behind each block (Wei et al., CVPR 2024, arXiv 2312.04265)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, check_roles_in, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import View
from vispeft.core.units import ParallelUnit, SharedUnit
from vispeft.errors import ConfigError, SiteError
from vispeft.hosts.functional import linear

__all__ = ["Rein", "ReinShared", "ReinUnit", "rein_queries"]

SCALE = 0.001
"""Start of the scale (public code: w1oves/Rein at 7da85bc)."""
LINK = ("transform", "merge")
"""The layers of the query link."""


class ReinShared(SharedUnit):
    """What all blocks share: their tokens, the two layers f and g, the scale, and the query link."""

    def __init__(self, method: Rein, blocks: int, width: int, patch: int) -> None:
        """Allocate the tensors.

        Args:
            method: The configuration.
            blocks: Number of blocks with tokens.
            width: Width of the blocks.
            patch: Numbers per patch (channels * height * width), for the start.
        """
        super().__init__()
        self.patch, rank, count, query = patch, method.rank, method.num_tokens, method.query
        self.scale = nn.Parameter(torch.empty(()))
        if rank is None:
            self.tokens = nn.Parameter(torch.empty(blocks, count, width))
        else:
            self.tokens_a = nn.Parameter(torch.empty(blocks, count, rank))
            self.tokens_b = nn.Parameter(torch.empty(blocks, rank, width))
        layers = {"value": (width, width), "output": (width, width)}
        if query is not None:
            layers |= {"transform": (query, width), "merge": (query, 3 * query)}
        for name, shape in layers.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(shape[0])))
        self.no_decay = frozenset({"tokens", "tokens_a", "tokens_b"})
        # Queries are for a decoder; the backbone's own outputs do not depend on their layers.
        self.zero_gradient = (
            frozenset(f"{name}{end}" for name in LINK for end in ("", "_bias")) if query else frozenset()
        )

    def reset(self, generator: Generator) -> None:
        """Draw tokens as the public code does, and layers as PyTorch's linear layer (Kaiming-uniform, a = sqrt 5)."""
        width, low_rank = self.value.shape[0], hasattr(self, "tokens_a")
        fan = math.sqrt(width * self.tokens_a.shape[-1]) if low_rank else width
        for name, tensor in self.named_parameters():
            if name.startswith("tokens"):
                bound = math.sqrt(6 / (self.patch + fan))
            elif name != "scale":
                bound = self.get_parameter(name.removesuffix("_bias")).shape[1] ** -0.5
            else:
                tensor.fill_(SCALE)
                continue
            tensor.uniform_(-bound, bound, generator=generator)

    def sliced(self, name: str, tensor: Tensor) -> Tensor:
        """Drop the tokens of blocks that a truncated model lacks."""
        return tensor[: self.get_parameter(name).shape[0]] if name.startswith("tokens") else tensor

    def all_tokens(self) -> Tensor:
        """Return the tokens of all blocks, (blocks, count, width)."""
        return self.tokens_a @ self.tokens_b if hasattr(self, "tokens_a") else self.tokens

    def tokens_of(self, index: int) -> Tensor:
        """Return the tokens of one block, (count, width)."""
        return self.tokens_a[index] @ self.tokens_b[index] if hasattr(self, "tokens_a") else self.tokens[index]

    def queries(self) -> Tensor:
        """Compute queries for a mask transformer, (count, query): maximum, mean and last of the blocks, merged."""
        each = linear(self.all_tokens(), self.transform, self.transform_bias)
        three = torch.stack([each.amax(0), each.mean(0), each[-1]], dim=-1)  # three values of a channel side by side
        return linear(three.flatten(-2), self.merge, self.merge_bias)


class ReinUnit(ParallelUnit):
    """``scale * g(delta + u)`` behind a block; ``delta = a f(T)``, with ``a`` the attention of patches u to tokens T.

    The first token has a column in the softmax and no value. Prefix tokens are left alone.
    """

    place, reads, needs_grid, identity_at_start = "mlp", "sum", True, False

    def __init__(self, index: int, softmax: bool) -> None:
        """Set its place among the blocks.

        Args:
            index: Index among the blocks with tokens.
            softmax: Whether the attention is a softmax of scaled products.
        """
        super().__init__()
        self.index, self.softmax = index, softmax

    def reset(self, generator: Generator) -> None:
        """Do nothing: the tensors are the lender's."""

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term from tokens (B, N, D), zero for the prefix; of maps, each pixel is a patch."""
        shared = cast(ReinShared, self.lender)
        patches = x if x.ndim == 4 else x[:, prefix:]
        tokens = shared.tokens_of(self.index).to(x.dtype)
        attention = patches @ tokens.t()
        if self.softmax:
            attention = (attention * tokens.shape[1] ** -0.5).softmax(dim=-1)
        delta = attention[..., 1:] @ linear(tokens[1:], shared.value, shared.value_bias)
        term = linear(delta + patches, shared.output, shared.output_bias) * shared.scale.to(x.dtype)
        return term if x.ndim == 4 else torch.cat([torch.zeros_like(x[:, :prefix]), term.to(x.dtype)], dim=1)


@register
@dataclass(frozen=True, kw_only=True)
class Rein(DropPath, Method):
    """Learned tokens that refine the patches behind each block, for segmentation on DINOv2 and DINOv3.

    Tokens differ by block; the layers that bring them back to the patches are shared. All prefix tokens are left alone,
    registers included. It starts close to the identity, with a scale of 0.001 (public code). With `query` the tokens
    also make queries for a mask transformer (`vispeft.methods.rein_queries`); no decoder of this project reads them, so
    they are off by default.
    """

    num_tokens: int = 100
    """Number of tokens of each block."""
    rank: int | None = 16
    """Tokens are products of this rank; None for full tokens."""
    query: int | None = None
    """Width of the queries; 256 in the paper, None for no queries."""
    softmax: bool = True
    """Whether patches attend by a softmax of scaled products, or by plain products (public code)."""

    name: ClassVar[str] = "rein"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.04265"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=1e-4,
            weight_decay=0.05,
            source="segmentation on DINOv2-L: AdamW, 40,000 steps, batch 4, 512 pixels (w1oves/Rein 7da85bc)",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("block",)

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "num_tokens", "rank", "query")
        if self.num_tokens < 2:
            raise ConfigError("Rein(num_tokens=1): the first token has no value; at least 2 are needed.")
        check_roles_in(self, ("block",))

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put the shared tensors at the first block, and one unit behind each."""
        if view.has_stages:
            raise SiteError(
                f"Rein shares its layers among blocks of one width, and {view.family} has several: there is no stated "
                "form for it. Take a ViT or Eva, or Mona on Swin."
            )
        sites = self.sites(view)
        patch = view.in_chans * math.prod(view.patch_size)
        shared = PlanItem(sites[0], "rein_shared", partial(ReinShared, self, len(sites), sites[0].out_features, patch))
        yield shared
        for index, site in enumerate(sites):
            yield PlanItem(site, "rein", partial(ReinUnit, index, self.softmax), lender=shared.key)

    def parameter_count(self, view: View) -> int:
        """Count ``L r (M + d) + 2 (d^2 + d) + 1`` (full tokens ``L M d``), and ``d q + 3 q^2 + 2 q`` for queries."""
        sites, q = self.sites(view), self.query or 0
        width, blocks = sites[0].out_features, len(sites)
        own = self.num_tokens * width if self.rank is None else self.rank * (self.num_tokens + width)
        return blocks * own + 2 * (width * width + width) + 1 + q * width + 3 * q * q + 2 * q


def rein_queries(bank: Any, name: str | None = None) -> Tensor:
    """Compute the queries that a Rein adapter's tokens make for a mask transformer.

    Args:
        bank: The bank of the model.
        name: The adapter; may be None if only one acts.

    Returns:
        (num_tokens, query), with gradients.

    Raises:
        ConfigError: If the adapter is no Rein, or has no query link.
    """
    shared = next((unit for unit in bank.units(name).values() if isinstance(unit, ReinShared)), None)
    if shared is None or not hasattr(shared, "transform"):
        raise ConfigError("Queries were asked for, and the adapter makes none. Attach Rein(query=256).")
    return shared.queries()
