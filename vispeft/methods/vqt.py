"""VQT: visual query tuning (Tu, Mai and Chao, CVPR 2023, arXiv 2212.03220).

The form for Swin is this project's: the public code has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import check_share, check_whole
from vispeft.core.method import Method, PlanItem, Step, register
from vispeft.core.model_units import QueryUnit
from vispeft.core.recipes import Recipe
from vispeft.core.sites import Site, View, select
from vispeft.errors import ConfigError, SiteError

__all__ = ["VQT", "Queries", "feature_scores", "select_features"]

NORM_EPS = 1e-12
"""Lower bound of the length a feature is divided by; PyTorch's default, as in the public code."""
PRIOR = 0.01
"""Initial probability of a class, whose logit is the initial bias (public code)."""


def feature_scores(weight: Tensor) -> Tensor:
    """Score features by how much a classifier uses them: the L2 norm of each feature's column (public code).

    Args:
        weight: The classifier's weight, (classes, features).

    Returns:
        (features,), non-negative. Their sum is the penalty that makes a classifier use few features.
    """
    # `vector_norm` has a gradient of 0, not NaN, at a column of zeros.
    return torch.linalg.vector_norm(weight, dim=0)


def select_features(weight: Tensor, keep: float) -> Tensor:
    """Choose the features a classifier uses most.

    Args:
        weight: Weight of a classifier trained on all features with `feature_scores` as penalty, (classes, features).
        keep: Fraction of the features to keep, above 0 and at most 1.

    Returns:
        Their indices in ascending order, int64, (int(features * keep),).
    """
    return feature_scores(weight).topk(_kept(weight.shape[1], keep)).indices.sort().values


def _kept(features: int, keep: float) -> int:
    return max(1, int(features * keep))


