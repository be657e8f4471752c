"""Compacter: adapters whose matrices are sums of Kronecker products (Karimi Mahabadi et al., NeurIPS 2021).

Paper: arXiv 2106.04647; public code rabeehk/compacter at e123daa (read for facts only; it has no licence).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_roles_in, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import ParallelUnit, SequentialUnit, SharedUnit, Unit
from vispeft.errors import ConfigError
from vispeft.hosts.functional import linear
from vispeft.methods.adapter import ACTIVATIONS, LAYERNORM_EPS, branch_ends
from vispeft.methods.norm_tuning import NormTuning
from vispeft.storage.quantize import LowBit

__all__ = [
    "Compacter",
    "CompacterUnit",
    "PHMBottleneck",
    "PHMRule",
    "ParallelCompacterUnit",
    "UnitShape",
    "phm_linear",
    "phm_matrix",
]

Factored = Tensor | tuple[Tensor, Tensor]
"""A stack of matrices, or two stacks of factors whose products are the matrices."""
SHARED_START, OWN_START = 1e-4, 1e-2
"""Initial standard deviation of a rule shared by all layers, and of a layer's own rule (public code)."""


def phm_matrix(rule: Factored, weight: Factored) -> Tensor:
    """Build the matrix of a layer as a sum of Kronecker products: ``H = sum_i kron(rule_i, weight_i)``.

    Args:
        rule: (n, n, n), or its factors (n, n, k) and (n, k, n); any stack of n matrices.
        weight: (n, in / n, out / n), or its factors (n, in / n, k) and (n, k, out / n).

    Returns:
        H (in, out), which acts from the right: ``y = x H``.
    """
    rule, weight = _product(rule), _product(weight)
    products = torch.einsum("iab,icd->acbd", rule, weight)
    return products.flatten(2).flatten(0, 1)


def phm_linear(x: Tensor, rule: Factored, weight: Factored, bias: Tensor | None = None) -> Tensor:
    """Apply a parametrised hypercomplex layer: ``y = x H + b`` with the H of `phm_matrix`.

    H is small compared with the tokens, so building it is cheaper than mixing slices of every token.

    Args:
        x: (..., in).
        rule: See `phm_matrix`.
        weight: See `phm_matrix`.
        bias: (out,) or None.

    Returns:
        (..., out), in the type of `x`.
    """
    return linear(x, phm_matrix(rule, weight).t(), bias)


def _product(stack: Factored) -> Tensor:
    return stack if isinstance(stack, Tensor) else stack[0] @ stack[1]


class PHMRule(SharedUnit):
    """The rule (n, n, n) of all layers of an adapter."""

    no_decay = frozenset({"rule"})

    def __init__(self, n: int, spread: float) -> None:
        """Allocate the rule.

        Args:
            n: Number of Kronecker products, and side of the rule's matrices.
            spread: Standard deviation of its initial values.
        """
        super().__init__()
        self.spread = spread
        self.rule = nn.Parameter(torch.empty(n, n, n))

    def reset(self, generator: Generator) -> None:
        """Draw the rule from a normal distribution."""
        self.rule.normal_(0.0, self.spread, generator=generator)


