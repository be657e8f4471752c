"""Mona: adapters of several depthwise kernels behind attention and MLP (Yin et al., CVPR 2025, arXiv 2408.08345)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_roles_in, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import View
from vispeft.core.units import ParallelUnit
from vispeft.hosts.functional import linear
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["Mona", "MonaUnit"]

KERNELS = (3, 5, 7)
"""Sides of the depthwise kernels (paper)."""
LAYERNORM_EPS = 1e-5
"""PyTorch's default, as in the public code (Leiyi-Hu/mona at 5deeac9)."""
GAMMA = 1e-6
"""Start of the normed input's factor (public code)."""
SPREAD = 0.02
"""Standard deviation of both matrices at the start (public code)."""


class MonaUnit(LowBit, ParallelUnit):
    """``up(dropout(gelu(t)))``, ``t = q + mix q``, ``q = mean of convolutions of p + p``, ``p = down(g LN(x) + h x)``.

    The three kernels are averaged into one of 7 x 7, which gives the same values. Prefix tokens are convolved as images
    of one pixel, where only the centre of a kernel acts (form of this project).
    """

    needs_grid, reads, matrices = True, "sum", ("down", "up")

    def __init__(self, method: Mona, width: int, place: Literal["attn", "mlp"]) -> None:
        """Allocate the tensors.

        Args:
            method: The configuration.
            width: Channels of the stream.
            place: The branch it stands behind.
        """
        super().__init__()
        self.method, self.place, self.bits = method, place, method.bits
        self.identity_at_start = method.start == "identity" and method.bits == 32
        middle = method.bottleneck
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("norm_weight", "norm_bias", "gamma", "gamma_x", "up_bias"), (width,)),
            **dict.fromkeys(("down_bias", "mix_bias"), (middle,)),
            "down": (middle, width),
            "mix": (middle, middle, 1, 1),
            "up": (width, middle),
            **{f"conv{side}": (middle, 1, side, side) for side in KERNELS},
            **{f"conv{side}_bias": (middle,) for side in KERNELS},
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def reset(self, generator: Generator) -> None:
        """Draw matrices from a truncated normal and kernels as PyTorch does; `Mona.start` has the last matrix."""
        for name, start in {"gamma": GAMMA, "gamma_x": 1.0, "norm_weight": 1.0}.items():
            self.get_parameter(name).fill_(start)
        for name in ("norm_bias", "down_bias", "up_bias"):
            self.get_parameter(name).zero_()
        for name in ("mix", *(f"conv{side}" for side in KERNELS)):
            bound = self.get_parameter(name)[0].numel() ** -0.5
            for tensor in (self.get_parameter(name), self.get_parameter(f"{name}_bias")):
                tensor.uniform_(-bound, bound, generator=generator)
        for weight in (self.down, self.up):
            nn.init.trunc_normal_(weight, std=SPREAD, generator=generator)
        if self.method.start == "identity":
            start_above_zero(self.up, self.bits, generator)

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term from tokens (B, N, D), or from a map (B, H, W, D)."""
        normed = F.layer_norm(x, x.shape[-1:], self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype), LAYERNORM_EPS)
        entered = normed * self.gamma.to(x.dtype) + x * self.gamma_x.to(x.dtype)
        hidden = linear(entered, self.matrix("down"), self.down_bias)
        hidden = self._map(hidden) if hidden.ndim == 4 else self._tokens(hidden, grid, prefix)
        hidden = hidden + linear(hidden, self.mix.flatten(1), self.mix_bias)
        hidden = F.dropout(F.gelu(hidden), self.method.dropout, self.training)
        return linear(hidden, self.matrix("up"), self.up_bias)

    def _kernel(self) -> tuple[Tensor, Tensor]:
        """Average the kernels, padded with zeros to the largest, and their biases."""
        last, parts = KERNELS[-1], [(self.get_parameter(f"conv{side}"), side) for side in KERNELS]
        kernels = [F.pad(kernel, [(last - side) // 2] * 4) for kernel, side in parts]
        biases = [self.get_parameter(f"conv{side}_bias") for side in KERNELS]
        return torch.stack(kernels).mean(0), torch.stack(biases).mean(0)

    def _map(self, hidden: Tensor) -> Tensor:
        kernel, bias = (tensor.to(hidden.dtype) for tensor in self._kernel())
        near = hidden.permute(0, 3, 1, 2)
        mixed = F.conv2d(near, kernel, bias, padding=kernel.shape[-1] // 2, groups=near.shape[1])
        return hidden + mixed.permute(0, 2, 3, 1)

    def _tokens(self, hidden: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        assert grid is not None, "the model's own forward hands the grid to blocks that want it"
        patches = self._map(hidden[:, prefix:].unflatten(1, grid)).flatten(1, 2)
        kernel, bias = (tensor.to(hidden.dtype) for tensor in self._kernel())
        centre, alone = kernel[:, 0, kernel.shape[-2] // 2, kernel.shape[-1] // 2], hidden[:, :prefix]
        return torch.cat([alone + alone * centre + bias, patches], dim=1)


@register
@dataclass(frozen=True, kw_only=True)
class Mona(FewBits, DropPath, Method):
    """Adapters of three depthwise kernels on the residual stream, behind attention and behind the MLP of each block.

    ``M(x) = x + up(dropout(gelu(t)))`` acts on the whole map of a Swin, not on its windows. Its published start is not
    the identity (about 2 % of a random map), and is the default, since the published results have it; with
    ``start="identity"`` the last matrix is zero. ViTs take it on the grid of their patches (form of this project). The
    public code leaves the norms of handed-out maps at one and zero; here they are those of the backbone.
    """

    bottleneck: int = 64
    """Hidden channels, the same in each stage (public code)."""
    start: Literal["released", "identity"] = "released"
    """``released``: both matrices from a truncated normal, standard deviation 0.02; ``identity``: the second zero."""
    dropout: float = 0.1
    """Fraction of the hidden channels dropped during training (public code)."""

    name: ClassVar[str] = "mona"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.08345"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=1e-4,
            weight_decay=0.05,
            fields={"drop_path": 0.2},
            source="COCO, Cascade Mask R-CNN on Swin-B: AdamW, batch 16, 36 epochs (Leiyi-Hu/mona 5deeac9)",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "bottleneck")
        check_share(self, "dropout")
        check_roles_in(self, ("attn", "mlp"))

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one adapter behind each branch."""
        sites = self.sites(view)
        for branch, block in zip(sites, view.blocks_of(sites), strict=True):
            yield PlanItem(block, f"mona_{branch.role}", partial(MonaUnit, self, block.out_features, branch.role))

    def parameter_count(self, view: View) -> int:
        """Count ``(2 m + 5) D + m^2 + 88 m`` per branch: two linear layers, norm, two factors, kernels and mixing."""
        m = self.bottleneck
        return sum((2 * m + 5) * site.out_features + m * m + 88 * m for site in self.sites(view))
