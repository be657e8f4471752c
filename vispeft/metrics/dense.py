"""Metrics of dense tasks, from sums over the labelled pixels or images of a split, and the figure for all tasks.

Sources: the protocol of Maninis et al. (CVPR 2019, arXiv 1904.08918) and Vandenhende et al. (PAMI 2021, arXiv
2004.13379), which MTLoRA and Polyhistor follow. States are sums, so several processes give what one would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vispeft.data.dense_checks import check_batch
from vispeft.data.dense_targets import IGNORE, DenseTarget, TargetKind
from vispeft.errors import ConfigError
from vispeft.metrics.dense_base import DenseMetric
from vispeft.metrics.edges import Edges
from vispeft.metrics.segmentation import Absent, SegmentationScores

__all__ = ["DenseClasses", "Depth", "Normals", "Saliency", "Values", "delta_m", "dense_metric"]


class DenseClasses(SegmentationScores):
    """Mean IoU and the other scores of classes; see `SegmentationScores`.

    The multi-task papers count a class that is neither labelled nor predicted as zero, ``absent="zero"``.
    """

    main = "miou"

    def __init__(self, target: DenseTarget, name: str, *, absent: Absent = "zero", **settings: Any) -> None:
        """Create the metric with all counts at zero.

        Args:
            target: Description of the task.
            name: Name of the task, for messages.
            absent: Treatment of classes that were not measured in means: ``skip`` or ``zero``.
            settings: Settings of `torchmetrics.Metric`.

        Raises:
            ConfigError: If the number of classes or the rule is invalid.
        """
        super().__init__(len(target.class_names), absent=absent, **settings)
        self.target, self.name = target, name

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            outputs: Class scores (B, C, h, w).
            labels: Classes (B, h, w), 0 to C-1 or `IGNORE`.

        Raises:
            DataError: If outputs or labels do not have the form of the task.
        """
        check_batch(self.target, self.name, outputs, labels)
        super().update(outputs, labels)

    def compute(self) -> dict[str, Tensor]:
        """Return ``miou``, ``macc``, ``aacc`` and ``mdice``, from 0 to 1; NaN if no pixel was labelled."""
        measured = self.confusion.any()
        return {name: value.where(measured, math.nan) for name, value in super().compute().items()}


class Saliency(DenseMetric):
    """Largest mean IoU and F1 of salient pixels over 15 thresholds, 0.2 to 0.9.

    A pixel counts as salient where its probability is above the threshold. IoU (one if neither label nor prediction has
    a salient pixel), precision and recall (zero if their denominator is) are computed per image and averaged over
    images. ``miou`` is the largest mean IoU; ``maxf`` the largest F1 of mean precision and mean recall. The public
    code's second figure, "Beta maxF", applies the sigmoid twice and is not computed here.
    """

    higher_is_better = True
    main = "miou"

    THRESHOLDS = 15
    """Number of thresholds from 0.2 to 0.9."""

    SUMS: ClassVar = {"sums": (3, THRESHOLDS)}
    COUNTS: ClassVar = {"images": ()}

    sums: Tensor
    images: Tensor

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Add IoU, precision and recall of each image (B, 1, h, w) at each threshold."""
        labelled, positive = (labels != IGNORE).flatten(1), (labels >= 0.5).flatten(1)
        size = self.THRESHOLDS + 1
        thresholds = torch.linspace(0.2, 0.9, self.THRESHOLDS, device=outputs.device)
        passed = torch.bucketize(outputs.sigmoid().flatten(1), thresholds)  # number of thresholds below
        cells = (torch.arange(len(labels), device=labels.device)[:, None] * 2 + positive) * size + passed
        counts = torch.bincount(cells[labelled], minlength=len(labels) * 2 * size).reshape(-1, 2, size)
        false, right = counts.flip(2).cumsum(2).flip(2)[..., 1:].to(self.sums.dtype).unbind(1)  # (B, thresholds) each
        wanted = counts[:, 1].sum(1, keepdim=True)
        union = wanted + false
        iou = torch.where(union > 0, right / union, 1)
        precision, recall = right / (right + false).clamp_min(1), right / wanted.clamp_min(1)
        seen = labelled.any(1)
        self.sums += torch.stack([iou, precision, recall])[:, seen].sum(1)
        self.images += seen.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return ``miou`` and ``maxf``, from 0 to 1."""
        iou, precision, recall = self.sums / self.images
        f1 = 2 * precision * recall / (precision + recall).clamp_min(torch.finfo(self.sums.dtype).tiny)
        return {"miou": iou.amax().float(), "maxf": f1.amax().float()}


class Normals(DenseMetric):
    """Angles between predicted and labelled normals over all labelled pixels, in degrees.

    ``mean`` and ``rmse`` are the mean and the root mean square; the public meter of MTLoRA and Vandenhende et al. gives
    the mean under both names. Angles are 2 atan2(|a - b|, |a + b|) of unit vectors, which is exact for small ones,
    where the arc cosine is not. A predicted vector of length zero is 90 degrees away from every label.
    """

    higher_is_better = False
    main = "mean"
    LIMITS = (11.25, 22.5, 30.0)
    """Angles in degrees below which pixels are counted (Fouhey et al., ICCV 2013)."""

    SUMS: ClassVar = {"sums": (2,)}
    COUNTS: ClassVar = {"below": (len(LIMITS),), "pixels": ()}

    sums: Tensor
    below: Tensor
    pixels: Tensor

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Add the angles of a batch (B, 3, h, w)."""
        labelled = (labels != IGNORE).all(1)
        found, wanted = (values.movedim(1, -1)[labelled].to(self.sums.dtype) for values in (outputs, labels))
        found, wanted = (F.normalize(vectors, dim=1) for vectors in (found, wanted))
        angles = torch.rad2deg(2 * torch.atan2((found - wanted).norm(dim=1), (found + wanted).norm(dim=1)))
        self.sums += torch.stack([angles.sum(), angles.square().sum()])
        self.below += torch.stack([(angles < limit).sum() for limit in self.LIMITS])
        self.pixels += labelled.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return ``mean`` and ``rmse`` in degrees, and ``within_11.25``, ``_22.5`` and ``_30``, shares from 0 to 1."""
        mean, square = self.sums / self.pixels
        shares = (self.below.to(self.sums.dtype) / self.pixels).float()
        named = {f"within_{limit:g}": share for limit, share in zip(self.LIMITS, shares, strict=True)}
        return {"mean": mean.float(), "rmse": square.sqrt().float(), **named}


