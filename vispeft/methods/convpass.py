"""Convpass: convolutional bypasses parallel to attention and MLP (Jie and Deng, arXiv 2207.07039)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_roles_in, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import View
from vispeft.core.units import ParallelUnit
from vispeft.hosts.functional import linear
from vispeft.methods.adapter import ACTIVATIONS
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["Convpass", "ConvpassUnit"]

quick_gelu = ACTIVATIONS["quick_gelu"]


class ConvpassUnit(LowBit, ParallelUnit):
    """A bottleneck with a 3x3 convolution over the token grid: ``s * up(act(conv(act(down(u)))))``.

    Patch tokens are convolved on their grid; each prefix token is convolved as a one-pixel image, where only the
    kernel's centre acts (public code for the class token; the same for registers, form of this project).
    """

    needs_grid, reads, drops = True, "normed", True

    def __init__(
        self,
        width: int,
        middle: int,
        place: Literal["attn", "mlp"],
        scale: float,
        dropout: float,
        start: str,
        bits: int,
    ) -> None:
        """Allocate the tensors.

        Args:
            width: Channels of the stream.
            middle: Hidden channels.
            place: The branch it runs parallel to.
            scale: Multiplier of the term.
            dropout: Fraction of the hidden channels dropped during training.
            start: Initialisation of the kernel: ``xavier`` or ``identity``.
            bits: Bits per weight of the matrices.
        """
        super().__init__()
        self.place, self.scale, self.dropout, self.start, self.bits = place, scale, dropout, start, bits
        # A kernel that starts as the identity keeps full precision: quantising it would destroy the initialisation.
        self.matrices = ("down", "conv", "up") if start == "xavier" else ("down", "up")
        self.identity_at_start = bits == 32
        self.down = nn.Parameter(torch.empty(middle, width))
        self.down_bias = nn.Parameter(torch.empty(middle))
        self.conv = nn.Parameter(torch.empty(middle, middle, 3, 3))
        self.conv_bias = nn.Parameter(torch.empty(middle))
        self.up = nn.Parameter(torch.empty(width, middle))
        self.up_bias = nn.Parameter(torch.empty(width))

    def reset(self, generator: Generator) -> None:
        """Initialise matrices Xavier-uniform, the last one at zero, and the kernel as configured (public code)."""
        nn.init.xavier_uniform_(self.down, generator=generator)
        if self.start == "xavier":
            nn.init.xavier_uniform_(self.conv, generator=generator)
        else:
            self.conv.zero_()
            self.conv[:, :, 1, 1] = torch.eye(self.conv.shape[0])
        start_above_zero(self.up, self.bits, generator)
        for bias in (self.down_bias, self.conv_bias, self.up_bias):
            bias.zero_()

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term from normalised tokens (B, N, D), or from a map (B, H, W, D)."""
        hidden = quick_gelu(linear(x, self.matrix("down"), self.down_bias))
        hidden = quick_gelu(self._map(hidden) if hidden.ndim == 4 else self._tokens(hidden, grid, prefix))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return self.scale * linear(hidden, self.matrix("up"), self.up_bias)

    def _map(self, hidden: Tensor) -> Tensor:
        kernel = self._kernel().to(hidden.dtype)
        return F.conv2d(hidden.permute(0, 3, 1, 2), kernel, self.conv_bias.to(hidden.dtype), padding=1).permute(
            0, 2, 3, 1
        )

    def _kernel(self) -> Tensor:
        return self.matrix("conv") if "conv" in self.matrices else self.conv

    def _tokens(self, hidden: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        assert grid is not None, "the model's own forward hands the grid to blocks that want it"
        patches = self._map(hidden[:, prefix:].unflatten(1, grid)).flatten(1, 2)
        if not prefix:
            return patches
        alone = linear(hidden[:, :prefix], self._kernel()[:, :, 1, 1], self.conv_bias)
        return torch.cat([alone, patches], dim=1)


@register
@dataclass(frozen=True, kw_only=True)
class Convpass(FewBits, DropPath, Method):
    """A convolutional bypass parallel to attention and to MLP, each reading the normalised input of its branch.

    The term has its own stochastic depth, as in the public code; the paper uses ``drop_path=0.1``. On Swin the
    token grid is the whole map, not a window. With fewer than 32 bits, an identity kernel still keeps 32.
    """

    bottleneck: int = 8
    """Hidden channels (paper)."""
    scale: float = 1.0
    """Multiplier of the term; tuned per task in the paper, from 0.01 to 100."""
    variant: Literal["block", "attn"] = "block"
    """Parallel to both branches (``block``), or to attention only (``attn``; ``convpass_attn`` in the public code)."""
    start: Literal["xavier", "identity"] = "xavier"
    """Initialisation of the kernel; chosen per task in the paper."""
    dropout: float = 0.1
    """Fraction of the hidden channels dropped during training (public code)."""

    name: ClassVar[str] = "convpass"
    paper: ClassVar[str] = "https://arxiv.org/abs/2207.07039"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(bottleneck=8), FGVC.sized(bottleneck=8))
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "bottleneck")
        check_factor(self, "scale")
        check_share(self, "dropout")
        check_roles_in(self, ("attn", "mlp"))

    def paper_roles(self) -> tuple[str, ...]:
        """Return the variant's roles."""
        return self.default_roles if self.variant == "block" else self.default_roles[:1]

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one bypass parallel to each branch."""
        view.needs_norm_first(type(self).__name__)
        sites = self.sites(view)
        for branch, block in zip(sites, view.blocks_of(sites), strict=True):
            options = (branch.role, self.scale, self.dropout, self.start, self.bits)
            build = partial(ConvpassUnit, block.out_features, self.bottleneck, *options)
            yield PlanItem(block, f"convpass_{branch.role}", build)

    def parameter_count(self, view: View) -> int:
        """Count ``2 h D + h + 9 h^2 + h + D`` per branch."""
        h = self.bottleneck
        return sum(2 * h * site.out_features + 2 * h + 9 * h * h + site.out_features for site in self.sites(view))
