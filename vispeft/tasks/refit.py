"""Fitting a classifier anew on a few batches, for an adapter whose features have moved a little."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vispeft.adapters.bank import AdapterBank
from vispeft.core.modes import evaluating
from vispeft.data.splitting import cross_validation
from vispeft.errors import ConfigError, DataError, check_count
from vispeft.tasks.probe import STRENGTHS, fit_path

__all__ = ["refit_head"]

FOLDS = 5
"""Parts of the images that choose the strength of the regularisation."""


@torch.no_grad()
def refit_head(
    bank: AdapterBank, batches: Iterable[Any], name: str | None = None, *, count: int | None = None
) -> float:
    """Fit an adapter's classifier to the features of some images, as a start from a probe does.

    It is a multinomial logistic regression of the features in front of the classifier. Five folds of the images choose
    the strength of its regularisation. Backbone and units stay.

    Args:
        bank: The bank of the model.
        batches: Batches of images and class numbers, prepared as for an evaluation.
        name: The adapter; may be left out where only one acts.
        count: Number of batches to take; None for all.

    Returns:
        The chosen strength.

    Raises:
        ConfigError: If the classifier is no linear layer, or it is an adapter of tasks.
        DataError: If there are fewer than two images, targets are no class numbers of the classifier, all images have
            one class, or features are not finite.
    """
    label = name if name is not None else bank.active[-1] if len(bank.active) == 1 else ""
    head = bank.head(label or None)
    if not isinstance(head, nn.Linear) or hasattr(head, "bits"):
        raise ConfigError(f"refit_head fits a linear classifier, and this adapter's is a {type(head).__name__}.")
    if count is not None:
        check_count("refit_head(count)", count)
    with bank.using(label), evaluating(bank.model):
        features, targets = _seen(bank.model, head, islice(batches, count))
    classes = head.out_features
    if targets.dtype.is_floating_point or targets.ndim != 1 or int(targets.max()) >= classes or int(targets.min()) < 0:
        raise DataError(
            f"refit_head needs one class number from 0 to {classes - 1} for each image; the targets are "
            f"{tuple(targets.shape)} {targets.dtype}, up to {targets.max()}."
        )
    if not features.isfinite().all():
        raise DataError("refit_head: the features of some images are not finite. Look at the images.")
    best = _best(features, targets, classes, head.bias is not None)
    strength, model = list(fit_path("class", features, targets, classes, bias=head.bias is not None))[best]
    head.weight.copy_(model.weight)
    if head.bias is not None:
        head.bias.copy_(model.bias)
    return strength


def _seen(model: nn.Module, head: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Compute what the classifier sees of images."""
    like = next(model.parameters())
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].detach().float().cpu()))
    try:
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                images, own = batch[:2]
                model(images.to(device=like.device, dtype=like.dtype))
                targets.append(torch.as_tensor(own).cpu())
    finally:
        hook.remove()
    if sum(map(len, rows)) < 2:
        raise DataError("refit_head: no batches of images were given, or a single image.")
    return torch.cat(rows), torch.cat(targets)


def _best(features: Tensor, targets: Tensor, classes: int, bias: bool) -> int:
    """Return the index of the strength with the best accuracy on held-out folds, then the smallest loss."""
    scores = torch.zeros(len(STRENGTHS), len(targets), classes)
    folds = min(FOLDS, len(targets))
    for fold in range(folds):
        rest, held = cross_validation(targets, folds, fold, 0)
        if len(targets[rest].unique()) < 2:
            continue
        for index, (_, model) in enumerate(fit_path("class", features[rest], targets[rest], classes, bias=bias)):
            scores[index, held] = model(features[held])
    hits = (scores.argmax(2) == targets).float().mean(1)
    losses = [float(nn.functional.cross_entropy(own, targets)) for own in scores]
    return max(range(len(STRENGTHS)), key=lambda index: (float(hits[index]), -losses[index]))
