"""MMRL and MMRL++: representation tokens in the upper blocks of a CLIP's visual tower, with a read-out of their own.

Papers: arXiv 2503.08497 (MMRL) and 2505.10088 (MMRL++). Formulas, defaults and start values follow the public code,
yunncheng/MMRL at 27d8821. The text tower's part is left out: the embeddings of the classes are fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import check_whole
from vispeft.core.method import Method, PlanItem, Step, register
from vispeft.core.model_units import StreamUnit
from vispeft.core.recipes import Recipe
from vispeft.core.sites import View
from vispeft.core.streams import Stream, StreamRule
from vispeft.errors import ConfigError, SiteError
from vispeft.hosts.functional import linear
from vispeft.methods.dyt import are_classes
from vispeft.storage.class_embeddings import ClassEmbeddings, check_order

__all__ = ["MMRL", "RepresentationTokens", "mmrl_head"]

SPREAD = 0.02
"""Standard deviation of the start of the representation tokens (public code)."""
BETA = {"mmrl": 1.0, "mmrl++": 0.9}
"""Default share of a block's own tokens; MMRL replaces the tokens of the block before."""


class RepresentationTokens(StreamUnit):
    """Tokens that enter the upper blocks beside class token and patches, and the features read from the last block.

    All blocks share the tokens R (K, d_r), which each maps to its width: by a linear layer of its own (MMRL), or by
    ``W + A_l B_l`` with a shared W (MMRL++).
    """

    identity_at_start = False
    projection: Tensor | None
    """P, (E, D): from the backbone's feature to the joint space; None for the identity. It does not train."""

    def __init__(self, method: MMRL, blocks: range, width: int, norms: Sequence[nn.Module]) -> None:
        """Allocate the tensors.

        Args:
            method: The configuration.
            blocks: The blocks with tokens, up to the last one.
            width: Their width D.
            norms: What normalises the class token behind the last block; it stays the backbone's.
        """
        super().__init__()
        self.method, self.blocks = method, blocks
        self._norms = tuple(norms)  # in a tuple, or PyTorch would register them as children here
        upper, joint, low = len(blocks), method.joint or width, method.variant == "mmrl++"
        shapes = {"tokens": (method.num_tokens, method.token_dim), "bias": (upper, width)}
        if low:
            shapes |= {"weight": (width, method.token_dim)}
            shapes |= {"A": (upper, width, method.rank), "B": (upper, method.rank, method.token_dim)}
            shapes |= {"read_A": (width, method.read_rank), "read_B": (method.read_rank, joint)}
        else:
            shapes |= {"weight": (upper, width, method.token_dim), "read": (width, joint)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.register_buffer("projection", None if method.joint is None else torch.empty(joint, width))

    def reset(self, generator: Generator) -> None:
        """Draw tokens and matrices, and take P from the class embeddings."""
        bound = self.method.token_dim**-0.5  # PyTorch's linear layer; all blocks start from one layer
        self.tokens.normal_(0, SPREAD, generator=generator)
        first = torch.empty_like(self.weight[0] if self.weight.ndim == 3 else self.weight)
        self.weight.copy_(first.uniform_(-bound, bound, generator=generator).expand_as(self.weight))
        self.bias.copy_(
            torch.empty_like(self.bias[0]).uniform_(-bound, bound, generator=generator).expand_as(self.bias)
        )
        if self.method.variant == "mmrl":
            self.read.normal_(0, self.read.shape[0] ** -0.5, generator=generator)
        else:
            for name in ("A", "read_A"):  # Kaiming-uniform with a = sqrt 5
                factor = self.get_parameter(name)
                factor.uniform_(-(factor.shape[-1] ** -0.5), factor.shape[-1] ** -0.5, generator=generator)
            self.B.zero_()
            self.read_B.zero_()
        if self.projection is not None:
            self.projection.copy_(self.method.embeddings.projection)

    def sliced(self, name: str, tensor: Tensor) -> Tensor:
        """Drop what belongs to blocks that a truncated model lacks."""
        by_block = name in ("A", "B", "bias") or (name == "weight" and tensor.ndim == 3)
        return tensor[: self.get_parameter(name).shape[0]] if by_block else tensor

    def streams(self) -> Sequence[Stream]:
        """Pass the tokens through the upper blocks."""
        return (_Rows(self),)

    def tokens_of(self, block: int) -> Tensor:
        """Return the tokens of one of the upper blocks, (K, D)."""
        index = block - self.blocks.start
        weight = self.weight[index] if self.weight.ndim == 3 else self.weight + self.A[index] @ self.B[index]
        return linear(self.tokens, weight, self.bias[index])

    def both(self, pooled: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Compute class feature and representation feature, (B, E) each, of any length.

        Args:
            pooled: The normalised class token, (B, D).
            rows: The representation tokens behind the last block, (B, K, D).
        """
        for norm in self._norms:
            rows = norm(rows)
        mean = rows.mean(dim=1)
        projection = None if self.projection is None else self.projection.to(pooled.dtype)
        base = mean if projection is None else F.linear(mean, projection)
        if self.method.variant == "mmrl":
            read = mean @ self.read.to(mean.dtype)
        else:
            read = base + mean @ self.read_A.to(mean.dtype) @ self.read_B.to(mean.dtype)
        return pooled if projection is None else F.linear(pooled, projection), read


class _Rows(Stream):
    """The stream of the tokens: keys, values and queries like all tokens of the sequence."""

    name = "mmrl"

    def __init__(self, unit: RepresentationTokens) -> None:
        self.unit = unit
        self.shapes = ((unit.method.num_tokens, unit.bias.shape[1]),)

    def enter(self, block: int, present: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Return the block's tokens, mixed with what the block before made of its own."""
        if block not in self.unit.blocks:
            return None
        own = self.unit.tokens_of(block).expand(tokens.shape[0], -1, -1)
        share = self.unit.method.share
        return own if present is None else share * own + (1 - share) * present

    def rule(self, block: int) -> StreamRule:
        """Let tokens and rows attend to each other."""
        return StreamRule(seen=True, reads=True)

    def keeps(self, block: int) -> bool:
        """Keep the rows of the last block."""
        return block == self.unit.blocks[-1]

    def features(self, pooled: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Put class feature and representation feature side by side; in a joint space each has norm one."""
        pair = self.unit.both(pooled, kept[0].to(pooled.dtype))
        return torch.cat(pair if self.unit.projection is None else [F.normalize(one, dim=-1) for one in pair], dim=1)


@register
@dataclass(frozen=True, kw_only=True)
class MMRL(Method):
    """Representation tokens in the upper blocks of a CLIP's visual tower, and a second read-out from them.

    Class token and tokens each give a feature in the joint space, and the scores are ``alpha`` times those of the class
    feature plus ``1 - alpha`` times those of the tokens' feature, against fixed class embeddings (``classes``). Classes
    without training images are scored by the class feature alone (`mmrl_head`). The loss is the paper's: a
    cross-entropy for each of the two scores, in place of the task's, and the distance of the class feature from that
    of the frozen tower. The paper also puts tokens into the text tower, which this project does not run: its counts and
    results are not those of this visual part. Without ``classes`` (form of this project) the features are the
    backbone's own, and a linear classifier on both trains. It does not start at the identity.
    """

    classes: str | None = None
    """File of class embeddings (`vispeft.storage.class_embeddings`), in the order of the data's classes; the classifier
    is made of it and does not train."""
    variant: Literal["mmrl", "mmrl++"] = "mmrl++"
    """``mmrl``: a linear layer per block and a full matrix for the read-out. ``mmrl++``: a shared layer with a low-rank
    term per block, and a low-rank term on the projection."""
    num_tokens: int = 5
    """Number of representation tokens."""
    token_dim: int = 512
    """Width of the shared tokens."""
    first_block: int | None = None
    """Index of the first block with tokens, from 0. None takes that of the paper, 5 of 12 blocks, and as large a share
    of another number of blocks."""
    rank: int = 4
    """Rank of each block's term (MMRL++)."""
    read_rank: int = 64
    """Rank of the term on the projection (MMRL++)."""
    beta: float | None = None
    """Share of a block's own tokens where they replace those of the block before; the rest is what that block made of
    its own. None is 0.9 for MMRL++ and 1 for MMRL; 0.1 to 0.9 by data set in the paper."""
    alpha: float = 0.7
    """Share of the class feature in scores and loss."""
    reg_weight: float = 1.0
    """Weight of ``1 - cos`` between the class feature and that of the frozen tower; 0.01 to 7 by data set."""
    joint: int | None = None
    """Width of the joint space; read from ``classes``, and given alone only in files of adapters."""

    name: ClassVar[str] = "mmrl"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.10088"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=2e-3,
            weight_decay=5e-4,
            source="16 images per class: AdamW, batch 32, 100 epochs, 1 epoch of warm-up; 1e-3 and 50 epochs for MMRL "
            "(yunncheng/MMRL 27d8821; weight decay is the default of its trainer, Dassl)",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("tokens",)
    reads_result: ClassVar[bool] = True
    training_fields: ClassVar[frozenset[str]] = frozenset({"classes", "reg_weight"})

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "num_tokens", "token_dim", "rank", "read_rank", "joint")
        if self.roles not in (None, ("tokens",)) or self.blocks is not None:
            raise ConfigError("MMRL puts tokens into all blocks from first_block on; leave roles and blocks out.")
        if not (0 <= self.share <= 1 and 0 < self.alpha < 1 and 0 <= self.reg_weight < float("inf")):
            raise ConfigError(
                f"MMRL(beta={self.beta}, alpha={self.alpha}, reg_weight={self.reg_weight}): beta from 0 to 1, alpha "
                "between 0 and 1, and a finite weight from 0 are needed."
            )
        if self.first_block is not None and self.first_block < 0:
            raise ConfigError(f"MMRL(first_block={self.first_block}): an index from 0 is needed.")
        if self.classes is not None:
            found = self.embeddings.projection.shape[0]
            if self.joint not in (None, found):
                raise ConfigError(f"MMRL(joint={self.joint}): the embeddings of {self.classes!r} have {found} numbers.")
            object.__setattr__(self, "joint", found)

    @property
    def share(self) -> float:
        """The share of a block's own tokens."""
        return BETA[self.variant] if self.beta is None else self.beta

    @cached_property
    def embeddings(self) -> ClassEmbeddings:
        """The class embeddings.

        Raises:
            ConfigError: If there are none.
        """
        if self.classes is None:
            raise ConfigError(
                f"MMRL(joint={self.joint}) has no class embeddings, which a new adapter in a joint space starts from. "
                "Give classes=FILE (vispeft encode-classes writes one), or leave joint out."
            )
        return ClassEmbeddings.load(self.classes)

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit with all tokens at the model's tokens."""
        if view.head_path is None:
            raise SiteError(
                "MMRL makes the input of a classifier, and a model wrapped for its features has none. Attach it to the "
                "whole model, or take VPT."
            )
        if view.layout != "NLC" or view.global_pool != "token":
            raise SiteError(
                f"MMRL reads the class token, and this {view.family} pools otherwise (global_pool="
                f"{view.global_pool!r}): there is no stated form. Take a ViT with a class token, such as a CLIP."
            )
        blocks = self.upper(view)
        if not blocks:
            raise SiteError(
                f"MMRL(first_block={self.first_block}): this model has {view.depth} blocks, counted from 0."
            )
        if self.classes is not None and self.embeddings.projection.shape[1] != view.widths[0]:
            raise ConfigError(
                f"MMRL(classes={self.classes!r}): the embeddings are for {self.embeddings.projection.shape[1]} "
                f"features, and the model has {view.widths[0]}. Make them with the text tower of the same CLIP."
            )
        timm_model: Any = model
        norms = (timm_model.norm, timm_model.fc_norm)
        for site in self.sites(view):
            yield PlanItem(site, "mmrl", partial(RepresentationTokens, self, blocks, view.widths[0], norms))

    def upper(self, view: View) -> range:
        """Return the blocks with tokens."""
        first = 5 * view.depth // 12 if self.first_block is None else self.first_block
        return range(first, view.depth)

    def check_classes(self, names: Sequence[str]) -> None:
        """Refuse class embeddings in another order than the data's classes."""
        if self.classes is not None:
            check_order(self.embeddings, names, f"MMRL(classes={self.classes!r})")

    def parameter_count(self, view: View) -> int:
        """Count ``K d_r + D d_r + n (D r + r d_r + D) + r' (D + E)`` for n blocks with tokens (MMRL++).

        MMRL: ``K d_r + n (D d_r + D) + D E``.
        """
        n, width, dim, joint = len(self.upper(view)), view.widths[0], self.token_dim, self.joint
        joint = joint or width
        if self.variant == "mmrl":
            return self.num_tokens * dim + n * (width * dim + width) + width * joint
        blocks = n * (self.rank * (width + dim) + width)
        return self.num_tokens * dim + width * dim + blocks + self.read_rank * (width + joint)

    def head_width(self, view: View) -> int:
        """Count the numbers of both features."""
        return 2 * (self.joint or view.widths[0])

    def start_head(self, head: nn.Linear, generator: Generator) -> None:
        """Make the classifier of the class embeddings, which does not train; without them, draw it."""
        if self.joint is None or self.classes is None:
            super().start_head(head, generator)
        else:
            weight = _weight(self.embeddings, self.alpha, seen=True)
            if len(weight) != head.out_features:
                raise ConfigError(
                    f"MMRL(classes={self.classes!r}) has {len(weight)} classes, and the classifier {head.out_features}."
                    " Give class embeddings of the data's classes."
                )
            head.weight.copy_(weight)
            head.bias.zero_()

    def trains_head(self) -> bool:
        """Return whether the classifier is a linear one, and not the class embeddings."""
        return self.joint is None

    def file_method(self) -> Method:
        """Return the method without its file of class embeddings, whose content is in the adapter's tensors."""
        return dataclasses.replace(self, classes=None)

    def without_start(self) -> Method:
        """Return the same with a classifier that is drawn."""
        return dataclasses.replace(self, classes=None, joint=None)

    def loss_term(self, bank: Any, name: str, step: Step) -> Tensor:
        """Return what makes the task's cross-entropy the loss of the paper.

        ``alpha CE(class scores) + (1 - alpha) CE(scores of the tokens) + reg_weight (1 - mean cos) - CE(scores)``: the
        last one is the task's, without smoothing of labels.
        """
        images, labels = step.batch[0], step.batch[-1]
        if not are_classes(labels, step.output):
            raise ConfigError(
                "MMRL's loss has cross-entropies, and the targets are neither class numbers nor shares of classes that "
                "sum to 1. Take VPT for other tasks."
            )
        model = bank.model
        features = model.forward_head(model.features(step.result), pre_logits=True)
        own, rep = features.chunk(2, dim=1)
        # The classifier has alpha and 1 - alpha in its two halves.
        head, none = model.get_classifier(), torch.zeros_like(own)
        by_class = head(torch.cat([own / self.alpha, none], dim=1)).to(step.output.dtype)
        by_rep = head(torch.cat([none, rep / (1 - self.alpha)], dim=1)).to(step.output.dtype)
        loss = self.alpha * F.cross_entropy(by_class, labels) + (1 - self.alpha) * F.cross_entropy(by_rep, labels)
        if self.reg_weight:
            frozen = _frozen_feature(bank, name, images.to(own.dtype))
            loss = loss + self.reg_weight * (1 - F.cosine_similarity(own, frozen, dim=1).mean())
        return loss - F.cross_entropy(step.output, labels)


@torch.no_grad()
def _frozen_feature(bank: Any, name: str, images: Tensor) -> Tensor:
    """Compute the class feature of the tower without adapters, (B, E)."""
    with bank.disabled():
        pooled: Tensor = bank.model.forward_head(bank.model.forward_features(images), pre_logits=True)
    projection = next(unit.projection for unit in bank.units(name).values() if isinstance(unit, RepresentationTokens))
    return pooled if projection is None else F.linear(pooled, projection.to(pooled.dtype))


def mmrl_head(classes: ClassEmbeddings, alpha: float = 0.7, seen: bool = True) -> nn.Linear:
    """Make the classifier of an MMRL adapter for other classes, to be given to ``bank.put_head``.

    Args:
        classes: Their embeddings, of the same CLIP.
        alpha: Share of the class feature, as in the adapter's configuration.
        seen: Whether the adapter was trained on these classes; if not, only the class feature scores them (paper).

    Returns:
        A linear layer from both features to scores.
    """
    weight = _weight(classes, alpha, seen)
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    return head


def _weight(classes: ClassEmbeddings, alpha: float, seen: bool) -> Tensor:
    """Return (classes, 2 E): the scaled embeddings for each of both features, with its share."""
    shares = (alpha, 1 - alpha) if seen else (1.0, 0.0)
    return torch.cat([classes.scale * share * classes.embeddings for share in shares], dim=1)
