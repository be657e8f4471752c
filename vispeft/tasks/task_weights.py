"""Weights of several tasks in one loss: fixed, learned from uncertainty, or by how fast each loss falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from vispeft.data.dense_targets import DenseTarget
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.tasks.gathering import gather

__all__ = ["PUBLISHED_WEIGHTS", "AveragedWeights", "TaskWeights", "UncertaintyWeights", "WeightRule", "task_weights"]

WeightRule = Literal["fixed", "uncertainty", "average"]
"""Rule of the weights: `TaskWeights`, `UncertaintyWeights`, `AveragedWeights`."""

PUBLISHED_WEIGHTS = {"semseg": 1.0, "human_parts": 2.0, "sal": 5.0, "edge": 50.0, "normals": 10.0, "depth": 1.0}
"""Weights by the name of the task, of Vandenhende et al. (arXiv 2004.13379) and MTLoRA (arXiv 2403.20320)."""


class TaskWeights(nn.Module):
    """Fixed weights: the total loss is the sum of weight times loss over the tasks of a step.

    Example:
        >>> weights = TaskWeights({"semseg": semseg, "sal": sal})
        >>> weights({"semseg": loss, "sal": other}).backward()
    """

    DEFAULTS: ClassVar[Mapping[str, float]] = PUBLISHED_WEIGHTS
    """Weights of tasks for which none is given, by name; one for others."""

    def __init__(self, targets: Mapping[str, DenseTarget], weights: Mapping[str, float] | None = None) -> None:
        """Check and store the weights.

        Args:
            targets: Descriptions of the tasks, by name.
            weights: Weight of some or all tasks, by name. Others have the published weight of their name, or one if
                there is none.

        Raises:
            UnknownNameError: If a weight is given for a task that is not among the targets.
            ConfigError: If there is no task, a weight is negative or not finite, or all are zero.
        """
        super().__init__()
        given = dict(weights or {})
        for name in given:
            if name not in targets:
                raise UnknownNameError("task", name, targets, "A weight was given for it.")
        self.targets = dict(targets)
        self.weights = {name: float(given.get(name, self.DEFAULTS.get(name, 1.0))) for name in targets}
        if not all(math.isfinite(w) and w >= 0 for w in self.weights.values()) or not sum(self.weights.values()):
            raise ConfigError(
                f"{type(self).__name__} got the tasks {list(targets)} with the weights {self.weights}; finite weights "
                "from 0 on are needed, at least one above 0."
            )

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Compute the total loss, a number.

        Args:
            losses: Loss of each task of the step, by name; all tasks or some.

        Raises:
            UnknownNameError: If one of the tasks is not among the targets.
            ConfigError: If there is no loss.
        """
        for name in losses:
            if name not in self.targets:
                raise UnknownNameError("task", name, self.targets, "A loss was given for it.")
        if not losses:
            raise ConfigError(f"A total loss of the tasks {list(self.targets)} was asked for, and no loss was given.")
        return torch.stack([self.term(name, loss) for name, loss in losses.items()]).sum()

    def term(self, name: str, loss: Tensor) -> Tensor:
        """Compute what a task adds to the total.

        Args:
            name: Name of the task.
            loss: Its loss, a number.
        """
        return self.weights[name] * loss

    def factors(self) -> dict[str, float]:
        """Return the factor of each task's loss at present, by name."""
        return dict(self.weights)

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Take note of the losses of a training step, for rules that need them.

        Args:
            losses: Loss of each task, before it is weighted, by name.
        """

    def end_epoch(self) -> None:
        """Compute the weights of the next epoch, for rules that have others in every epoch."""


class UncertaintyWeights(TaskWeights):
    """Weights learned as the uncertainty of each task (Kendall, Gal and Cipolla, CVPR 2018, arXiv 1705.07115).

    With s = log of the variance, a trainable number that starts at zero, a task adds ``exp(-s) loss + s / 2`` if it
    classifies (classes, saliency, edges) and ``exp(-s) loss / 2 + s / 2`` if it predicts numbers (normals, depth,
    values): equation 10, with the paper's s for stability. Weights, if given, multiply the losses first.

    A loss of exactly zero, as of a batch without a labelled pixel, or of a task whose weight is zero, adds nothing: s
    would fall without a reason.

    `log_variances` need the task's optimiser, without weight decay.
    """

    DEFAULTS: ClassVar[Mapping[str, float]] = {}  # the variance takes the place of a published weight

    def __init__(self, targets: Mapping[str, DenseTarget], weights: Mapping[str, float] | None = None) -> None:
        """Create the variances, all of them one.

        Args:
            targets: Descriptions of the tasks, by name.
            weights: Factor of some tasks' losses, by name; one for the others.

        Raises:
            UnknownNameError: If a weight is given for a task that is not among the targets.
            ConfigError: If there is no task, a weight is negative or not finite, or all are zero.
        """
        super().__init__(targets, weights)
        self.log_variances = nn.Parameter(torch.zeros(len(self.targets)))

    def term(self, name: str, loss: Tensor) -> Tensor:
        """Compute what a task adds to the total.

        Args:
            name: Name of the task.
            loss: Its loss, a number.
        """
        s = self.log_variances[list(self.targets).index(name)]
        scaled = self._scale(name) * loss
        return ((-s).exp() * scaled + s / 2).where(scaled != 0, 0)

    def factors(self) -> dict[str, float]:
        """Return the factor of each task's loss at present, by name."""
        precisions = (-self.log_variances.detach()).exp().tolist()
        return {name: self._scale(name) * found for name, found in zip(self.targets, precisions, strict=True)}

    def _scale(self, name: str) -> float:
        return self.weights[name] * (1.0 if self.targets[name].kind in ("classes", "saliency", "edge") else 0.5)


