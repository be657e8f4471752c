"""VPTSP: semantic proxies from visual prompts, for metric learning (Ren et al., ICLR 2024, arXiv 2402.02340).

Formulas, defaults and start values follow the public code, Noahsark/ParameterEfficient-DML at c7c9416.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from vispeft.core.fields import check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import View
from vispeft.errors import ConfigError, SiteError
from vispeft.methods.bitfit import BitFit
from vispeft.proxies.class_prompts import SteppedTokens
from vispeft.proxies.losses import Pull
from vispeft.proxies.semantic import ProxySettings, SemanticProxies

__all__ = ["VPTSP", "SteppedPrompts"]

CUB = Recipe(
    lr=5e-3,
    weight_decay=1e-6,
    source="CUB-200-2011, ViT-S/16: SGD with momentum 0.9, batches of 64 images, 2 of each of 32 classes, proxies at "
    "0.1 (Noahsark/ParameterEfficient-DML c7c9416)",
)


class SteppedPrompts(SteppedTokens):
    """Prompts of the first blocks, whose number may fall from block to block.

    They start normal with standard deviation ``sqrt(2 / (D (n + 1)))``: Xavier's rule on the tensor (1, n, D) of a
    block (public code).
    """

    def __init__(self, counts: tuple[int, ...], length: int, width: int) -> None:
        """Allocate the prompts.

        Args:
            counts: Prompts that each block uses.
            length: Prompts that each block has.
            width: Width of the tokens.
        """
        super().__init__(counts, length)
        self.prompts = nn.Parameter(torch.empty(len(counts), length, width))

    def reset(self, generator: Generator) -> None:
        """Draw the prompts."""
        _, length, width = self.prompts.shape
        self.prompts.normal_(0, math.sqrt(2 / (width * (length + 1))), generator=generator)

    def own(self, block: int) -> Tensor:
        """Return the prompts that a block has, (1, length, width)."""
        return self.prompts[block : block + 1]


@register
@dataclass(frozen=True, kw_only=True)
class VPTSP(Method):
    """Prompts and biases for embeddings, trained against proxies that prompts of the classes make.

    The adapter is deep visual prompts, whose number may fall from block to block, and the biases of the backbone
    (switched on in every published configuration). Training adds `vispeft.proxies.semantic.SemanticProxies`: the images
    pass the backbone a second time with prompts of their class, and the result becomes the proxy of the class.
    Deployment has none of it. ``integrator="momentum"`` is VPTSP-M, the others are VPTSP-G. It needs a ViT that pools
    its class token.
    """

    num_tokens: int = 10
    """Prompts of a block that all images share; 10 to 90 in the public recipes."""
    depth: int | None = None
    """Blocks with such prompts, from the first on; None for all."""
    step: int = 0
    """Number of prompts by which each block has fewer than the one before."""
    train_biases: bool = True
    """Train the biases of the backbone too, as every public recipe does."""
    class_tokens: int = 3
    """Prompts of each class in a block; 3 to 80 in the public recipes. 0 for none."""
    class_depth: int | None = None
    """Blocks with class prompts, from the first on; None for all."""
    class_step: int = 0
    """Number of class prompts by which each block has fewer than the one before."""
    integrator: Literal["gru_relu", "gru", "momentum"] = "gru_relu"
    """How vectors change the state of their class: a gated recurrent unit with a ReLU, as released, or with a tanh, or
    a moving average."""
    keep: float = 0.8
    """Share of the state that the moving average keeps."""
    state_dropout: float = 0.0
    """Dropout behind the recurrent unit; 0.1 for SOP and In-Shop with ViT-S."""
    learned_share: float = 0.5
    """Share of the learned proxies; the rest comes from the class prompts. 0.1 to 0.7 in the public recipes."""
    loss: Literal["anchor", "nca"] = "anchor"
    """Whether each proxy is an anchor over samples, or each sample over proxies."""
    against: Literal["all", "batch"] = "all"
    """Whether the loss has the proxies of all classes (``both_all`` in the public code) or of those in the batch
    (``in_batch``)."""
    alpha: float = 32.0
    """Scale of the similarities."""
    margin: float = 0.1
    """Margin of the similarities."""
    pull: Pull = "all"
    """Divisor of the positive term: all classes, as released, or those present, as in Proxy-Anchor."""
    bank: bool = False
    """Keep class prompts and their optimiser state in host memory, for very many classes."""

    name: ClassVar[str] = "vptsp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.02340"
    recipes: ClassVar[tuple[Recipe, ...]] = (CUB,)
    default_roles: ClassVar[tuple[str, ...]] = ("tokens",)
    training_fields: ClassVar[frozenset[str]] = frozenset(
        {
            *("class_tokens", "class_depth", "class_step", "integrator", "keep", "state_dropout", "learned_share"),
            *("loss", "against", "alpha", "margin", "pull", "bank"),
        }
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "num_tokens", "depth", "class_depth")
        check_share(self, "keep", "state_dropout")
        for field in ("step", "class_tokens", "class_step"):
            if not isinstance(value := getattr(self, field), int) or value < 0:
                raise ConfigError(f"VPTSP({field}={value}): a whole number from 0 on is needed.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"VPTSP(alpha={self.alpha}): a finite number above 0 is needed.")
        if not math.isfinite(self.margin):
            raise ConfigError(f"VPTSP(margin={self.margin}): a finite number is needed.")
        if not 0 <= self.learned_share <= 1:
            raise ConfigError(f"VPTSP(learned_share={self.learned_share}): a share from 0 to 1 is needed.")
        if self.roles not in (None, ("tokens",)) or self.blocks is not None:
            raise ConfigError("VPTSP inserts tokens in front of the first blocks; give depth, not roles and blocks.")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit with all prompts at the model's tokens, and select the biases."""
        if view.layout != "NLC" or view.global_pool != "token":
            raise SiteError(
                f"VPTSP reads the class token, and this {view.family} pools {view.global_pool or 'nothing'}. Use a ViT "
                "that pools its class token, or another method."
            )
        counts = _counts(self.num_tokens, self.depth, self.step, view.depth)
        _counts(self.class_tokens, self.class_depth, self.class_step, view.depth)
        for site in self.sites(view):
            yield PlanItem(site, "vptsp", partial(SteppedPrompts, counts, self.num_tokens, view.widths[0]))
        if self.train_biases:
            yield from BitFit().items(view, model)

    def parameter_count(self, view: View) -> int:
        """Count the prompts and the biases: ``depth * num_tokens * D`` and all biases."""
        blocks = view.depth if self.depth is None else self.depth
        biases = BitFit().parameter_count(view) if self.train_biases else 0
        return blocks * self.num_tokens * view.widths[0] + biases

    def criterion(self, model: nn.Module, head: nn.Module, classes: int, dim: int) -> SemanticProxies:
        """Make the part that training needs besides the adapter.

        Args:
            model: The adapted backbone.
            head: A new head like that of the embeddings, from (B, D) to (B, d).
            classes: Number of training classes.
            dim: Width of the embeddings d.
        """
        depth = len(model.blocks)  # type: ignore[arg-type]  # timm's
        counts = _counts(self.class_tokens, self.class_depth, self.class_step, depth) if self.class_tokens else ()
        settings = ProxySettings(
            counts=counts,
            length=self.class_tokens,
            integrator=self.integrator,
            keep=self.keep,
            dropout=self.state_dropout,
            learned=self.learned_share,
            kind=self.loss,
            against=self.against,
            alpha=self.alpha,
            margin=self.margin,
            pull=self.pull,
            bank=self.bank,
        )
        return SemanticProxies(model, head, classes, dim, settings)


def _counts(length: int, blocks: int | None, step: int, depth: int) -> tuple[int, ...]:
    """Return the number of prompts of each of the first blocks."""
    if blocks is not None and blocks > depth:
        raise SiteError(f"VPTSP was asked for prompts in {blocks} blocks, and the model has {depth}.")
    return tuple(max(length - step * block, 0) for block in range(depth if blocks is None else blocks))
