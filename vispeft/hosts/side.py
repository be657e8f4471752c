"""The host of a model beside which a network may stand, reading what leaves the blocks.

The backbone runs first and hands out what leaves its blocks; the network then runs on that alone. Nothing else passes
between the two, so what leaves the blocks can be kept on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vispeft.core.units import SideUnit
from vispeft.hosts.model import ModelHost

__all__ = ["ENTRY", "Rung", "SideHost"]

ENTRY = -1
"""Number under which what enters the first block stands beside the outputs of the blocks."""


@dataclass(frozen=True)
class Rung:
    """The size of a network beside one block of a backbone."""

    block: int
    """Index of the block."""
    stage: int
    """Its stage."""
    wide: int
    """Width of the backbone there."""
    width: int
    """Width of the network."""
    heads: int
    """Its attention heads."""
    hidden: int
    """Width inside its MLP."""


class SideHost(ModelHost):
    """An adapted model beside which a network may stand."""

    takes_side: ClassVar[bool] = False
    """Whether there is a form of such a network for the family; `side_block` makes its blocks then."""

    def hidden(self, images: Tensor, blocks: frozenset[int], depth: int) -> dict[int, Tensor]:
        """Run the backbone.

        Args:
            images: (B, C, H, W).
            blocks: The blocks whose outputs are wanted.
            depth: Number of blocks to run.

        Returns:
            What leaves each of these blocks, and under `ENTRY` what enters the first one: tokens (B, N, D) without
            inserted ones, or maps (B, H, W, D).
        """
        raise NotImplementedError

    def checkpoints(self) -> bool:
        """Tell whether blocks are to be computed again in the backward pass."""
        raise NotImplementedError

    @staticmethod
    def side_block(block: Any, rung: Rung) -> nn.Module:
        """Make a block of the family at another size.

        Args:
            block: The backbone's block beside which it will stand.
            rung: Its size.

        Returns:
            The block: norm first, biases everywhere, GELU, no layer scale, nothing dropped.
        """
        # Half a channel more, since timm rounds the width inside the MLP down.
        ratio = (rung.hidden + 0.5) / rung.width
        norm: Any = partial(LayerNorm, eps=1e-6)
        return Block(rung.width, rung.heads, ratio, qkv_bias=True, norm_layer=norm)

    def side(self) -> SideUnit | None:
        """Look up the active network beside the backbone, if any."""
        return next(self.units(SideUnit), None)

    def read_hidden(self, unit: SideUnit, images: Tensor, extra: frozenset[int], depth: int) -> dict[int, Tensor]:
        """Run the backbone for a network, without gradients unless the network asks for them.

        Args:
            unit: The network.
            images: (B, C, H, W).
            extra: Blocks whose outputs are wanted besides those it reads.
            depth: Number of blocks to run.

        Returns:
            What `hidden` gives.
        """
        self.check_size(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not unit.detach_hidden):
            return self.hidden(images, unit.reads | extra, depth)

    def features_beside(self, unit: SideUnit, hidden: Mapping[int, Tensor], depth: int) -> Tensor:
        """Run a network on what the backbone gave.

        Args:
            unit: The network.
            hidden: What `read_hidden` gave.
            depth: Number of blocks that were run.

        Returns:
            What leaves the network, in the place and the type of what leaves the backbone.
        """
        states = unit.climb(hidden, depth, self.checkpoints())
        return unit.leave(states[-1]).to(hidden[ENTRY].dtype)
