"""Mask tuning: binary masks on frozen weights (Piggyback, arXiv 1801.06519; R-AMT, arXiv 2307.15049).

Formulas, threshold, start and gradient dropout follow the public code of R-AMT, wuw2019/R-AMT at 07f8d2c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath
from vispeft.core.method import Method, PlanItem, Step, register
from vispeft.core.recipes import FEW_IMAGES, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import SharedUnit, Unit, WeightUnit, with_rows
from vispeft.errors import ConfigError, SiteError
from vispeft.storage.class_embeddings import ClassEmbeddings, check_order

__all__ = ["Mask", "MaskUnit", "TeacherUnit", "ZeroShotUnit", "dropped_gradient"]

START = 1e-2
"""Start value of the trained numbers (public code)."""
THRESHOLD = 5e-3
"""A weight is kept where its number is above this (public code)."""
FIT_STEPS = 100
"""Steps of L-BFGS that fit the teacher."""
FIT_DECAY = 1e-4
"""Weight of the squared norm of the teacher's matrix in its loss, which has no minimum on separable classes without."""
TOY = Recipe(
    lr=3e-3,
    weight_decay=0.0,
    images=FEW_IMAGES,
    source="short trainings: of 3e-4, 1e-3 and 3e-3 validation chose 3e-3 for 300 steps on a toy, at the attention; on "
    "all linear layers 1e-3 did as well (benchmarks/toy_deltas.py); 1,500 steps and more take R-AMT's 8e-5",
)
RAMT = Recipe(
    lr=8e-5,
    weight_decay=0.0,
    source="R-AMT, 16 images per class: Adam, batch 32, 30 epochs; 3e-5 and 10 epochs for ImageNet (wuw2019/R-AMT "
    "07f8d2c). A weight flips after about 60 steps in one direction",
)


class MaskUnit(WeightUnit):
    """A mask of ones and zeros on a weight, from trained numbers M: ``W' = W * [M > threshold]``.

    The gradient of M is that of the mask, as if M were the mask (straight-through), so that removed weights can return.
    """

    no_decay = frozenset({"M"})

    def __init__(self, site: Site) -> None:
        """Allocate M, (rows, columns).

        Args:
            site: The layer, or a slice of one.
        """
        super().__init__()
        self.start, self.stop = site.span
        self.M = nn.Parameter(torch.empty(site.out_features, site.columns))

    def reset(self, generator: Generator) -> None:
        """Keep every weight."""
        self.M.fill_(START)

    @property
    def mask(self) -> Tensor:
        """The mask, bool (rows, columns)."""
        return self.M.detach() > THRESHOLD

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Multiply the rows of (out, columns) by the mask."""
        rows = weight[self.start : self.stop]
        # The second term is zero (and not finite where M is not), and its gradient is that of the mask.
        rows = rows * self.mask + rows * (self.M - self.M.detach())
        return with_rows(weight, self.start, rows)

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the mask as numbers: 1 and 0 stand for themselves."""
        if not bool(torch.isfinite(self.M).all()):
            return {"M": self.M.detach()}  # refused by whoever saves it
        return {"M": self.mask.to(self.M.dtype)}

    def codecs(self) -> Mapping[str, str]:
        """Store one bit per weight."""
        return {"M": "mask"}