class AveragedWeights(TaskWeights):
    """Dynamic weight average: tasks whose loss falls slowly weigh more (Liu, Johns and Davison, CVPR 2019).

    arXiv 1803.10704, equation 7, with the mean losses L of the last two epochs, K tasks and a temperature of two:
    ``K * softmax(r / 2)`` of the ratios r = L(last) / L(last but one). In the first two epochs all ratios are one, and
    so are the weights. Weights, if given, multiply the losses further.

    The caller gives the losses of every training step to `observe` and calls `end_epoch`. All numbers are buffers, so a
    checkpoint holds them. Losses of exactly zero, as of batches without a labelled pixel, are left out of the means.
    """

    DEFAULTS: ClassVar[Mapping[str, float]] = {}  # the average takes the place of a published weight
    TEMPERATURE = 2.0
    """Temperature of the softmax; larger ones make the weights more equal (the paper takes two)."""

    sums: Tensor
    steps: Tensor
    means: Tensor

    def __init__(self, targets: Mapping[str, DenseTarget], weights: Mapping[str, float] | None = None) -> None:
        """Create the weights, all of them one.

        Args:
            targets: Descriptions of the tasks, by name.
            weights: Factor of some tasks' losses, by name; one for the others.

        Raises:
            UnknownNameError: If a weight is given for a task that is not among the targets.
            ConfigError: If there is no task, a weight is negative or not finite, or all are zero.
        """
        super().__init__(targets, weights)
        self.register_buffer("sums", torch.zeros(len(self.targets)))
        self.register_buffer("steps", torch.zeros(len(self.targets), dtype=torch.long))
        self.register_buffer("means", torch.zeros(2, len(self.targets)))  # of the last epoch and of the one before

    def term(self, name: str, loss: Tensor) -> Tensor:
        """Compute what a task adds to the total.

        Args:
            name: Name of the task.
            loss: Its loss, a number.
        """
        return self.weights[name] * self._shares()[list(self.targets).index(name)] * loss

    def factors(self) -> dict[str, float]:
        """Return the factor of each task's loss at present, by name."""
        shares = self._shares().tolist()
        return {name: self.weights[name] * share for name, share in zip(self.targets, shares, strict=True)}

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a training step to the epoch's means.

        Args:
            losses: Loss of each task, before it is weighted, by name.
        """
        names = [name for name in self.targets if name in losses]
        if not names:
            return
        # One that is not finite says nothing of a task's speed. Several processes weigh tasks alike, by all losses.
        found = gather(torch.stack([losses[name].nan_to_num(0, 0, 0) for name in names])[None])
        for name, loss in zip(names, found.sum(0) / (found != 0).sum(0).clamp_min(1), strict=True):
            index = list(self.targets).index(name)
            self.sums[index] += loss
            self.steps[index] += loss != 0

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Compute the weights of the next epoch; a task without a loss in this epoch keeps its ratio."""
        seen = self.steps > 0
        means = torch.stack([self.sums / self.steps.clamp_min(1), self.means[0]])
        self.means.copy_(means.where(seen, self.means))
        self.sums.zero_()
        self.steps.zero_()

    def _shares(self) -> Tensor:
        """Compute the weights (K,), whose sum is K."""
        last, before = self.means
        ratios = torch.where(before > 0, last / before, 1)
        return len(ratios) * (ratios / self.TEMPERATURE).softmax(0)


def task_weights(
    targets: Mapping[str, DenseTarget], rule: WeightRule = "fixed", weights: Mapping[str, float] | None = None
) -> TaskWeights:
    """Create weights of tasks by their rule.

    Args:
        targets: Descriptions of the tasks, by name.
        rule: ``fixed``, ``uncertainty`` (learned variances), or ``average`` (dynamic weight average).
        weights: Weight of some tasks, by name.

    Raises:
        UnknownNameError: If there is no such rule, or a weight is given for a task that is not among the targets.
        ConfigError: If there is no task, a weight is negative or not finite, or all are zero.
    """
    rules = dict(zip(get_args(WeightRule), (TaskWeights, UncertaintyWeights, AveragedWeights), strict=True))
    if rule not in rules:
        raise UnknownNameError("rule of task weights", rule, rules)
    return rules[rule](targets, weights)
