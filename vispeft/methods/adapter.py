"""Bottleneck adapters, sequential and parallel (Houlsby et al., ICML 2019; He et al., ICLR 2022, arXiv 2110.04366)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_roles_in, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import ParallelUnit, SequentialUnit, Unit
from vispeft.errors import ConfigError
from vispeft.hosts.functional import linear
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = [
    "Adapter",
    "Bottleneck",
    "BottleneckUnit",
    "ParallelBottleneck",
    "SequentialBottleneck",
    "branch_ends",
]

LAYERNORM_EPS = 1e-5
"""PyTorch's default, as in the public code (jxhe/unify-parameter-efficient-tuning)."""
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swish": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activations between the two layers; ReLU in both papers."""
START_SPREADS = {"bert": 0.02, "small": 0.01}
"""Standard deviations of the initial values of both matrices, in the public codes of He et al. and of Polyhistor."""


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """Configuration of a bottleneck: ``scale * up(dropout(activation(down(x))))``."""

    width: int
    """Channels of the stream."""
    middle: int
    """Hidden channels."""
    scale: float | None = 1.0
    """Multiplier; None for a learned scalar that starts at one."""
    bias: bool = True
    """Whether the two layers have biases."""
    layernorm: str = "none"
    """A LayerNorm at the input (``in``), at the output (``out``), or ``none``."""
    activation: str = "relu"
    """One of `ACTIVATIONS`."""
    dropout: float = 0.0
    """Fraction of the hidden channels dropped during training."""
    start: str = "lora"
    """``lora``: first matrix uniform, second zero; one of `START_SPREADS`: both normal."""
    bits: int = 32
    """Bits per weight of the two matrices."""


class BottleneckUnit(LowBit, Unit):
    """The tensors of a bottleneck and its forward pass."""

    matrices = ("down", "up")

    def __init__(self, shape: Bottleneck) -> None:
        """Allocate the tensors.

        Args:
            shape: The bottleneck's configuration.
        """
        super().__init__()
        self.shape, self.bits = shape, shape.bits
        self.identity_at_start = shape.start == "lora" and shape.bits == 32
        width, middle = shape.width, shape.middle
        self.down = nn.Parameter(torch.empty(middle, width))
        self.up = nn.Parameter(torch.empty(width, middle))
        self.down_bias = nn.Parameter(torch.empty(middle)) if shape.bias else None
        self.up_bias = nn.Parameter(torch.empty(width)) if shape.bias else None
        normed = shape.layernorm != "none"
        self.norm_weight = nn.Parameter(torch.empty(width)) if normed else None
        self.norm_bias = nn.Parameter(torch.empty(width)) if normed else None
        self.scale = nn.Parameter(torch.empty(1)) if shape.scale is None else None

    def reset(self, generator: Generator) -> None:
        """Initialise the first matrix as PyTorch's linear layer and the second at zero, or both from a normal."""
        if self.shape.start in START_SPREADS:
            for weight in (self.down, self.up):
                weight.normal_(0.0, START_SPREADS[self.shape.start], generator=generator)
        else:
            bound = 1 / math.sqrt(self.shape.width)
            self.down.uniform_(-bound, bound, generator=generator)
            start_above_zero(self.up, self.bits, generator)
        for bias in (self.down_bias, self.up_bias, self.norm_bias):
            if bias is not None:
                bias.zero_()
        for factor in (self.norm_weight, self.scale):
            if factor is not None:
                factor.fill_(1.0)

    def change(self, x: Tensor) -> Tensor:
        """Compute the term that is added to the stream.

        Args:
            x: (..., width).

        Returns:
            The same shape.
        """
        hidden = self._norm(x) if self.shape.layernorm == "in" else x
        hidden = ACTIVATIONS[self.shape.activation](linear(hidden, self.matrix("down"), self.down_bias))
        hidden = F.dropout(hidden, self.shape.dropout, self.training)
        out = linear(hidden, self.matrix("up"), self.up_bias)
        if self.scale is not None:
            out = out * self.scale.to(out.dtype)
        elif self.shape.scale != 1.0:
            out = out * self.shape.scale
        return self._norm(out) if self.shape.layernorm == "out" else out

    def _norm(self, x: Tensor) -> Tensor:
        weight, bias = (cast(Tensor, tensor).to(x.dtype) for tensor in (self.norm_weight, self.norm_bias))
        return F.layer_norm(x, (self.shape.width,), weight, bias, LAYERNORM_EPS)


class SequentialBottleneck(BottleneckUnit, SequentialUnit):
    """A bottleneck after a layer: ``y + change(y)``."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the bottleneck's term to the layer's output, (..., width)."""
        return y + self.change(y)


