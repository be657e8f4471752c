"""Semantic proxies: a second pass of the backbone with prompts of the classes makes the proxies of a loss (VPTSP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispeft.proxies.class_prompts import BankedPrompts, ClassPrompts, ClassTokens
from vispeft.proxies.integrators import GatedIntegrator, Integrator, MomentumIntegrator
from vispeft.proxies.losses import Pull, proxy_loss

__all__ = ["Proxies", "ProxySettings", "SemanticProxies"]

SHRINK = 8
"""Divisor of the start values of the learned proxies (public code)."""


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """Settings of `SemanticProxies`; `vispeft.VPTSP` describes them."""

    counts: tuple[int, ...]
    """Class prompts that each of the first blocks uses."""
    length: int
    """Class prompts that each of these blocks has."""
    integrator: Literal["gru_relu", "gru", "momentum"]
    keep: float
    dropout: float
    learned: float
    """Share of the learned proxies."""
    kind: Literal["anchor", "nca"]
    against: Literal["all", "batch"]
    alpha: float
    margin: float
    pull: Pull
    bank: bool


class Proxies(NamedTuple):
    """Proxies of one batch, and the values they were made of."""

    all: Tensor
    """Of all classes (C, d), of any length."""
    batch: Tensor
    """Of the classes in the batch (U, d), of length one."""
    classes: Tensor
    """These classes, rising (U)."""
    owners: Tensor
    """Row of `classes` of each sample (B)."""
    vectors: Tensor
    """Vectors of the samples from the second pass (B, d), of length one."""
    folded: Tensor
    """New state of the classes in the batch (U, d), not normalised."""
    state: Tensor
    """New state of all classes (C, d), of length one."""


class SemanticProxies(nn.Module):
    """The criterion of VPTSP: proxies from class prompts, and the loss of the embeddings against them.

    The images of a batch pass the backbone a second time, each with the prompts of its class and without those of the
    adapter. An own head and the integrator fold the result into the running state of the class; a proxy is
    ``a O + (1 - a) state`` with learned rows O. The state is a buffer, so a checkpoint has it.

    Source: Ren et al., ICLR 2024, arXiv 2402.02340, and its public code, Noahsark/ParameterEfficient-DML at c7c9416.
    """

    proxy_tensors = ("offsets",)
    """Parameters that the proxies' learning rate is for."""

    def __init__(self, model: nn.Module, head: nn.Module, classes: int, dim: int, settings: ProxySettings) -> None:
        """Allocate the parts.

        Args:
            model: The adapted backbone; it is not a child of this module.
            head: Head of the second pass, from (B, D) to (B, d).
            classes: Number of training classes C.
            dim: Width of the embeddings d.
            settings: The settings.
        """
        super().__init__()
        self._model = (model,)  # in a tuple, so that its tensors are not counted and saved as this module's
        self.settings, self.head, self.integrator = settings, head, _integrator(settings, dim)
        width = int(model.embed_dim)  # type: ignore[arg-type]  # timm's
        kind = BankedPrompts if settings.bank else ClassPrompts
        self.prompts = kind(settings.counts, (classes, settings.length, width)) if settings.counts else None
        self.offsets = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, dim)) / SHRINK)
        self.register_buffer("state", F.normalize(nn.init.xavier_uniform_(torch.empty(classes, dim)), dim=1))
        self.state: Tensor

    @property
    def trainable(self) -> int:
        """Number of trained values, those of a bank included."""
        own = sum(p.numel() for name, p in self.named_parameters() if name != "prompts.batch")
        return own + (0 if self.prompts is None else self.prompts.elsewhere)

    @property
    def steps_each_batch(self) -> bool:
        """Whether the optimiser has to step after every batch, as prompts in host memory need it."""
        return isinstance(self.prompts, BankedPrompts)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Let class prompts in host memory follow an optimiser; without effect on others.

        Args:
            optimizer: The optimiser.
        """
        if isinstance(self.prompts, BankedPrompts):
            self.prompts.watch(optimizer)

    def forward(self, embeddings: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """Compute the loss, and keep the new state of the classes while training.

        Args:
            embeddings: Embeddings of the first pass (B, d).
            labels: Training classes, int64 (B).
            images: The images of the batch (B, 3, H, W).

        Returns:
            A scalar.
        """
        made = self.make(images, labels)
        if self.training:
            with torch.no_grad():
                self.state.copy_(made.state)
        chosen = self.settings
        inside = chosen.against == "batch"
        return proxy_loss(
            embeddings,
            made.batch if inside else made.all,
            made.owners if inside else labels,
            kind=chosen.kind,
            alpha=chosen.alpha,
            margin=chosen.margin,
            pull=chosen.pull,
        )

    def make(self, images: Tensor, labels: Tensor) -> Proxies:
        """Compute the proxies of a batch; the state stays as it is.

        Args:
            images: (B, 3, H, W).
            labels: int64 (B).
        """
        classes, owners = labels.unique(return_inverse=True)
        features = self._features(images, classes, owners)
        with torch.autocast(images.device.type, enabled=False):
            vectors = F.normalize(self.head(features.to(self.offsets.dtype)), dim=1)
            folded = self.integrator(self.state[classes], vectors, owners)
            state = F.normalize(self.state.index_copy(0, classes, folded), dim=1)
            share = self.settings.learned
            every = share * self.offsets + (1 - share) * state
            batch = F.normalize(share * self.offsets[classes] + (1 - share) * folded, dim=1)
        return Proxies(every, batch, classes, owners, vectors, folded, state)

    def _features(self, images: Tensor, classes: Tensor, owners: Tensor) -> Tensor:
        """Run the second pass, and return its class tokens (B, D)."""
        model: Any = self._model[0]
        units = []
        if self.prompts is not None:
            units = [ClassTokens(self.prompts.rows(classes)[owners], self.settings.counts)]
        result = model.run(images, units, instead=True)
        tokens: Tensor = model.features(result)[:, 0]
        return tokens


def _integrator(settings: ProxySettings, dim: int) -> Integrator:
    if settings.integrator == "momentum":
        return MomentumIntegrator(settings.keep)
    return GatedIntegrator(dim, "relu" if settings.integrator == "gru_relu" else "tanh", settings.dropout)
