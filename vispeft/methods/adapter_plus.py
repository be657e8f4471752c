"""Adapter+: a bottleneck behind the whole block, with a scale per channel (Steitz and Roth, arXiv 2406.06820)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import drop_path
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_roles_in, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import View
from vispeft.core.units import ParallelUnit
from vispeft.hosts.functional import linear
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["AdapterPlus", "AdapterPlusUnit"]

LAYERNORM_EPS = 1e-6
"""Of the norm inside the adapter (public code: visinf/adapter_plus at 191c4ab)."""
SPREAD, CUT = 0.01, 0.02
"""Standard deviation and bounds of both matrices in the start ``houlsby`` (public code)."""
BERT_SPREAD = 0.02
"""Standard deviation of both matrices in the start ``bert`` (public code)."""
PLACES: dict[str, tuple[tuple[Literal["attn", "mlp"], Literal["stream", "output", "sum"]], ...]] = {
    "post": (("mlp", "sum"),),
    "pre": (("attn", "sum"),),
    "parallel": (("mlp", "stream"),),
    "intermediate": (("mlp", "output"),),
    "houlsby": (("attn", "output"), ("mlp", "output")),
}
"""The branch and the input of the adapters of a block, by position."""


class AdapterPlusUnit(LowBit, ParallelUnit):
    """``s * drop(up(dropout(gelu(down(norm(x))))))``; stochastic depth drops the scaled term of whole images."""

    matrices = ("down", "up")

    def __init__(self, method: AdapterPlus, width: int, place: Literal["attn", "mlp"], reads: str) -> None:
        """Allocate the tensors.

        Args:
            method: The configuration.
            width: Channels of the stream.
            place: The branch it belongs to.
            reads: Its input, see `ParallelUnit.reads`.
        """
        super().__init__()
        self.method, self.bits, self.place = method, method.bits, place
        self.reads = reads  # type: ignore[assignment]  # one of `PLACES`
        self.identity_at_start = method.start == "lora" and method.bits == 32
        middle, biases, norms = method.bottleneck, method.bias, method.layernorm
        self.down = nn.Parameter(torch.empty(middle, width))
        self.up = nn.Parameter(torch.empty(width, middle))
        self.down_bias = nn.Parameter(torch.empty(middle)) if biases else None
        self.up_bias = nn.Parameter(torch.empty(width)) if biases else None
        self.norm_weight = nn.Parameter(torch.empty(width)) if norms else None
        self.norm_bias = nn.Parameter(torch.empty(width)) if norms else None
        learned = {"channel": width, None: 1}.get(method.scale)  # type: ignore[call-overload]
        self.scale = nn.Parameter(torch.empty(learned)) if learned else None

    def reset(self, generator: Generator) -> None:
        """Draw both matrices as `AdapterPlus.start` says; biases start at zero but that of ``lora``, scales at one."""
        for tensor in (self.down_bias, self.up_bias, self.norm_bias):
            if tensor is not None:
                tensor.zero_()
        for tensor in (self.norm_weight, self.scale):
            if tensor is not None:
                tensor.fill_(1.0)
        if self.method.start == "lora":
            bound = self.down.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt 5
            for tensor in (self.down, self.down_bias):
                if tensor is not None:
                    tensor.uniform_(-bound, bound, generator=generator)
            start_above_zero(self.up, self.bits, generator)
            return
        for weight in (self.down, self.up):
            if self.method.start == "bert":
                weight.normal_(0.0, BERT_SPREAD, generator=generator)
            else:
                nn.init.trunc_normal_(weight, 0.0, SPREAD, -CUT, CUT, generator=generator)

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term, token by token, in the shape of `x`."""
        if self.norm_weight is not None and self.norm_bias is not None:
            affine = self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype)
            x = F.layer_norm(x, x.shape[-1:], *affine, LAYERNORM_EPS)
        hidden = linear(x, self.matrix("down"), self.down_bias)
        hidden = F.gelu(hidden) if self.method.activation == "gelu" else hidden
        hidden = F.dropout(hidden, self.method.dropout, self.training)
        out: Tensor = drop_path(linear(hidden, self.matrix("up"), self.up_bias), self.method.unit_drop, self.training)
        if self.scale is not None:
            return out * self.scale.to(out.dtype)
        return out * self.method.scale  # type: ignore[operator]  # a number


@register
@dataclass(frozen=True, kw_only=True)
class AdapterPlus(FewBits, DropPath, Method):
    """A bottleneck on the residual stream behind each block, with a learned scale per channel.

    In the form of the paper, ``out = z + s * drop(up(gelu(down(z))))`` with z the output of the block. On Swin it acts
    on the whole map behind each block (form of this project; the public code has ViTs alone). It starts near the
    identity and not at it: both matrices are drawn small, as the paper's ablation asks for; ``start="lora"`` starts at
    it. Other positions of the public code are there to be compared with.
    """

    bottleneck: int = 8
    """Hidden channels; 8 for all tasks, or 1 to 32 chosen per task, in the paper."""
    position: Literal["post", "pre", "parallel", "intermediate", "houlsby"] = "post"
    """``post``: behind the block. ``pre``: between attention and MLP. ``parallel``: beside the MLP, from its input
    before the norm. ``intermediate``: on the output of the MLP branch, ``houlsby``: of both branches, in both cases
    behind layer scale. ``post`` with `layernorm` is Pfeiffer's adapter."""
    scale: float | Literal["channel"] | None = "channel"
    """Multiplier of the term: one learned number per ``channel``, None for one learned number, or a fixed one."""
    layernorm: bool = False
    """Whether a LayerNorm comes before the first layer."""
    activation: Literal["gelu", "none"] = "gelu"
    """Activation between the two layers."""
    bias: bool = True
    """Whether the two layers have biases."""
    start: Literal["houlsby", "lora", "bert"] = "houlsby"
    """``houlsby``: both matrices from a truncated normal, standard deviation 0.01; ``bert``: from a normal, 0.02;
    ``lora``: the first uniform and the second zero."""
    dropout: float = 0.0
    """Fraction of the hidden channels dropped during training."""
    unit_drop: float = 0.1
    """Rate at which the term is dropped for an image during training, the same in each block (public code)."""

    name: ClassVar[str] = "adapter_plus"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.06820"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=1e-3,
            weight_decay=1e-4,
            fields={"bottleneck": 8, "drop_path": 0.1},
            source="AdamW, batch 64, 100 epochs, warm-up 10 (visinf/adapter_plus 191c4ab, conf)",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("block",)

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "bottleneck")
        check_share(self, "dropout", "unit_drop")
        if self.scale != "channel":
            check_factor(self, "scale")
        check_roles_in(self, ("block",))

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one adapter at each block, two in position ``houlsby``."""
        for site in self.sites(view):
            for place, reads in PLACES[self.position]:
                name = "adapter_attn" if (self.position, place) == ("houlsby", "attn") else "adapter"
                yield PlanItem(site, name, partial(AdapterPlusUnit, self, site.out_features, place, reads))

    def parameter_count(self, view: View) -> int:
        """Count ``2 h D + h + 2 D`` per block: two matrices, two biases and the scale; twice that for ``houlsby``.

        Without biases ``h + D`` fewer, with a norm ``2 D`` more; a single learned scale counts one.
        """
        h, total = self.bottleneck, 0
        for width in (site.out_features for site in self.sites(view)):
            scale = {"channel": width, None: 1}.get(self.scale, 0)  # type: ignore[arg-type]
            total += 2 * h * width + self.bias * (h + width) + 2 * self.layernorm * width + scale
        return total * len(PLACES[self.position])
