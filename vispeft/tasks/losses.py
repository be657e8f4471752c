"""Losses of dense tasks, on scores (B, C, h, w) and labels per pixel.

Pixels labelled `IGNORE` are ignored. A batch without a labelled pixel has a loss of zero, with a gradient of zero.
All are computed in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError, UnknownNameError

__all__ = ["SegmentationLoss", "cross_entropy", "dice_loss", "lovasz_softmax", "ohem_cross_entropy"]


def cross_entropy(scores: Tensor, masks: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Compute the cross entropy, averaged over labelled pixels.

    With weights, the average is weighted too (divided by the sum of the pixels' weights), as PyTorch does.

    Args:
        scores: Class scores (B, C, h, w).
        masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.
        class_weights: Weight of a pixel of each class (C,).
    """
    losses = _pixel_losses(scores, masks, class_weights)
    return _mean(losses, _pixel_weights(masks, class_weights).to(losses.dtype))


def dice_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Compute one minus the soft Dice coefficient, averaged over the classes in the batch's labels.

    The coefficient of class c is ``2 sum(p_c y_c) / (sum(p_c) + sum(y_c))``, with softmax probabilities p, labels y of
    0 and 1, and sums over all labelled pixels of the batch. Denominators are first powers (V-Net, arXiv 1606.04797, has
    squares), and there is no smoothing term, since a class that is there has a denominator of at least one.

    Args:
        scores: Class scores (B, C, h, w).
        masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.
    """
    valid = masks != IGNORE
    probabilities = at_least_float32(scores).softmax(dim=1)
    weights = valid.to(probabilities.dtype)
    labels = masks.where(valid, 0)
    counts = weights.new_zeros(scores.shape[1]).index_add(0, labels.flatten(), weights.flatten())
    right = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1) * weights
    overlap = torch.zeros_like(counts).index_add(0, labels.flatten(), right.flatten())
    predicted = torch.einsum("bchw,bhw->c", probabilities, weights)
    present = (counts > 0).to(probabilities.dtype)
    # Absent classes are divided by one, and then left out, so that their gradient is zero and never 0/0.
    coefficients = 2 * overlap / (predicted + counts).where(present > 0, 1)
    return _mean((1 - coefficients) * present, present)


def lovasz_softmax(scores: Tensor, masks: Tensor) -> Tensor:
    """Compute the Lovász extension of the Jaccard loss, averaged over the classes in the batch's labels.

    Berman et al., CVPR 2018 (arXiv 1705.08790), equation 11, over all pixels of the batch together
    (``classes="present"``, ``per_image=False`` in the authors' code).

    Args:
        scores: Class scores (B, C, h, w).
        masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.
    """
    valid = masks != IGNORE
    # One row per class keeps each sort on contiguous memory.
    probabilities = at_least_float32(scores).softmax(dim=1).transpose(0, 1)[:, valid]
    labels = masks[valid]
    present = labels.unique().tolist()
    if not present:
        return probabilities.sum()
    return torch.stack([_lovasz(probabilities[c], labels == c) for c in present]).mean()


def ohem_cross_entropy(
    scores: Tensor,
    masks: Tensor,
    class_weights: Tensor | None = None,
    *,
    thresh: float = 0.7,
    min_kept: int = 100_000,
) -> Tensor:
    """Compute the cross entropy of hard pixels: those whose own class has a low probability.

    A pixel is kept if that probability is below the larger of ``thresh`` and the k-th lowest one of the batch, counted
    from zero, with k = ``min_kept`` x B, or the last if there are fewer: ``OHEMPixelSampler`` of mmsegmentation 1.2.2
    (after arXiv 1604.03540). The loss is the mean over kept pixels; mmsegmentation divides by all pixels instead, which
    makes it smaller the more pixels are easy.

    Args:
        scores: Class scores (B, C, h, w).
        masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.
        class_weights: Weight of a pixel of each class (C,).
        thresh: Probability below which a pixel is hard, in any case.
        min_kept: Smallest number of pixels to keep per image, if there are as many.
    """
    losses = _pixel_losses(scores, masks, class_weights)
    kept = hard_pixels(scores.detach(), masks, thresh, min_kept).to(losses.dtype)
    return _mean(losses * kept, kept * _pixel_weights(masks, class_weights).to(losses.dtype))


def hard_pixels(scores: Tensor, masks: Tensor, thresh: float, min_kept: int) -> Tensor:
    """Choose the pixels that `ohem_cross_entropy` keeps.

    Args:
        scores: Class scores (B, C, h, w).
        masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.
        thresh: Probability below which a pixel is hard, in any case.
        min_kept: Smallest number of pixels to keep per image, if there are as many.

    Returns:
        Booleans (B, h, w).
    """
    valid = masks != IGNORE
    labels = masks.where(valid, 0).unsqueeze(1)
    own = at_least_float32(scores).softmax(dim=1).gather(1, labels).squeeze(1)
    candidates = own[valid]
    if not len(candidates):
        return valid
    rank = min(min_kept * len(masks), len(candidates) - 1)
    return valid & (own < candidates.kthvalue(rank + 1).values.clamp_min(thresh))


class SegmentationLoss(nn.Module):
    """A weighted sum of segmentation losses.

    Example:
        >>> loss = SegmentationLoss({"cross_entropy": 1.0, "dice": 0.5})
        >>> loss(scores, masks).backward()
    """

    class_weights: Tensor | None

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        class_weights: Sequence[float] | None = None,
        ohem_thresh: float = 0.7,
        ohem_min_kept: int = 100_000,
    ) -> None:
        """Validate and store the settings.

        Args:
            weights: Weight of each loss: ``cross_entropy``, ``dice``, ``lovasz``, ``ohem``.
            class_weights: How much a pixel of each class counts in ``cross_entropy`` and ``ohem``.
            ohem_thresh: Probability of the own class below which a pixel counts in ``ohem`` in any case.
            ohem_min_kept: How many pixels per image count in ``ohem`` at least.

        Raises:
            UnknownNameError: If there is no such loss.
            ConfigError: If a number is out of range, or all weights are zero.
        """
        super().__init__()
        known = ("cross_entropy", "dice", "lovasz", "ohem")
        for name in weights:
            if name not in known:
                raise UnknownNameError("segmentation loss", name, known)
        _check_weights("weights", list(weights.values()))
        if class_weights is not None:
            _check_weights("class_weights", class_weights)
        if not 0 <= ohem_thresh <= 1 or ohem_min_kept < 1:
            raise ConfigError(
                f"SegmentationLoss(ohem_thresh={ohem_thresh}, ohem_min_kept={ohem_min_kept}): a probability from 0 to "
                "1 and a count from 1 on are needed."
            )
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        self.ohem = partial(ohem_cross_entropy, thresh=ohem_thresh, min_kept=ohem_min_kept)
        values = None if class_weights is None else torch.tensor([float(weight) for weight in class_weights])
        self.register_buffer("class_weights", values, persistent=False)

    def forward(self, scores: Tensor, masks: Tensor) -> Tensor:
        """Compute the weighted sum.

        Args:
            scores: Class scores (B, C, h, w).
            masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.

        Raises:
            ConfigError: If the number of class weights differs from the number of scores.
        """
        terms = self.terms(scores, masks)
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def check(self, num_classes: int) -> None:
        """Check that the settings fit a number of classes.

        Args:
            num_classes: Number of scores per pixel.

        Raises:
            ConfigError: If the number of class weights differs.
        """
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ConfigError(
                f"SegmentationLoss got {len(self.class_weights)} class_weights and scores of {num_classes} classes; "
                "give one weight per class."
            )

    def terms(self, scores: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Compute each loss of the sum, before it is weighted.

        Args:
            scores: Class scores (B, C, h, w).
            masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.

        Raises:
            ConfigError: If the number of class weights differs from the number of scores.
        """
        self.check(scores.shape[1])
        weights = self.class_weights
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "cross_entropy": partial(cross_entropy, class_weights=weights),
            "dice": dice_loss,
            "lovasz": lovasz_softmax,
            "ohem": partial(self.ohem, class_weights=weights),
        }
        return {name: losses[name](scores, masks) for name in self.weights}