class TeacherUnit(SharedUnit):
    """A linear classifier on the frozen backbone's features, whose scores the masks should not unlearn.

    It belongs to training and is in no file of an adapter, but in checkpoints.
    """

    weight: Tensor
    """(classes, width)."""
    bias: Tensor
    """(classes,)."""

    def __init__(self, classes: int, width: int) -> None:
        """Allocate the classifier.

        Args:
            classes: Number of classes.
            width: Width of the features.
        """
        super().__init__()
        self.register_buffer("weight", torch.zeros(classes, width))
        self.register_buffer("bias", torch.zeros(classes))

    def reset(self, generator: Generator) -> None:
        """Know nothing: all classes are equally likely."""
        self.weight.zero_()
        self.bias.zero_()

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Fit the classifier by its cross-entropy.

        Args:
            features: (N, width).
            labels: int64 (N,).
        """
        width = features.shape[1]
        # Features of unit variance make the problem round; the classifier takes the scale back.
        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
        scaled = (features - mean) / deviation
        weight = torch.zeros(len(self.bias), width, dtype=features.dtype, device=features.device, requires_grad=True)
        bias = torch.zeros_like(weight[:, 0]).detach().requires_grad_()
        solver = torch.optim.LBFGS([weight, bias], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(F.linear(scaled, weight, bias), labels) + FIT_DECAY * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            solver.step(loss)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.weight.copy_(weight / deviation)
            self.bias.copy_(bias - (weight / deviation) @ mean)

    def scores(self, features: Tensor) -> Tensor:
        """Compute the scores (B, classes) of features (B, width)."""
        return F.linear(features, self.weight, self.bias)

    def file_tensors(self) -> dict[str, Tensor]:
        """Return nothing: see the class."""
        return {}


class ZeroShotUnit(SharedUnit):
    """The classifier of class embeddings as the teacher; like `TeacherUnit`, and fitted to nothing."""

    def __init__(self, classes: ClassEmbeddings) -> None:
        """Take the class embeddings.

        Args:
            classes: The embeddings, in the order of the model's classes.
        """
        super().__init__()
        self.classes = classes

    def reset(self, generator: Generator) -> None:
        """Draw nothing."""

    def scores(self, features: Tensor) -> Tensor:
        """Compute the scores (B, classes) of features (B, width)."""
        return self.classes.scores(features)


def dropped_gradient(own: Tensor, other: Tensor, share: float, draw: Tensor) -> Tensor:
    """Drop the entries of a gradient that disagree with another one (R-AMT, equations 7 to 9).

    An entry is kept with the probability ``(sign(a) (a + b) / (|a| + |b|) + 1) / 2``: 1 where both have one sign,
    ``|a| / (|a| + |b|)`` where not.

    Args:
        own: The gradient a of the loss, of any shape.
        other: The gradient b of the teacher's loss.
        share: Share of the dropping; with 0 nothing is dropped.
        draw: Uniform numbers from 0 to 1; an entry is kept where its probability is larger.
    """
    keep = (own.sign() * (own + other) / (own.abs() + other.abs() + 1e-8) + 1) / 2
    return ((1 - share) + share * (keep > draw).to(own.dtype)) * own


class _Multiplier(torch.autograd.Function):
    """Zero times a number; the backward pass tells by how much the whole loss is scaled."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, told: list[Tensor]) -> Tensor:
        ctx.told = told
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.told.append(grad)
        return torch.zeros_like(grad), None