class Depth(DenseMetric):
    """Errors of depth in metres over all labelled pixels.

    ``rmse`` is the root mean square error in metres, ``log_rmse`` that of natural logarithms; predictions are at least
    1e-9 metres, as in the public code. ``delta1`` to ``delta3`` are the shares of pixels whose larger ratio of
    prediction and label is below 1.25, 1.25² and 1.25³ (Eigen et al., NeurIPS 2014).
    """

    higher_is_better = False
    main = "rmse"
    NEAREST = 1e-9
    """Smallest depth in metres that a prediction counts as."""

    SUMS: ClassVar = {"sums": (2,)}
    COUNTS: ClassVar = {"below": (3,), "pixels": ()}

    sums: Tensor
    below: Tensor
    pixels: Tensor

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Add the errors of a batch (B, 1, h, w)."""
        labelled = labels != IGNORE
        found, wanted = (values[labelled].to(self.sums.dtype) for values in (outputs.clamp_min(self.NEAREST), labels))
        logs = found.log() - wanted.log()
        self.sums += torch.stack([(found - wanted).square().sum(), logs.square().sum()])
        self.below += torch.stack([(logs.abs() < power * math.log(1.25)).sum() for power in (1, 2, 3)])
        self.pixels += labelled.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return ``rmse`` in metres, ``log_rmse``, and ``delta1``, ``delta2``, ``delta3``, shares from 0 to 1."""
        rmse, log_rmse = (self.sums / self.pixels).sqrt().float()
        shares = (self.below.to(self.sums.dtype) / self.pixels).float()
        return {"rmse": rmse, "log_rmse": log_rmse, **{f"delta{k}": share for k, share in enumerate(shares, start=1)}}


class Values(DenseMetric):
    """Root mean square error and mean absolute error of values over all labelled pixels, in their own unit."""

    higher_is_better = False
    main = "rmse"

    SUMS: ClassVar = {"sums": (2,)}
    COUNTS: ClassVar = {"pixels": ()}

    sums: Tensor
    pixels: Tensor

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Add the errors of a batch (B, 1, h, w)."""
        labelled = labels != IGNORE
        errors = (outputs[labelled] - labels[labelled]).to(self.sums.dtype)
        self.sums += torch.stack([errors.square().sum(), errors.abs().sum()])
        self.pixels += labelled.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return ``rmse`` and ``mae``."""
        square, absolute = self.sums / self.pixels
        return {"rmse": square.sqrt().float(), "mae": absolute.float()}


def dense_metric(target: DenseTarget, name: str, absent: Absent = "zero") -> DenseClasses | DenseMetric:
    """Create the metric of a task by its kind.

    Its ``compute()`` gives figures by name, its ``main`` is the name of the figure that stands for the task, and its
    ``higher_is_better`` says which way that one points.

    Args:
        target: Description of the task.
        name: Name of the task, for messages.
        absent: Treatment of classes that are neither labelled nor predicted in the mean IoU: ``zero``, as in the
            multi-task papers, or ``skip``.

    Raises:
        ConfigError: If there are more than 255 classes, or no such rule.
    """
    if target.kind == "classes":
        return DenseClasses(target, name, absent=absent)
    return METRICS[target.kind](target, name)


METRICS: dict[TargetKind, type[DenseMetric]] = {
    "saliency": Saliency,
    "edge": Edges,
    "normals": Normals,
    "depth": Depth,
    "values": Values,
}


def delta_m(scores: Mapping[str, float], baselines: Mapping[str, float], higher_is_better: Mapping[str, bool]) -> float:
    """Compute the mean relative gain over single-task scores, in percent (Maninis et al., arXiv 1904.08918).

    ``100 / T * sum of s_i (M_i - B_i) / B_i`` over T tasks, with s = 1 where a higher score M is better than the
    baseline B, and -1 where a lower one is.

    Args:
        scores: Score of each task, by name.
        baselines: Score of a model of that task alone, by name.
        higher_is_better: Whether a higher score is better, by name of the task.

    Returns:
        Percent; NaN if a score is.

    Raises:
        ConfigError: If there is no task, the three do not name the same tasks, or a baseline is not a finite number
            above zero.
    """
    named = {"scores": scores, "baselines": baselines, "higher_is_better": higher_is_better}
    if not scores or any(set(given) != set(scores) for given in named.values()):
        found = "; ".join(f"{name} of {sorted(given)}" for name, given in named.items())
        raise ConfigError(f"delta_m got {found}; give all three of the same tasks, of which there is at least one.")
    gains = []
    for task, score in scores.items():
        baseline = float(baselines[task])
        if not (math.isfinite(baseline) and baseline > 0):
            raise ConfigError(
                f"delta_m got the baseline {baseline} of the task {task!r}; a finite one above 0 is needed."
            )
        gains.append((1 if higher_is_better[task] else -1) * (float(score) - baseline) / baseline)
    return 100 * math.fsum(gains) / len(gains)