@dataclass(frozen=True, kw_only=True)
class UnitShape:
    """Configuration of a Compacter unit."""

    width: int
    """Channels of the stream."""
    middle: int
    """Hidden channels."""
    n: int | None
    """Number of Kronecker products; None for plain products of the blocks' factors."""
    rank: int | None
    """Rank of the blocks; None for full-rank blocks."""
    own_rules: bool = False
    """Whether the unit has its own rules instead of the shared one."""
    spread: float = SHARED_START
    """Standard deviation of the initial values of its rule or rules."""
    layernorm: bool = False
    """Whether a LayerNorm comes last."""
    activation: str = "gelu_tanh"
    """One of `ACTIVATIONS`."""
    bits: int = 32
    """Bits per weight of the blocks."""

    @property
    def blocks(self) -> int:
        """Number of blocks per layer."""
        return self.n or 1

    def parameter_count(self) -> int:
        """Count ``2 k (d + m) + m + d`` (``2 d m / n + m + d`` with full blocks), and ``2 d`` of a norm."""
        d, m, k = self.width, self.middle, self.rank
        return (2 * d * m // self.blocks if k is None else 2 * k * (d + m)) + m + d + 2 * d * self.layernorm


class PHMBottleneck(LowBit, Unit):
    """The tensors of a bottleneck with two PHM layers, and its forward pass: ``up(activation(down(x)))``."""

    no_decay = frozenset({"down_rule", "up_rule"})

    def __init__(self, shape: UnitShape) -> None:
        """Allocate the tensors.

        Args:
            shape: The unit's configuration.
        """
        super().__init__()
        self.shape, self.bits = shape, shape.bits
        # Both layers are multiplied by the rule, so a small rule makes the branch zero up to rounding.
        self.identity_at_start = shape.spread <= SHARED_START and shape.n is not None and not shape.layernorm
        n, k = shape.blocks, shape.rank
        matrices = []
        for layer, (rows, columns) in self._sides().items():
            parts = {"": (rows, columns)} if k is None else {"_left": (rows, k), "_right": (k, columns)}
            for part, (height, width) in parts.items():
                matrices.append(f"{layer}{part}")
                self.register_parameter(matrices[-1], nn.Parameter(torch.empty(n, height, width)))
            self.register_parameter(f"{layer}_bias", nn.Parameter(torch.empty(n * columns)))
            if shape.own_rules:
                self.register_parameter(f"{layer}_rule", nn.Parameter(torch.empty(n, n, n)))
        self.matrices = tuple(matrices)
        self.norm_weight = nn.Parameter(torch.empty(shape.width)) if shape.layernorm else None
        self.norm_bias = nn.Parameter(torch.empty(shape.width)) if shape.layernorm else None

    def _sides(self) -> dict[str, tuple[int, int]]:
        """Return the rows and columns of each layer's blocks."""
        width, middle = self.shape.width // self.shape.blocks, self.shape.middle // self.shape.blocks
        return {"down": (width, middle), "up": (middle, width)}

    def reset(self, generator: Generator) -> None:
        """Initialise blocks Glorot-uniform with gain sqrt(2), rules from a normal, and biases at zero (public code)."""
        for name in self.matrices:
            for block in getattr(self, name):
                nn.init.xavier_uniform_(block, gain=math.sqrt(2), generator=generator)
        for layer in self._sides():
            getattr(self, f"{layer}_bias").zero_()
            if self.shape.own_rules:
                getattr(self, f"{layer}_rule").normal_(0.0, self.shape.spread, generator=generator)
        if self.norm_weight is not None and self.norm_bias is not None:
            self.norm_weight.fill_(1.0)
            self.norm_bias.zero_()

    def change(self, x: Tensor) -> Tensor:
        """Compute the term that is added to the stream.

        Args:
            x: (..., width).

        Returns:
            The same shape.
        """
        out = self._layer("up", ACTIVATIONS[self.shape.activation](self._layer("down", x)))
        if self.norm_weight is None or self.norm_bias is None:
            return out
        weight, bias = self.norm_weight.to(out.dtype), self.norm_bias.to(out.dtype)
        return F.layer_norm(out, (self.shape.width,), weight, bias, LAYERNORM_EPS)

    def _layer(self, layer: str, x: Tensor) -> Tensor:
        parts = [self.matrix(name) for name in self.matrices if name.startswith(layer)]
        weight = parts[0] if len(parts) == 1 else (parts[0], parts[1])
        bias = getattr(self, f"{layer}_bias")
        if self.shape.n is None:
            return linear(x, _product(weight)[0].t(), bias)
        rule = getattr(self, f"{layer}_rule") if self.shape.own_rules else cast(PHMRule, self.lender).rule
        return phm_linear(x, rule, weight, bias)


class CompacterUnit(PHMBottleneck, SequentialUnit):
    """The bottleneck after a layer: ``y + change(y)``."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the bottleneck's term to the layer's output, (..., width)."""
        return y + self.change(y)


class ParallelCompacterUnit(PHMBottleneck, ParallelUnit):
    """The bottleneck parallel to a branch of a block, from the residual stream."""

    reads = "stream"

    def __init__(self, shape: UnitShape, place: Literal["attn", "mlp"]) -> None:
        """Allocate the tensors.

        Args:
            shape: The unit's configuration.
            place: The branch it runs parallel to.
        """
        super().__init__(shape)
        self.place = place

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term, token by token, in the shape of `x`."""
        return self.change(x)


@register
@dataclass(frozen=True, kw_only=True)
class Compacter(FewBits, DropPath, Method):
    """A bottleneck after attention and MLP of each block, or parallel to them, of sums of Kronecker products.

    ``h + up(gelu(down(h)))`` with h the output of the branch's last linear layer, before layer scale and residual sum
    (the authors adapt a language model; this is the same place in a ViT). Compacter++ adapts the MLP only
    (``roles=["mlp"]``); PHM-Adapter has ``rank=None, shared_rule=False, phm_dim=12``; the low-rank adapter, whose
    matrices are plain products of two factors, ``phm_dim=None``. A new unit is almost the identity, unless the rule
    starts wider, there is none, or a norm comes last. With fewer than 32 bits the blocks are quantised; rules and
    biases are not. Polyhistor's comparison has all of them parallel to the MLP, with swish and a LayerNorm at the end.
    """

    bottleneck: int | None = None
    """Hidden channels; None for the width divided by `reduction`, rounded up to a multiple of `phm_dim`."""
    phm_dim: int | None = 4
    """Number of Kronecker products; must divide the width and the hidden channels (paper). None for plain products."""
    rank: int | None = 1
    """Rank of the blocks (paper); None for full blocks."""
    shared_rule: bool = True
    """Whether the whole adapter shares one rule (paper); otherwise each unit has two."""
    reduction: int = 32
    """Width divided by hidden channels (paper)."""
    rule_start: float | None = None
    """Standard deviation of the rules' initial values; None for the public code's: 0.0001 if shared, else 0.01. Use
    0.01 if a short training run does not move the rule."""
    train_layernorm: bool = False
    """Whether the backbone's norms also train, as in the authors' runs."""
    parallel: bool = False
    """Whether the unit runs parallel to the branch, from the residual stream, instead of after it."""
    layernorm: Literal["none", "out"] = "none"
    """A LayerNorm after the second layer (``out``), or none."""
    activation: Literal["gelu_tanh", "swish"] = "gelu_tanh"
    """Activation between the two layers."""

    name: ClassVar[str] = "compacter"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.04647"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=3e-3,
            weight_decay=1e-4,
            source="language (GLUE): 3e-3 (rabeehk/compacter e123daa); no recipe for images was published",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "bottleneck", "phm_dim", "rank", "reduction")
        if not 0 < self._spread < math.inf:
            raise ConfigError(f"Compacter(rule_start={self.rule_start}): a spread above 0 is needed.")
        check_roles_in(self, self.default_roles)
        if self.phm_dim is None and self.rank is None:
            raise ConfigError("Compacter(phm_dim=None, rank=None) has full plain matrices; take Adapter instead.")

    @property
    def _spread(self) -> float:
        return self.rule_start if self.rule_start is not None else SHARED_START if self.shared_rule else OWN_START

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put the shared rule at the first block and a bottleneck after, or parallel to, each branch."""
        branches = self.sites(view)
        lender = None
        if self.shared_rule and self.phm_dim is not None:
            block = next(view.blocks_of(branches))
            rule = PlanItem(block, "compacter_rule", partial(PHMRule, self.phm_dim, self._spread))
            lender = rule.key
            yield rule
        places = view.blocks_of(branches) if self.parallel else branch_ends(view, branches)
        for branch, site in zip(branches, places, strict=True):
            shape = self._shape(site)
            if not self.parallel:
                yield PlanItem(site, "compacter", partial(CompacterUnit, shape), lender)
            else:
                name = "compacter" if branch.role == "mlp" else "compacter_attn"
                yield PlanItem(site, name, partial(ParallelCompacterUnit, shape, branch.role), lender)
        if self.train_layernorm:
            yield from self._norms().items(view, model)

    def _norms(self) -> NormTuning:
        return NormTuning(blocks=self.blocks)

    def _shape(self, site: Site) -> UnitShape:
        width, n = site.out_features, self.phm_dim or 1
        middle = self.bottleneck or -(-(width // self.reduction or 1) // n) * n
        if width % n or middle % n:
            raise ConfigError(
                f"Compacter(phm_dim={n}, bottleneck={self.bottleneck}): {site.path} is {width} wide, with {middle} "
                f"channels in between; {n} must divide both. Choose another phm_dim or bottleneck."
            )
        return UnitShape(
            width=width,
            middle=middle,
            n=self.phm_dim,
            rank=self.rank,
            own_rules=self.phm_dim is not None and not self.shared_rule,
            spread=self._spread,
            layernorm=self.layernorm == "out",
            activation=self.activation,
            bits=self.bits,
        )

    def parameter_count(self, view: View) -> int:
        """Count ``2 k (d + m) + m + d`` per unit (``2 d m / n + m + d`` with full blocks), and ``n^3`` per rule."""
        ends = list(branch_ends(view, self.sites(view)))
        total = sum(self._shape(end).parameter_count() for end in ends)
        rules = 0 if self.phm_dim is None else 1 if self.shared_rule else 2 * len(ends)
        return total + rules * (self.phm_dim or 0) ** 3 + self._norm_count(view)

    def _norm_count(self, view: View) -> int:
        return self._norms().parameter_count(view) if self.train_layernorm else 0
