"""IST: each step trains the adapters of a few blocks, drawn by their importance (Yao et al., arXiv 2410.11772).

Formulas and settings from the public code (antgroup/importance-aware-sparse-tuning-IST-paper at 53ab149). Its score
says how *un*important a block is: it rises where suppressing the block's adapter lowers the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from vispeft.building.known import register_class
from vispeft.core.modes import evaluating
from vispeft.errors import ConfigError, counted
from vispeft.tasks.layer_schedules import LayerSchedule
from vispeft.tasks.segmentation import Segmentation
from vispeft.tasks.supervised import SupervisedTask

__all__ = ["SampledLayers", "updated_scores"]

logger = logging.getLogger(__name__)

FEW = 8
"""Fewer blocks than this get a warning: of them, a step trains too little (measured on a toy of four blocks)."""
LARGE = 5.0
"""Losses above this are shifted to a smallest one of zero: ``exp(-5)`` leaves less than a hundredth of a reward."""
GAINS = ("selection", "weight", "input", "delta", "sequential", "affine", "parallel")
"""Kinds of units whose contribution can be suppressed."""


@register_class
class SampledLayers(LayerSchedule):
    """Train the adapters of a few blocks in each step, drawn by a score that is learned from cheap forward passes.

    A block is suppressed for a forward pass by a gain of its units. Scoring needs the loss of a task for images with
    one target; with ``uniform=True`` nothing is scored, and every task serves.
    """

    def __init__(
        self,
        share: float = 0.25,
        suppressed: float = 0.5,
        gain: float = 0.25,
        subsets: int = 3,
        every_n_steps: int = 10,
        rate: float = 10.0,
        images: int = 16,
        uniform: bool = False,
        seed: int = 0,
    ) -> None:
        """Set the schedule; the defaults are the released settings.

        Args:
            share: Share of the blocks that a step trains, rounded down, at least one.
            suppressed: Share of the blocks that one forward pass of the scoring suppresses.
            gain: What the contribution of a suppressed adapter is multiplied by.
            subsets: Distinct sets of suppressed blocks in one scoring.
            every_n_steps: Steps from one scoring to the next.
            rate: Step size of the score.
            images: Images of the step's batch that a scoring uses.
            uniform: Draw all blocks alike and never score (the paper's baseline RST).
            seed: Seed of the draws, which are the same in all processes.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__()
        for name, value in (("share", share), ("suppressed", suppressed)):
            if not 0 < value < 1:
                raise ConfigError(f"SampledLayers({name}={value}): a share between 0 and 1 is needed.")
        for name, number in (("subsets", subsets), ("every_n_steps", every_n_steps), ("images", images)):
            if not isinstance(number, int) or number < 1:
                raise ConfigError(f"SampledLayers({name}={number!r}): a whole number of at least 1 is needed.")
        self.share, self.suppressed, self.gain, self.subsets = share, suppressed, gain, subsets
        self.every_n_steps, self.rate, self.images = every_n_steps, rate, images
        self.uniform, self.seed = uniform, seed
        self.score = torch.zeros(0)
        """The score of each block, float32."""
        self._scored = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks with units.

        Raises:
            ConfigError: If there are fewer than two, or their units or the task cannot be scored.
        """
        super().on_fit_start(trainer, pl_module)
        if self.score.numel() != len(self.layers):
            self.score, self._scored = torch.zeros(len(self.layers)), 0
        if len(self.layers) < FEW:
            logger.warning(
                "SampledLayers trains %d of %s in a step; it is meant for 12 blocks and more, and long trainings.",
                self._count(self.share),
                counted(len(self.layers), "block"),
            )
        if not self.uniform:
            self._check_scoring(pl_module)

    def _check_scoring(self, task: Any) -> None:
        for _, units in self.layers:
            for key, unit in units.items():
                if unit.kind not in GAINS:
                    raise ConfigError(
                        f"SampledLayers suppresses adapters to score them, and {key} ({unit.kind}) adds rows, which "
                        "cannot be suppressed. Take another method, or uniform=True, which scores nothing."
                    )
        if not isinstance(task, SupervisedTask | Segmentation):
            raise ConfigError(
                f"SampledLayers scores blocks by the loss of images with one target each, and {type(task).__name__} "
                "has another one. Take uniform=True, which scores nothing."
            )

    def choose(self, trainer: Trainer, task: Any, batch: Any) -> tuple[int, ...]:
        """Score the blocks where it is time, and draw those of the step."""
        step = trainer.global_step
        if not self.uniform and step != self._scored and step % self.every_n_steps == 0:
            self._score_blocks(trainer, task, batch, step)
            self._scored = step  # a training that is gone on with asks for this step a second time
        return self.drawn(step, self._count(self.share), -self.score)

    def drawn(self, step: int, count: int, score: Tensor, draw: int = 0) -> tuple[int, ...]:
        """Draw distinct blocks with probabilities proportional to ``sigmoid(score)``, alike in every process.

        Args:
            step: The step of the optimiser.
            count: Number of blocks.
            score: (blocks,).
            draw: Number of the draw in this step.

        Returns:
            Rising indices among the blocks with units.
        """
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + draw)
        chances = torch.zeros_like(score) if self.uniform else score
        chances = chances.double().sigmoid().clamp_min(1e-30)
        return tuple(sorted(torch.multinomial(chances, count, generator=generator).tolist()))

    def state_dict(self) -> dict[str, Any]:
        """Return the score, and the step it was last moved in."""
        return {"score": self.score, "scored": self._scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the score of a training that goes on."""
        self.score, self._scored = state_dict["score"], state_dict["scored"]

    def _count(self, share: float) -> int:
        return max(1, int(share * len(self.layers)))

    def _score_blocks(self, trainer: Trainer, task: Any, batch: Any, step: int) -> None:
        """Measure the loss with some blocks suppressed, and move their scores."""
        sets: list[tuple[int, ...]] = []
        for draw in range(1, 100 * self.subsets):  # of few blocks there may be fewer sets
            found = self.drawn(step, self._count(self.suppressed), self.score, draw)
            sets += [] if found in sets else [found]
            if len(sets) == self.subsets:
                break
        with evaluating(task), torch.no_grad():
            losses = torch.stack([self._suppressed_loss(task, batch, layers) for layers in sets])
        losses = cast(Tensor, trainer.strategy.reduce(losses, reduce_op="mean"))
        self.score = updated_scores(self.score, losses.float().cpu(), torch.tensor(sets), self.rate)

    def _suppressed_loss(self, task: Any, batch: Any, layers: Sequence[int]) -> Tensor:
        """Compute the loss of a batch's first images while the adapters of some blocks contribute less."""
        units = [unit for layer in layers for unit in self.layers[layer][1].values()]
        before = [unit.gain for unit in units]
        try:
            for unit in units:
                own = next(unit.parameters())
                unit.gain = torch.tensor(self.gain, device=own.device, dtype=own.dtype)
            images, targets = batch[0][: self.images], batch[1][: self.images]
            return cast(Tensor, task.training_loss(task(images).float(), targets))
        finally:
            for unit, gain in zip(units, before, strict=True):
                unit.gain = gain


def updated_scores(score: Tensor, losses: Tensor, suppressed: Tensor, rate: float = 10.0) -> Tensor:
    """Move the scores by one round of scoring: ``I_i += rate * r_k * s_i (1 - s_i)`` for each set k with block i.

    ``s = sigmoid(I)`` of before the round. The reward is ``r_k = exp(-l_k) - mean exp(-l)``, as in the public code;
    where all losses are so large that rewards would vanish, the smallest one is subtracted first.

    Args:
        score: (blocks,).
        losses: The loss of each set (sets,).
        suppressed: The blocks of each set, int64 (sets, blocks suppressed).
        rate: Step size.

    Returns:
        (blocks,).
    """
    losses = losses - losses.min() if losses.min() > LARGE else losses
    gains = (-losses).exp()
    rewards = (gains - gains.mean()).to(score.dtype)
    slopes, moved = score.sigmoid() * (1 - score.sigmoid()), torch.zeros_like(score)
    for reward, layers in zip(rewards, suppressed, strict=True):
        moved[layers] += reward
    return score + rate * moved * slopes
