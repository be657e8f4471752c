"""Random splits and folds: seeded, stratified and disjoint."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vispeft.data.randomness import draw_seed
from vispeft.errors import ConfigError

__all__ = ["check_drawing", "cross_validation", "hold_out", "share_of_rest"]

BINS = 10
"""Largest number of equal-count bins for numeric targets, so each split has small and large ones."""


def check_drawing(name: str, *, validation: float, test: float, split_seed: int, folds: int | None, fold: int) -> None:
    """Validate the settings of random splits.

    Args:
        name: The data module, for messages.
        validation: Fraction of the images for selecting the best epoch.
        test: Fraction for the final test.
        split_seed: Seed of the splits.
        folds: Number of folds, or None.
        fold: Index of the fold to test.

    Raises:
        ConfigError: If one of them is invalid.
    """
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ConfigError(
            f"{name}(validation={validation}, test={test}) leaves a share of {1 - validation - test:.3g} for train; "
            "give two shares above 0 that leave something for train."
        )
    if not 0 <= split_seed < 2**32:
        raise ConfigError(f"{name}(split_seed={split_seed}): a whole number from 0, below 2**32, is needed.")
    if folds is not None and folds < 2:
        raise ConfigError(f"{name}(folds={folds}): at least 2 folds are needed, or None for a single run.")
    if not 0 <= fold < (folds or 1):
        most = f"0 to {folds - 1}" if folds else "0, because folds is not set"
        raise ConfigError(f"{name}(fold={fold}): the choice is {most}.")


def share_of_rest(validation: float, test: float) -> float:
    """Convert a fraction of all images to a fraction of the images left without the test images.

    Args:
        validation: Fraction of all images for selecting the best epoch.
        test: Fraction already taken, including a fold's.

    Returns:
        The fraction; half if no image would be left to train on, as with two folds and a fraction of a half.
    """
    return validation / (1 - test) if validation + test < 1 else 0.5


def hold_out(targets: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a fraction of the images, the same fraction of every class up to one image.

    A class with a single image is never held out. (scikit-learn's stratified splits refuse such classes, and targets
    with several labels.)

    Args:
        targets: Labels (N,), or several labels or numbers per image (N, C).
        share: Fraction to hold out, from 0 to 1.
        seed: Seed of the draw.

    Returns:
        Indices of the rest and of the held-out images, each sorted.
    """
    groups = strata(targets)
    _, which, counts = groups.unique(return_inverse=True, return_counts=True)
    order, start = _shuffled(groups, seed)
    order = order[counts[which][order] > 1]
    # Going through the images class by class, one of every 1 / share images is held out: this gives the right number
    # per class and in total, to within one image.
    passed = (torch.arange(len(order) + 1, dtype=torch.float64) * share + start).floor()
    chosen = torch.zeros(len(groups), dtype=torch.bool)
    chosen[order[passed[1:] > passed[:-1]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def cross_validation(targets: Tensor, folds: int, fold: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return one of several disjoint, stratified folds that together contain every image.

    Args:
        targets: Labels (N,), or several labels or numbers per image (N, C).
        folds: Number of folds.
        fold: Index of the fold, from 0.
        seed: Seed of the draw, the same for all folds.

    Returns:
        Indices of the rest and of the fold, each sorted.
    """
    order, _ = _shuffled(strata(targets), seed)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[fold::folds]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _shuffled(groups: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Sort images by group, randomly inside a group; also return a random offset from 0 to 1."""
    generator = torch.Generator().manual_seed(draw_seed(seed))
    shuffle = torch.randperm(len(groups), generator=generator)
    return shuffle[groups[shuffle].argsort(stable=True)], torch.rand((), generator=generator, dtype=torch.float64)


def strata(targets: Tensor) -> Tensor:
    """Assign images to groups that should have the same proportion in every split.

    Args:
        targets: Labels (N,), 0 and 1 for several labels (N, C), or numbers (N, C).

    Returns:
        Group of each image (N,): its class, its rarest label, or the bin of its first number.
    """
    if targets.ndim == 1:
        return targets.long()
    if targets.shape[1] == 0:
        return torch.zeros(len(targets), dtype=torch.long)
    if bool(((targets == 0) | (targets == 1)).all()):
        counts = targets.sum(0)
        rarity = torch.where(targets > 0, counts, torch.inf)
        return torch.where(targets.sum(1) > 0, rarity.argmin(1), -1)
    values = targets[:, 0].numpy()
    bins = min(BINS, max(1, len(values) // 5))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    return torch.from_numpy(np.digitize(values, edges))