class ParallelBottleneck(BottleneckUnit, ParallelUnit):
    """A bottleneck parallel to a branch of a block."""

    def __init__(self, shape: Bottleneck, place: Literal["attn", "mlp"], reads: Literal["stream", "normed"]) -> None:
        """Allocate the tensors.

        Args:
            shape: The bottleneck's configuration.
            place: The branch it runs parallel to.
            reads: Its input: the residual stream, or the branch's normalised input.
        """
        super().__init__(shape)
        self.place, self.reads = place, reads

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term, token by token, in the shape of `x`."""
        return self.change(x)


@register
@dataclass(frozen=True, kw_only=True)
class Adapter(FewBits, DropPath, Method):
    """A bottleneck after or parallel to the MLP or the attention of each block.

    Sequential: ``f + up(relu(down(f)))`` with f the output of the branch's last linear layer, before layer scale and
    residual sum. Parallel: the same term computed from the residual stream that enters the branch, before its norm
    (He et al.; in their pre-norm model the adapter reads the stream itself), or from the norm's output. A model that
    normalises after its branches (SwinV2) has no normalised input there, and the sequential form comes before that norm
    (form of this project).
    """

    bottleneck: int = 8
    """Hidden channels; 8 in published vision results, 64 and more in language."""
    reduction: int | None = None
    """Instead of `bottleneck`: width of a block divided by its hidden channels; 2 in Polyhistor's comparison."""
    scale: float | None = 1.0
    """Multiplier of the term; None for one learned scalar per unit that starts at one."""
    parallel: bool = False
    """Whether the bottleneck runs parallel to the branch instead of after it."""
    layernorm: Literal["none", "in", "out"] = "none"
    """A LayerNorm before the first layer (``in``), after the second (``out``), or none."""
    reads: Literal["stream", "normed"] = "stream"
    """Input of the parallel form: the residual stream, or the branch's normalised input."""
    activation: Literal["relu", "gelu", "quick_gelu", "swish", "gelu_tanh"] = "relu"
    """Activation between the two layers."""
    dropout: float = 0.0
    """Fraction of the hidden channels dropped during training."""
    bias: bool = True
    """Whether the two layers have biases."""
    start: Literal["lora", "bert", "small"] = "lora"
    """``lora`` starts as the identity; ``bert`` and ``small`` draw both matrices from a normal, standard deviation 0.02
    and 0.01."""

    name: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "https://arxiv.org/abs/1902.00751"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(bottleneck=8), FGVC.sized(bottleneck=8))
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "bottleneck", "reduction")
        check_factor(self, "scale")
        check_share(self, "dropout")
        if self.layernorm == "out" and self.start == "lora":
            raise ConfigError(
                "Adapter(layernorm='out', start='lora') would normalise a constant, whose gradient has no bound. "
                "Take start='bert', as the public code does."
            )
        check_roles_in(self, ("attn", "mlp"))

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one bottleneck after the last linear layer of each branch, or parallel to the branch."""
        if self.parallel:
            if self.reads == "normed":
                view.needs_norm_first(type(self).__name__)
            sites = self.sites(view)
            for branch, block in zip(sites, view.blocks_of(sites), strict=True):
                build = partial(ParallelBottleneck, self._shape(block.out_features), branch.role, self.reads)
                yield PlanItem(block, "adapter" if branch.role == "mlp" else "adapter_attn", build)
            return
        for site in branch_ends(view, self.sites(view)):
            yield PlanItem(site, "adapter", partial(SequentialBottleneck, self._shape(site.out_features)))

    def _shape(self, width: int) -> Bottleneck:
        return Bottleneck(
            width=width,
            middle=self._middle(width),
            scale=self.scale,
            bias=self.bias,
            layernorm=self.layernorm,
            activation=self.activation,
            dropout=self.dropout,
            start=self.start,
            bits=self.bits,
        )

    def _middle(self, width: int) -> int:
        return self.bottleneck if self.reduction is None else max(width // self.reduction, 1)

    def parameter_count(self, view: View) -> int:
        """Count ``2 m D + m + D`` per site (``2 m D`` without biases); a norm adds ``2 D``, a learned scale 1."""
        biases, norms = int(self.bias), 2 if self.layernorm != "none" else 0
        total = 0
        for width in (site.out_features for site in self.sites(view)):
            middle = self._middle(width)
            total += 2 * middle * width + biases * (middle + width) + norms * width + (self.scale is None)
        return total


def branch_ends(view: View, branches: Iterable[Site]) -> Iterator[Site]:
    """Find the last linear layer of attention and MLP branches.

    Args:
        view: The model's description.
        branches: Sites of role ``attn`` and ``mlp``.

    Yields:
        The site of each branch's last layer.
    """
    last = {"attn": "attn.proj", "mlp": "mlp.fc2"}
    for branch in branches:
        yield next(site for site in view.at(last[branch.role]) if site.block == branch.block)
