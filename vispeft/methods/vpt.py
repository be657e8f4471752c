"""VPT: visual prompt tuning, shallow and deep (Jia et al., ECCV 2022, arXiv 2203.12119)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.model_units import TokensUnit
from vispeft.core.recipes import Recipe
from vispeft.core.sites import View
from vispeft.errors import ConfigError, SiteError

__all__ = ["VPT", "Prompts", "StagePrompts"]


class Prompts(TokensUnit):
    """Prompts after the prefix tokens, without a position; the deep form replaces them before every block.

    All are drawn uniformly from ``(-v, v)``, ``v = sqrt(6 / (channels * patch height * patch width + stored width))``.
    """

    def __init__(self, shape: tuple[int, int], depth: int, width: int, fan: int, dropout: float, pool: str) -> None:
        """Allocate the prompts.

        Args:
            shape: Number of prompts and their stored width.
            depth: Number of blocks with their own prompts; 1 in the shallow form.
            width: Width of the model's tokens; if it differs from the stored width, one shared linear layer maps.
            fan: Numbers per patch (channels * height * width), for the initial values.
            dropout: Fraction of prompt entries dropped during training, drawn separately for each image.
            pool: Tokens that average pooling sees; see `VPT.pool`.
        """
        super().__init__()
        self.length, stored = shape
        self.fan, self.dropout, self.pool = fan, dropout, pool
        self.prompts = nn.Parameter(torch.empty(1, self.length, stored))
        self.deep = nn.Parameter(torch.empty(depth - 1, self.length, stored)) if depth > 1 else None
        self.proj = nn.Linear(stored, width) if stored != width else None

    def reset(self, generator: Generator) -> None:
        """Draw the initial values of all tensors."""
        bound = math.sqrt(6 / (self.fan + self.prompts.shape[-1]))
        for name, tensor in self.named_parameters():
            if not name.startswith("proj."):
                tensor.uniform_(-bound, bound, generator=generator)
        if self.proj is not None:
            # Kaiming-normal in fan-out mode, and PyTorch's default for the bias, as in the public code.
            out, width = self.proj.weight.shape
            self.proj.weight.normal_(0, math.sqrt(2 / out), generator=generator)
            self.proj.bias.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)

    def tokens(self, block: int, batch: int) -> Tensor | None:
        """Return the prompts of a block, (batch, length, width), or None if it keeps those of the block before."""
        stored = self.prompts if block == 0 else self.own(block)
        if stored is None:
            return None
        mapped = stored if self.proj is None else self.proj(stored)
        return F.dropout(mapped.expand(batch, -1, -1), self.dropout, self.training)

    def replaces(self, block: int) -> bool:
        """Whether a block has its own prompts."""
        return block == 0 or self.deep is not None

    def sliced(self, name: str, tensor: Tensor) -> Tensor:
        """Drop the prompts of blocks that a truncated model lacks."""
        return tensor if name != "deep" or self.deep is None else tensor[: self.deep.shape[0]]

    def own(self, block: int) -> Tensor | None:
        """Return the stored prompts of a block after the first, (1, length, stored width); None in the shallow form."""
        return None if self.deep is None else self.deep[block - 1 : block]


class StagePrompts(Prompts):
    """Prompts in every window of a hierarchical model; deep prompts have the width of their stage.

    All are drawn from the range given by the first stage's width (public code).
    """

    passes_rows = True

    def __init__(
        self,
        shape: tuple[int, int],
        stages: tuple[tuple[int, int], ...],
        width: int,
        fan: int,
        dropout: float,
        pool: str,
    ) -> None:
        """Allocate the prompts.

        Args:
            shape: Number of prompts and their stored width.
            stages: Number of blocks and width of each stage; empty for the shallow form.
            width: Width of the first stage.
            fan: Numbers per patch (channels * height * width), for the initial values.
            dropout: Fraction of prompt entries dropped during training, drawn separately for each image.
            pool: Tokens that average pooling sees; see `VPT.pool`.
        """
        super().__init__(shape, 1, width, fan, dropout, pool)
        self.ends = tuple(accumulate(depth for depth, _ in stages))
        for stage, (depth, wide) in enumerate(stages):
            number = depth - 1 if stage == 0 else depth  # the shallow form already has those of the first block
            if number:
                deep = nn.Parameter(torch.empty(number, self.length, wide))
                self.register_parameter(f"deep_{stage}", deep)

    def own(self, block: int) -> Tensor | None:
        """Return the stored prompts of a block after the first, (1, length, width of its stage)."""
        stage = next((stage for stage, end in enumerate(self.ends) if block < end), None)
        if stage is None:
            return None
        first = 1 if stage == 0 else self.ends[stage - 1]
        return getattr(self, f"deep_{stage}")[block - first : block - first + 1]


@register
@dataclass(frozen=True, kw_only=True)
class VPT(Method):
    """Learned prompt tokens in the input of the blocks; the backbone is unchanged.

    On a ViT and on Eva the prompts come after class and register tokens and before the patches. They have no position:
    on Eva the rotation skips them. They are queries, keys and values like any token, and never appear in maps
    (``forward_intermediates``). On Swin they are part of every window, attend to its tokens and are attended to,
    without a position; their outputs are averaged over the windows of the image. There the public code of the shallow
    form mixes the images of a batch; here each image is computed independently.
    """

    num_tokens: int = 10
    """Number of prompts; the paper searches 1 to 200."""
    deep: bool = True
    """Whether every block has its own prompts."""
    project: int | None = None
    """Store prompts at this width and project them by one shared linear layer; None to store them at full width."""
    dropout: float = 0.0
    """Fraction of prompt entries dropped during training; the public deep recipes use 0.1."""
    pool: Literal["all", "patches", "prompts"] = "all"
    """Tokens that average pooling sees: ``all`` (prompts and patches, as in the public code), ``patches``,
    ``prompts``."""

    name: ClassVar[str] = "vpt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2203.12119"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=5e-3,
            weight_decay=1e-4,
            fields={"num_tokens": 16},
            source="V-PETL's runs with AdamW: 7e-4 to 6e-2 by data set (c188fad); the paper's are SGD, 0.025 to 25",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("tokens",)

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "num_tokens", "project")
        check_share(self, "dropout")
        if self.roles not in (None, ("tokens",)) or self.blocks is not None:
            raise ConfigError("VPT inserts tokens in front of the blocks; leave roles and blocks out.")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit with all prompts at the model's tokens."""
        if self.pool != "all" and view.global_pool == "token":
            raise SiteError(
                f"VPT(pool={self.pool!r}) chooses what average pooling sees, but this model pools its class token. "
                "Leave it at 'all'."
            )
        shape, width = (self.num_tokens, self._stored(view)), view.widths[0]
        fan = view.in_chans * view.patch_size[0] * view.patch_size[1]
        rest = (width, fan, self.dropout, self.pool)
        if view.layout == "NHWC":
            self._check_windows(view)
            stages = tuple((len(blocks), view.widths[blocks[0]]) for blocks in view.stages) if self.deep else ()
            build: Callable[[], Prompts] = partial(StagePrompts, shape, stages, *rest)
        else:
            build = partial(Prompts, shape, view.depth if self.deep else 1, *rest)
        for site in self.sites(view):
            yield PlanItem(site, "vpt", build)

    def _check_windows(self, view: View) -> None:
        view.needs_norm_first("VPT")
        if self.deep and self.project is not None:
            raise SiteError(
                f"VPT(deep=True, project={self.project}) maps all prompts by one shared layer, but the blocks of this "
                f"{view.family} have several widths. Use deep=False, or leave project out."
            )

    def _stored(self, view: View) -> int:
        return view.widths[0] if self.project is None else self.project

    def parameter_count(self, view: View) -> int:
        """Count ``T D`` (shallow) or T times the sum of widths (deep), as stored, plus the shared projection."""
        width, stored = view.widths[0], self._stored(view)
        widths = view.widths if self.project is None else (stored,) * view.depth
        prompts = self.num_tokens * (sum(widths) if self.deep else stored)
        return prompts + (0 if stored == width else stored * width + width)
