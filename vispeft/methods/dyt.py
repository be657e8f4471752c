"""DyT: adapters beside the MLPs, which tokens may skip (Zhao et al., NeurIPS 2024, arXiv 2403.11808).

Formulas follow the public code, NUS-HPC-AI-Lab/Dynamic-Tuning at d1744f0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.method import PlanItem, Step, register
from vispeft.core.sites import View
from vispeft.errors import ConfigError
from vispeft.hosts.functional import linear
from vispeft.methods.adapter import Bottleneck, ParallelBottleneck
from vispeft.methods.adaptformer import AdaptFormer

__all__ = ["DyT", "DyTUnit", "are_classes"]

TAU, SPREAD = 5.0, 0.02
"""Temperature of the noisy decision and standard deviation of the dispatcher's start (public code)."""


class DyTUnit(ParallelBottleneck):
    """A bottleneck beside the MLP for all tokens, and a dispatcher: patch tokens with ``w . y + b > 0`` pass the MLP.

    The gradient of a decision is that of its sigmoid (straight-through). In training, noise and a temperature are put
    on it: ``sigmoid((w . y + b + G1 - G2) / 5)`` with Gumbel noise.
    """

    skips, needs_grid = True, True

    def __init__(self, method: DyT, shape: Bottleneck, unread: bool) -> None:
        """Allocate the tensors.

        Args:
            method: The configuration.
            shape: The bottleneck's configuration.
            unread: Whether no patch token behind it reaches the classifier.
        """
        super().__init__(shape, "mlp", "stream")
        self.identity_at_start, self.method = False, method
        self.zero_gradient = frozenset({"gate", "gate_bias"} if unread else ())
        self.gate = nn.Parameter(torch.empty(1, shape.width))
        self.gate_bias = nn.Parameter(torch.empty(1))

    def reset(self, generator: Generator) -> None:
        """Draw the dispatcher from a truncated normal; the rest as the bottleneck does."""
        super().reset(generator)
        nn.init.trunc_normal_(self.gate, std=SPREAD, generator=generator)
        self.gate_bias.fill_(self.method.start_bias)

    def passes(self, x: Tensor, prefix: int) -> Tensor:
        """Decide which tokens pass; prefix tokens always do."""
        logits = linear(x[:, prefix:], self.gate, self.gate_bias)
        share = ((logits + self.noise(logits)) / TAU if self.training else logits).sigmoid()
        passed = (share > 0.5).to(share.dtype) + (share - share.detach())
        return torch.cat([torch.ones_like(x[:, :prefix, ..., :1]), passed.to(x.dtype)], dim=1)

    def noise(self, logits: Tensor) -> Tensor:
        """Draw the difference of two Gumbel variables, which is a logistic one, in the shape of the logits."""
        return self.method.noise * torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).logit()


@register
@dataclass(frozen=True, kw_only=True)
class DyT(AdaptFormer):
    """AdaptFormer's bottlenecks beside the MLPs, and a dispatcher in each block by which patch tokens skip the MLP.

    In prediction (without gradients, in eager mode) the MLP is computed for the chosen tokens alone. Training
    computes all MLPs, and by default a second pass in which no token skips. Graphs of `torch.compile` and exported
    models compute all MLPs too, with equal results. Two such adapters at once: a token passes where both let it. On
    Swin the pixels of a map skip alike (form of this project). It does not start at the identity: about half of the
    tokens skip from the first step on, unless `start_bias` is high. The public code has 16 hidden channels for
    VTAB-1k.
    """

    target: float = 0.5
    """Share of patch tokens that pass, mean over images and blocks (VTAB-1k)."""
    rate_weight: float = 2.0
    """Weight of ``(share - target)^2`` in the loss."""
    complete: bool = True
    """Whether the loss has a pass without skipping, for class scores: its cross-entropy, and the divergence of the
    scores with skipping from its scores."""
    noise: float = 1.0
    """Multiplier of the noise on decisions in training; 0 for none."""
    start_bias: float = 0.0
    """Start of the dispatchers' biases; with 5 nearly all tokens pass at first."""

    name: ClassVar[str] = "dyt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.11808"
    reads_result: ClassVar[bool] = True
    training_fields: ClassVar[frozenset[str]] = frozenset({"target", "rate_weight", "complete", "noise", "start_bias"})

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if not (0 < self.target <= 1 and self.rate_weight >= 0 and self.noise >= 0):
            raise ConfigError(
                f"DyT(target={self.target}, rate_weight={self.rate_weight}, noise={self.noise}): a share above 0 and "
                "at most 1, and factors of at least 0, are needed."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one adapter with its dispatcher at each block."""
        for site in view.blocks_of(self.sites(view)):
            unread = view.global_pool == "token" and site.block == view.depth - 1
            yield PlanItem(site, "dyt", partial(DyTUnit, self, self.shape(site.out_features), unread))

    def parameter_count(self, view: View) -> int:
        """Count ``2 h D + h + 2 D + 1`` per block: AdaptFormer's, and the dispatcher."""
        return super().parameter_count(view) + sum(site.out_features + 1 for site in self.sites(view))

    def loss_term(self, bank: Any, name: str, step: Step) -> Tensor:
        """Return the loss of the share of tokens that pass, and the losses of a pass without skipping."""
        shares = torch.stack([passed.float().mean() for passed in step.result.passed.values()])
        loss = self.rate_weight * (shares.mean() - self.target).square()
        if not self.complete:
            return loss
        images, labels = step.batch[0], step.batch[-1]
        if not are_classes(labels, step.output):
            raise ConfigError(
                "DyT(complete=True) computes a cross-entropy, and the targets are neither class numbers nor shares of "
                "classes that sum to 1. Set complete=False."
            )
        result = bank.model.run(images.to(step.result.tokens.dtype), whole=True)
        whole = bank.model.forward_head(bank.model.features(result)).float()
        distance = F.kl_div(
            step.output.log_softmax(1), whole.detach().log_softmax(1), reduction="batchmean", log_target=True
        )
        return loss + F.cross_entropy(whole, labels) + distance


def are_classes(labels: Any, scores: Any) -> bool:
    """Return whether targets are class numbers (B,), or shares of classes (B, classes) that sum to 1."""
    if not (isinstance(labels, Tensor) and isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] > 1):
        return False
    if labels.shape != scores.shape:
        return labels.ndim == 1 and labels.dtype == torch.int64
    return labels.is_floating_point() and bool(((labels.float().sum(1) - 1).abs() < 1e-3).all())
