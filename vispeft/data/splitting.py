"""Drawing splits and folds: stratified, from a seed, disjoint."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vispeft.data.randomness import draw_seed
from vispeft.errors import ConfigError

__all__ = ["check_drawing", "cross_validation", "hold_out", "share_of_rest"]

BINS = 10
"""Numbers are put into at most so many bins of equal count, so that each split sees small and large ones."""


def check_drawing(name: str, *, validation: float, test: float, split_seed: int, folds: int | None, fold: int) -> None:
    """Check the settings that say how splits are drawn.

    Args:
        name: The data module, for messages.
        validation: Share of the images that chooses the best epoch.
        test: Share that is looked at once.
        split_seed: Seed of the splits.
        folds: Number of folds, or None.
        fold: Which of them is tested.

    Raises:
        ConfigError: If one of them cannot work.
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
    """Turn a share of all images into one of those that the test images leave.

    Args:
        validation: Share of all images that chooses the best epoch.
        test: Share that is taken already, a fold's included.

    Returns:
        The share; half, where not even one image would be left to train on, as with two folds and a share of a half.
    """
    return validation / (1 - test) if validation + test < 1 else 0.5


def hold_out(targets: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw a share of the images, the same share of every class up to one image.

    A class with a single image is never held out. (scikit-learn's stratified splits refuse such classes, and targets
    with several labels.)

    Args:
        targets: Labels (N,), or several labels or numbers per image (N, C).
        share: Share that is held out, from 0 to 1.
        seed: Seed of the draw.

    Returns:
        Indices of the rest and of what was held out, each sorted.
    """
    groups = strata(targets)
    _, which, counts = groups.unique(return_inverse=True, return_counts=True)
    order, start = _shuffled(groups, seed)
    order = order[counts[which][order] > 1]
    # Walking through the images class by class, one is taken whenever another 1 / share of them has been passed: that
    # is the right number of every class and of all, to within one image.
    passed = (torch.arange(len(order) + 1, dtype=torch.float64) * share + start).floor()
    chosen = torch.zeros(len(groups), dtype=torch.bool)
    chosen[order[passed[1:] > passed[:-1]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def cross_validation(targets: Tensor, folds: int, fold: int, seed: int) -> tuple[Tensor, Tensor]:
    """Take one of several disjoint folds that together hold every image, each with its share of every class.

    Args:
        targets: Labels (N,), or several labels or numbers per image (N, C).
        folds: Number of folds.
        fold: Which of them, from 0.
        seed: Seed of the draw, the same for all folds.

    Returns:
        Indices of the rest and of the fold, each sorted.
    """
    order, _ = _shuffled(strata(targets), seed)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[fold::folds]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _shuffled(groups: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Order images by group, and at random inside a group; with a random number from 0 to 1 beside it."""
    generator = torch.Generator().manual_seed(draw_seed(seed))
    shuffle = torch.randperm(len(groups), generator=generator)
    return shuffle[groups[shuffle].argsort(stable=True)], torch.rand((), generator=generator, dtype=torch.float64)


def strata(targets: Tensor) -> Tensor:
    """Put images into groups that every split should have in the same proportion.

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