def at_least_float32(scores: Tensor) -> Tensor:
    """Convert numbers of half precision to float32, and leave others as they are.

    Args:
        scores: Numbers of any shape.
    """
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _pixel_losses(scores: Tensor, masks: Tensor, class_weights: Tensor | None) -> Tensor:
    """Compute the weighted cross entropy of each pixel (B, h, w), zero where there is no label."""
    scores = at_least_float32(scores)
    weights = None if class_weights is None else class_weights.to(scores.dtype)
    return F.cross_entropy(scores, masks, weights, ignore_index=IGNORE, reduction="none")


def _pixel_weights(masks: Tensor, class_weights: Tensor | None) -> Tensor:
    """Weight of each pixel (B, h, w), zero where there is no label."""
    valid = masks != IGNORE
    return valid if class_weights is None else class_weights[masks.where(valid, 0)] * valid


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Divide the sum of weighted values by the sum of their weights; zero where that is zero."""
    total = weights.sum()
    return values.sum() / total.where(total > 0, 1)


def _lovasz(probabilities: Tensor, foreground: Tensor) -> Tensor:
    """Compute the Lovász extension of one class's Jaccard loss at its errors (N,).

    The extension is the errors, sorted from the largest, times the steps of the Jaccard loss of the set of pixels that
    are wrong when these are added to it one by one (algorithm 1 of the paper).
    """
    errors, order = (foreground.to(probabilities.dtype) - probabilities).abs().sort(descending=True)
    ordered = foreground[order]
    # Counts in int64: float32 loses increments above 2^24.
    intersection = ordered.sum() - ordered.cumsum(0)
    union = ordered.sum() + (~ordered).cumsum(0)
    losses = 1 - intersection.to(errors.dtype) / union.to(errors.dtype)
    return errors @ losses.diff(prepend=losses.new_zeros(1))


def _check_weights(name: str, values: Sequence[float]) -> None:
    if not values or not all(math.isfinite(value) and value >= 0 for value in values) or not sum(values):
        raise ConfigError(
            f"SegmentationLoss({name}={list(values)}): finite numbers from 0 on are needed, at least one above 0."
        )