class Queries(QueryUnit):
    """Queries of each block, as wide as their stage, and the features made from their outputs."""

    selected: Tensor | None
    """Indices of the features that the classifier sees; None for all."""

    def __init__(self, stages: Sequence[tuple[int, Sequence[Site]]], view: View, options: VQT) -> None:
        """Allocate the queries.

        Args:
            stages: Index of each stage that is read, and the sites of its blocks.
            view: The backbone.
            options: The method.
        """
        super().__init__()
        sites = [site for _, blocks in stages for site in blocks]
        self.length, self.fan = options.num_queries, view.in_chans * view.patch_size[0] * view.patch_size[1]
        self.blocks = tuple(site.block for site in sites if site.block is not None)
        self.widths = tuple(site.out_features for site in sites)
        self.detach_hidden = options.detach_hidden
        self.aggregate, self.normalize = options.aggregate, options.normalize
        self.dropout, self.token_dropout = options.dropout, options.token_dropout
        self.stages: dict[str, tuple[int, ...]] = {}
        """Blocks of each parameter; all of them are equally wide."""
        for stage, blocks in stages:
            name = "queries" if len(stages) == 1 else f"queries_{stage}"
            queries = nn.Parameter(torch.empty(len(blocks), self.length, blocks[0].out_features))
            self.register_parameter(name, queries)
            self.stages[name] = tuple(site.block for site in blocks if site.block is not None)
        weighted = self.aggregate == "weighted"
        self.weights = nn.Parameter(torch.empty(len(sites), self.length)) if weighted else None
        if weighted and self.normalize and self.length == 1:
            # A single weight scales the block's whole piece, which is then normalised: the weight has no effect.
            self.zero_gradient = frozenset({"weights"})
        self.all_features = options.all_features(view)
        some = options.keep < 1
        self.register_buffer("selected", torch.arange(options.head_width(view)) if some else None)

    def reset(self, generator: Generator) -> None:
        """Draw queries uniformly from the range of VPT's prompts, and set equal weights."""
        bound = math.sqrt(6 / (self.fan + self.widths[0]))
        for name in self.stages:
            self.get_parameter(name).uniform_(-bound, bound, generator=generator)
        if self.weights is not None:
            self.weights.fill_(1.0)
        if self.selected is not None:
            drawn = torch.randperm(self.all_features, generator=generator, device=generator.device)
            self.selected.copy_(drawn[: len(self.selected)].sort().values)

    def change_tokens(self, tokens: Tensor) -> Tensor:
        """Apply dropout to the input of the first block during training, as in the public supervised code."""
        return F.dropout(tokens, self.token_dropout, self.training) if self.token_dropout else tokens

    def query_rows(self, batch: int) -> dict[int, Tensor]:
        """Return all queries, (batch, length, width) each, with dropout drawn separately for each image."""
        found = {}
        for name, blocks in self.stages.items():
            own: Tensor = getattr(self, name)
            rows = F.dropout(own.unsqueeze(1).expand(-1, batch, -1, -1), self.dropout, self.training)
            found.update(zip(blocks, rows.unbind(), strict=True))
        return found

    def features(self, pooled: Tensor, reads: Sequence[Tensor]) -> Tensor:
        """Concatenate the backbone's feature and one piece per block, each L2-normalised if `normalize` is set."""
        own: Tensor = getattr(self, next(iter(self.stages)))
        dtype = torch.promote_types(pooled.dtype, own.dtype)
        pieces, first = [self._normalized(pooled.to(dtype))], 0
        for blocks in self.stages.values():  # as equally wide: a few operations for all of them, not for each
            last = first + len(blocks)
            rows = torch.stack(list(reads[first:last]), dim=1).to(dtype)
            pieces.append(self._normalized(self._pieces(rows, slice(first, last))).flatten(1))
            first = last
        joined = torch.cat(pieces, dim=1)
        return joined if self.selected is None else joined.index_select(1, self.selected)

    def _pieces(self, rows: Tensor, blocks: slice) -> Tensor:
        """Make one piece of each block's rows: (B, blocks, length, width) gives (B, blocks, features)."""
        if self.aggregate == "concat":
            return rows.flatten(2)
        if self.weights is None:
            return rows.mean(dim=2)
        return (rows * self.weights[blocks].to(rows.dtype).unsqueeze(-1)).sum(dim=2)

    def _normalized(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1, eps=NORM_EPS) if self.normalize else features


