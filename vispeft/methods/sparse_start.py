"""Choices of entries that look at the training images, before the first step of `vispeft.methods.sparse`.

* ``gradient``: the largest gradients of the loss;
* ``gps``: the largest gradients of a contrastive loss of two views (`vispeft.methods.gps`);
* schedule ``lt``: the largest changes after tuning all entries (LT-SFT, Ansell et al., ACL 2022, arXiv 2110.07560;
  cambridgeltl/composable-sft at 29f7872).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispeft.core.modes import evaluating
from vispeft.errors import ConfigError, TrainingError
from vispeft.methods.gps import contrastive_loss, other_view
from vispeft.methods.sparse_schedules import largest_changes
from vispeft.methods.sparse_unit import SparseUnit

__all__ = ["by_changes", "by_contrast", "by_gradient", "contrast_gradients", "dense_gradients", "units_of"]

Views = tuple[Tensor, Tensor, Tensor]
"""Two views of images, each (B, C, H, W), and their class numbers (B,)."""


def units_of(bank: Any, name: str) -> list[SparseUnit]:
    """Return the sparse units of an adapter.

    Args:
        bank: The bank of the model.
        name: The adapter.
    """
    return [unit for unit in bank.units(name).values() if isinstance(unit, SparseUnit)]


def dense_gradients(units: list[SparseUnit], run: Callable[[], None]) -> list[Tensor]:
    """Sum the gradients of whole weights over the backward passes of a function.

    Args:
        units: The units at these weights.
        run: Goes forward and backward, any number of times.

    Returns:
        The sum of each, (rows, columns).

    Raises:
        ConfigError: If there was no backward pass.
        TrainingError: If a sum is not finite: no entry of it is the largest.
    """
    sums: list[Tensor | None] = [None] * len(units)

    def watch(index: int, grad: Tensor) -> None:
        before = sums[index]
        sums[index] = grad.clone() if before is None else before + grad

    for index, unit in enumerate(units):
        unit.observer = partial(watch, index)
    try:
        run()
    finally:
        for unit in units:
            unit.observer = None
    found = [total for total in sums if total is not None]
    if len(found) < len(units):
        raise ConfigError("Entries were to be chosen by their gradients, and there was no backward pass: no images?")
    if not all(bool(torch.isfinite(total).all()) for total in found):
        raise TrainingError("Entries were to be chosen by their gradients, and these are not finite. Check the images.")
    return found


@contextmanager
def _alone(bank: Any, name: str) -> Iterator[None]:
    """Run one adapter with gradients; those that parameters have are left as they were."""
    parameters = [tensor for _, tensor in bank.trainable_parameters()]
    before = [tensor.grad for tensor in parameters]
    # A compiled model shows no gradients of whole weights.
    try:
        with torch.enable_grad(), bank.using(name), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for tensor, grad in zip(parameters, before, strict=True):
            tensor.grad = grad


def by_gradient(bank: Any, name: str, loader: Iterable[Any]) -> None:
    """Choose the entries with the largest gradient of the loss, summed over the training images.

    Args:
        bank: The bank of the model.
        name: The adapter.
        loader: Training batches of images and class numbers, or of several 0/1 labels.
    """
    units = units_of(bank, name)

    def run() -> None:
        with _alone(bank, name):
            for images, targets in loader:
                torch.autograd.grad(_loss(bank.model(images), targets), [unit.values for unit in units])

    for unit, found in zip(units, dense_gradients(units, run), strict=True):
        unit.positions.copy_(unit.chosen(found.abs()))


def _loss(output: Tensor, targets: Any, what: str = "support='gradient'") -> Tensor:
    """Compute the loss of the usual targets: class numbers, or a row of labels or shares per image."""
    if isinstance(targets, Tensor) and isinstance(output, Tensor) and output.ndim == 2:
        if targets.ndim == 1 and targets.dtype == torch.int64:
            return F.cross_entropy(output.float(), targets, reduction="sum")
        if targets.shape == output.shape and bool(((targets >= 0) & (targets <= 1)).all()):
            return F.binary_cross_entropy_with_logits(output.float(), targets.float(), reduction="sum")
    raise ConfigError(
        f"Sparse({what}) computes a loss of class scores before the first step, and the targets are neither "
        "class numbers nor a row of labels or shares from 0 to 1 per image, such as values of a regression. Choose "
        "another support or schedule."
    )


# ------------------------------------------------------------------ GPS


def by_contrast(bank: Any, name: str, loader: Iterable[Any]) -> None:
    """Choose the entries with the largest gradient of a contrastive loss, as GPS does.

    The first view of an image is as the training step gets it, the second one another part of it, perhaps mirrored
    (form of this project: the public code loads each image twice, with other draws of the training's augmentation).

    Args:
        bank: The bank of the model.
        name: The adapter.
        loader: Training batches of images and class numbers.
    """
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))  # by the seed of the training

    def views() -> Iterator[Views]:
        for images, targets in loader:
            _check_classes(images, targets)
            yield images, other_view(images, generator), targets

    for unit, found in zip(units_of(bank, name), contrast_gradients(bank, name, views()), strict=True):
        unit.positions.copy_(unit.chosen(found.abs()))


def contrast_gradients(
    bank: Any, name: str, batches: Iterable[Views], told: Callable[[Tensor], None] = lambda loss: None
) -> list[Tensor]:
    """Sum the gradients of the contrastive loss of the features in front of the classifier, in evaluation mode.

    Args:
        bank: The bank of the model.
        name: The adapter.
        batches: Batches of two views.
        told: Called with the loss of each batch, before its backward pass.

    Returns:
        The sums for the weights of the adapter's sparse units, each (rows, columns).
    """
    units, model = units_of(bank, name), bank.model

    def run() -> None:
        # Without dropout and stochastic depth; the public code switches these off, and has no other modes.
        with evaluating(model), _alone(bank, name):
            for first, second, labels in batches:
                tokens = model.forward_features(torch.cat([first, second]))
                loss = contrastive_loss(model.forward_head(tokens, pre_logits=True), labels)
                told(loss)
                torch.autograd.grad(loss, [unit.values for unit in units])

    return dense_gradients(units, run)


def _check_classes(images: Any, targets: Any) -> None:
    """Refuse batches without one class number per image."""
    pictures = isinstance(images, Tensor) and images.ndim == 4
    classes = isinstance(targets, Tensor) and targets.ndim == 1 and targets.dtype == torch.int64
    if not pictures or not classes or len(targets) != len(images):
        raise ConfigError(
            "Sparse(support='gps') compares images of the same class before the first step, and the batches are not "
            "images with one class number each. Leave mixup and cutmix out, or choose another support for this task."
        )


# ------------------------------------------------------------------ LT-SFT


def by_changes(bank: Any, name: str, loader: Iterable[Any], lr: float, passes: int) -> None:
    """Tune all entries, and train those that changed most over all layers; everything else is as it was.

    A layer without any of these trains the one entry of it that changed most.

    Args:
        bank: The bank of the model.
        name: The adapter.
        loader: Training batches of images and class numbers, or of several 0/1 labels; iterated over `passes` times.
        lr: Learning rate of AdamW, without decay.
        passes: Passes over the batches.

    Raises:
        ConfigError: If several processes train: each would find other entries, and another number of them in a layer.
    """
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ConfigError(
            "Sparse(schedule='lt') chooses entries over all layers by the images of one process, and several processes "
            "train. Train with one, or choose another schedule."
        )
    units = units_of(bank, name)
    changes = {str(index): change for index, change in enumerate(_tuned(bank, name, loader, lr, passes))}
    count = sum(len(unit.values) for unit in units)
    changed = sum(int(change.count_nonzero()) for change in changes.values())
    if changed < count:
        raise ConfigError(
            f"Sparse(schedule='lt') is to choose {count:,} entries, and {changed:,} changed while all were tuned. Take "
            "a smaller budget, or a higher dense_lr."
        )
    masks = largest_changes({key: torch.zeros_like(change) for key, change in changes.items()}, changes, count)
    for unit, change, mask in zip(units, changes.values(), masks.values(), strict=True):
        found = mask.flatten().nonzero().flatten()
        unit.put(found if len(found) else change.abs().argmax().view(1))


def _tuned(bank: Any, name: str, loader: Iterable[Any], lr: float, passes: int) -> list[Tensor]:
    """Tune the whole weights of sparse units, with the adapter's other tensors, which are put back afterwards."""
    units = units_of(bank, name)
    values = [unit.values for unit in units]
    others = [t for t in bank.named_tensors(name).values() if t.requires_grad and all(t is not v for v in values)]
    before = [tensor.detach().clone() for tensor in others]
    weights = [torch.zeros(unit.site.out_features, unit.site.columns).to(unit.values) for unit in units]
    optimizer = torch.optim.AdamW([*weights, *others], lr=lr, weight_decay=0.0)
    try:
        for unit, weight in zip(units, weights, strict=True):
            unit.dense = weight
        with _alone(bank, name):
            for _ in range(passes):
                for images, targets in loader:
                    _step(bank, units, weights, others, _mean_loss(images, targets))
                    optimizer.step()
    finally:
        for unit in units:
            unit.dense = None
        with torch.no_grad():
            for tensor, kept in zip(others, before, strict=True):
                tensor.copy_(kept)
    return weights


def _mean_loss(images: Any, targets: Any) -> Callable[[Any], Tensor]:
    """Return the loss of a batch as a function of the model."""

    def loss(model: Any) -> Tensor:
        found = _loss(model(images), targets, "schedule='lt'") / len(images)
        if not math.isfinite(float(found.detach())):
            raise TrainingError(
                "Sparse(schedule='lt'): the loss is not finite while all entries are tuned. Lower dense_lr."
            )
        return found

    return loss


def _step(
    bank: Any, units: list[SparseUnit], weights: list[Tensor], others: list[Tensor], loss: Callable[[Any], Tensor]
) -> None:
    """Set the gradients of one batch."""
    found: list[Tensor | None] = []

    def run() -> None:
        inputs = [*(unit.values for unit in units), *others]
        found.extend(torch.autograd.grad(loss(bank.model), inputs, allow_unused=True)[len(units) :])

    for weight, grad in zip(weights, dense_gradients(units, run), strict=True):
        weight.grad = grad.reshape(weight.shape).to(weight.dtype)
    for tensor, grad in zip(others, found, strict=True):
        tensor.grad = grad