@register
@dataclass(frozen=True, kw_only=True)
class Mask(DropPath, Method):
    """Binary masks on frozen weights: training decides which weights stay, and changes none.

    The file has one bit per weight; training holds M, its gradient and the optimiser's state for each. The learning
    rate and the number of steps decide how many weights are removed. By default the masks are at the attention, as in
    R-AMT. With ``dropout`` above zero, gradients that disagree with those of a teacher are dropped at random: CLIP's
    zero-shot classifier as in R-AMT (``teacher``), or a linear classifier that is fitted on the frozen features before
    the first step.
    """

    penalty: float = 0.0
    """Weight of the sum of the norms of M in the loss; 1e-4 in R-AMT."""
    dropout: float = 0.0
    """Share of the gradient dropout, from 0 (none) to 1; 0.3 and 1 in R-AMT."""
    teacher: str | None = None
    """File of class embeddings (`vispeft.storage.class_embeddings`) whose zero-shot classifier is the teacher, as in
    R-AMT, with the classes in the order of the data; None fits a linear classifier on the frozen features."""

    name: ClassVar[str] = "mask"
    paper: ClassVar[str] = "https://arxiv.org/abs/2307.15049"
    recipes: ClassVar[tuple[Recipe, ...]] = (TOY, RAMT)
    default_roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj")
    training_fields: ClassVar[frozenset[str]] = frozenset({"penalty", "dropout", "teacher"})

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        for field, most in (("penalty", 1e9), ("dropout", 1.0)):
            if not 0 <= getattr(self, field) <= most:
                raise ConfigError(f"Mask({field}={getattr(self, field)}): a number from 0 to {most:g} is needed.")
        if self.teacher is not None and not self.dropout:
            raise ConfigError(
                f"Mask(teacher={self.teacher!r}) has no effect without dropout, which is 0. Set it above 0."
            )

    def check_classes(self, names: Sequence[str]) -> None:
        """Refuse class embeddings in another order than the data's classes."""
        if self.teacher is not None:
            check_order(ClassEmbeddings.load(self.teacher), names, f"Mask(teacher={self.teacher!r})")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one mask at each site, and the teacher at the tokens."""
        for site in self.sites(view):
            if site.kind not in ("linear", "conv") or site.role == "head":
                raise SiteError(f"Mask acts on linear layers and on the patch convolution; {site.role!r} is neither.")
            yield PlanItem(site, "mask", partial(MaskUnit, site))
        if self.dropout:
            timm_model: Any = model
            classes, width = timm_model.num_classes, timm_model.head_hidden_size
            if not classes:
                raise ConfigError(
                    f"Mask(dropout={self.dropout}): the teacher is a classifier, and this model has no classes. Give "
                    "num_classes, or dropout=0."
                )
            build: Callable[[], Unit] = partial(TeacherUnit, classes, width)
            if self.teacher is not None:
                build = partial(ZeroShotUnit, _embeddings(self.teacher, classes, width))
            for site in view.at("tokens"):
                yield PlanItem(site, "teacher", build)

    def parameter_count(self, view: View) -> int:
        """Count ``in * out`` per site, one bit each."""
        return sum(site.columns * site.out_features for site in self.sites(view))

    def file_method(self) -> Method:
        """Return plain masks: what belongs to training is in no file."""
        return type(self)(roles=self.roles, blocks=self.blocks, drop_path=self.drop_path)

    def start_from(self, bank: Any, name: str, loader: Iterable[Any]) -> None:
        """Fit the teacher on the frozen features of the training images.

        Args:
            bank: The bank of the model.
            name: The adapter.
            loader: Training batches of images and class numbers.

        Raises:
            ConfigError: If the targets are no class numbers.
        """
        teacher = _teacher(bank, name)
        if not isinstance(teacher, TeacherUnit):
            return
        features, labels = [], []
        for images, targets in loader:
            if not (isinstance(targets, Tensor) and targets.ndim == 1 and targets.dtype == torch.int64):
                raise ConfigError(
                    "Mask(dropout=...) fits a classifier as the teacher and needs one class number per image; targets "
                    "of another form were found. Set dropout=0, or leave out mixup."
                )
            features.append(_frozen_features(bank, images))
            labels.append(targets)
        teacher.fit(torch.cat(features), torch.cat(labels))

    def loss_term(self, bank: Any, name: str, step: Step) -> Tensor | None:
        """Compute the penalty, and let the gradients of the masks be dropped where they disagree with the teacher's.

        Args:
            bank: The bank of the model.
            name: The adapter.
            step: Batch and output of the step.
        """
        # A schedule may let a step train the masks of some blocks alone, or none.
        masks = [unit.M for unit in _masks(bank, name) if unit.M.requires_grad]
        term = self.penalty * torch.stack([mask.norm() for mask in masks]).sum() if self.penalty and masks else None
        teacher = _teacher(bank, name)
        if teacher is None or not masks:
            return term
        with torch.no_grad():
            told = teacher.scores(_frozen_features(bank, step.batch[0])).softmax(1)
        disagreement = F.cross_entropy(step.output, told.to(step.output.dtype))
        # The gradient of each mask is changed as it arrives, on each process before the processes are averaged.
        others = torch.autograd.grad(disagreement, masks, retain_graph=True)
        scales: list[Tensor] = []
        for mask, other in zip(masks, others, strict=True):
            handles: list[Any] = []
            handles.append(mask.register_hook(partial(self._dropped, other, scales, handles)))
        scale = cast(Tensor, _Multiplier.apply(step.output.sum(), scales))
        return scale if term is None else term + scale

    def _dropped(self, other: Tensor, scales: list[Tensor], handles: list[Any], grad: Tensor) -> Tensor:
        """Drop entries of one gradient, once."""
        for handle in handles:
            handle.remove()
        scale = (scales[-1] if scales else grad.new_ones(())).to(grad.dtype)
        return dropped_gradient(grad / scale, other, self.dropout, torch.rand_like(grad)) * scale


def _masks(bank: Any, name: str) -> list[MaskUnit]:
    return [unit for unit in bank.units(name).values() if isinstance(unit, MaskUnit)]


def _teacher(bank: Any, name: str) -> TeacherUnit | ZeroShotUnit | None:
    found = [unit for unit in bank.units(name).values() if isinstance(unit, TeacherUnit | ZeroShotUnit)]
    return found[0] if found else None


def _embeddings(path: str, classes: int, width: int) -> ClassEmbeddings:
    """Read the class embeddings of a teacher, and compare them with the model."""
    found = ClassEmbeddings.load(path)
    own, wanted = (len(found.embeddings), found.projection.shape[1]), (classes, width)
    if own != wanted:
        raise ConfigError(
            f"Mask(teacher={path!r}) has {own[0]} classes and {own[1]} features, and the model has {wanted[0]} and "
            f"{wanted[1]}. Give class embeddings of the data's classes that were made for this backbone."
        )
    return found


@torch.no_grad()
def _frozen_features(bank: Any, images: Tensor) -> Tensor:
    """Compute what the classifier reads, of the frozen backbone, (B, width), in float32 or better."""
    model = bank.model
    with bank.disabled():
        features: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return features if features.dtype == torch.float64 else features.float()