@register
@dataclass(frozen=True, kw_only=True)
class VQT(Method):
    """Learned queries read every block; their outputs go to a wide classifier and leave the tokens unchanged.

    In each block the queries pass the frozen norm, attend to the tokens by the block's own attention, and pass its MLP.
    They are never keys or values, so the tokens are those of the plain backbone, which runs without a backward pass.
    The outputs of the queries, without a last norm, are concatenated with the backbone's own feature. Maps inside the
    model are unchanged: the method yields vectors.

    With ``keep`` below 1 the classifier sees a fraction of these features. ``vispeft select-features`` selects them
    with a classifier trained with ``head_sparsity``, and lists the four steps.

    On Swin and SwinV2 (form of this project) queries attend to every window, without position bias and mask, and the
    result after the output projection is averaged over the windows of the image.
    """

    num_queries: int = 1
    """Queries of each block; 1, 10 or 20 in the public recipes."""
    aggregate: Literal["concat", "pool", "weighted"] = "concat"
    """How a block's queries become one piece: concatenated, their mean, or their sum with learned weights."""
    normalize: bool = True
    """Whether each piece (one per block) is L2-normalised."""
    dropout: float = 0.1
    """Fraction of query entries dropped during training, drawn separately for each image (public recipes)."""
    token_dropout: float = 0.0
    """Dropout of the first block's input; 0.1 in the public supervised code, not mentioned in the paper."""
    keep: float = 1.0
    """Fraction of the features that the classifier sees (0.7 in the public code's second stage). The selection is part
    of the adapter: `select_features` computes it, and a new adapter draws it at random."""
    head_sparsity: float = 0.0
    """Weight of a penalty on the norms of the classifier's columns, one per feature, which makes it use few features
    (1e-4 in the public code's first stage)."""
    detach_hidden: bool = True
    """Whether the backbone runs without gradients; if so, nothing inside it can train along with the queries."""

    name: ClassVar[str] = "vqt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.03220"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=5e-2,
            weight_decay=1e-4,
            fields={"num_queries": 1},
            source="VTAB-1k: Adam with 0.025 to 0.5, by validation, 100 epochs, batch 128 (andytu28/VQT 9bca87e)",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("tokens",)
    reaches_maps: ClassVar[bool] = False
    training_fields: ClassVar[frozenset[str]] = frozenset({"head_sparsity"})

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "num_queries")
        check_share(self, "dropout", "token_dropout")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"VQT(keep={self.keep}): a share above 0, at most 1, is needed.")
        if not (self.head_sparsity >= 0 and math.isfinite(self.head_sparsity)):
            raise ConfigError(f"VQT(head_sparsity={self.head_sparsity}): a finite number from 0 is needed.")
        if self.roles not in (None, ("tokens",)):
            raise ConfigError("VQT reads whole blocks; leave roles out, and choose blocks by blocks=[...].")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit with all queries at the model's tokens."""
        if view.head_path is None:
            raise SiteError(
                "VQT makes the input of a classifier, and a model wrapped for its features has none. Attach it to the "
                "whole model, or use a method that changes the maps, such as SSF or LoRA."
            )
        if not view.global_pool:
            raise SiteError("VQT needs the backbone's pooled feature, and this model does not pool (global_pool='').")
        for site in view.at("tokens"):
            yield PlanItem(site, "vqt", partial(Queries, self._stages(view), view, self))

    def _read(self, view: View) -> list[Site]:
        return select(view, ("block",), self.blocks)

    def _stages(self, view: View) -> list[tuple[int, list[Site]]]:
        """Group the blocks that are read by stage."""
        read = self._read(view)
        stages = [
            (number, [site for site in read if site.block in blocks]) for number, blocks in enumerate(view.stages)
        ]
        return [(number, sites) for number, sites in stages if sites]

    def head_width(self, view: View) -> int:
        """Count the features the classifier sees."""
        return _kept(self.all_features(view), self.keep)

    def loss_term(self, bank: Any, name: str, step: Step) -> Tensor | None:
        """Penalise the features a classifier uses, by ``head_sparsity`` times the sum of `feature_scores`."""
        if not self.head_sparsity:
            return None
        weight = bank.named_tensors(name).get("head/weight")
        if weight is None:
            raise ConfigError(
                f"VQT(head_sparsity={self.head_sparsity}) penalises the weight of a linear classifier, and adapter "
                f"{name!r} has none. Give it one with model.reset_classifier(num_classes), or set head_sparsity to 0."
            )
        return self.head_sparsity * feature_scores(weight).sum()

    def fresh_head(self) -> str | None:
        """Start the classifier anew if its columns will be used to score features (public code)."""
        return "head_sparsity is to score its features" if self.head_sparsity else None

    def all_features(self, view: View) -> int:
        """Count the features: the backbone's own, and ``Q D`` (side by side) or ``D`` per block."""
        each = self.num_queries if self.aggregate == "concat" else 1
        return view.widths[-1] + each * sum(site.out_features for site in self._read(view))

    def start_head(self, head: nn.Linear, generator: Generator) -> None:
        """Draw the weight Kaiming-normal in fan-out mode; give every class the probability `PRIOR` (public code)."""
        head.weight.normal_(0.0, math.sqrt(2 / head.out_features), generator=generator)
        head.bias.fill_(-math.log((1 - PRIOR) / PRIOR))

    def parameter_count(self, view: View) -> int:
        """Count Q times the sum of widths (``L Q D`` on a ViT), and one weight per query if weighted."""
        read = self._read(view)
        weights = len(read) * self.num_queries if self.aggregate == "weighted" else 0
        return self.num_queries * sum(site.out_features for site in read) + weights
