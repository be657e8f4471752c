"""Integrators: how the vectors of a batch change the running state of their classes.

Formulas follow the public code of VPTSP, Noahsark/ParameterEfficient-DML at c7c9416.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GatedIntegrator", "Integrator", "MomentumIntegrator"]


class Integrator(nn.Module, ABC):
    """Folds the vectors of a batch into the running state of their classes."""

    @abstractmethod
    def forward(self, state: Tensor, vectors: Tensor, owners: Tensor) -> Tensor:
        """Compute the new state of the classes in a batch.

        Args:
            state: State of these classes (U, d).
            vectors: Vectors of the samples (B, d).
            owners: Row of `state` of each sample, int64 (B).

        Returns:
            (U, d), not normalised.
        """


class MomentumIntegrator(Integrator):
    """Moving average (VPTSP-M): ``h' = keep h + (1 - keep) mean of the class in the batch``."""

    def __init__(self, keep: float) -> None:
        """Store the share that is kept.

        Args:
            keep: From 0 up to below 1; 0.8 in the public code.
        """
        super().__init__()
        self.keep = keep

    def forward(self, state: Tensor, vectors: Tensor, owners: Tensor) -> Tensor:
        """Compute the average of the old state and the mean of each class."""
        sums = torch.zeros_like(state).index_add(0, owners, vectors)
        counts = torch.bincount(owners, minlength=len(state)).to(state)
        return self.keep * state + (1 - self.keep) * sums / counts.unsqueeze(1)


class GatedIntegrator(Integrator):
    """Gated recurrent unit over the samples of a class in the order of the batch (VPTSP-G).

    ``z = sigmoid(p W_iz + h W_hz + b_iz)``, ``r = sigmoid(p W_ir + h W_hr + b_ir)``,
    ``n = act(p W_in + r * (h W_hn) + b_in)``, ``h' = (1 - z) * n + z * h``, with dropout behind. The released
    configurations have a ReLU as ``act``, and a standard unit has a tanh. ``W_ia`` is not used: the public code has it
    too, and its parameter counts include it.
    """

    def __init__(self, dim: int, candidate: str, dropout: float) -> None:
        """Allocate the matrices, Xavier-uniform, and biases of zero.

        Args:
            dim: Width of the vectors and of the state.
            candidate: ``relu`` or ``tanh``.
            dropout: Share of the state's entries that are dropped behind each step while training.
        """
        super().__init__()
        self.act = {"relu": F.relu, "tanh": torch.tanh}[candidate]
        self.dropout = dropout
        for name in ("W_ir", "W_hr", "W_iz", "W_hz", "W_in", "W_hn"):
            self.register_parameter(name, nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim))))
        self.W_ia = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, 1)))
        for name in ("b_ir", "b_iz", "b_in"):
            self.register_parameter(name, nn.Parameter(torch.zeros(dim)))

    def step(self, vectors: Tensor, state: Tensor) -> Tensor:
        """Run the unit once.

        Args:
            vectors: (N, d).
            state: (N, d).
        """
        keep = torch.sigmoid(vectors @ self.W_iz + state @ self.W_hz + self.b_iz)
        reset = torch.sigmoid(vectors @ self.W_ir + state @ self.W_hr + self.b_ir)
        new = self.act(vectors @ self.W_in + reset * (state @ self.W_hn) + self.b_in)
        return F.dropout((1 - keep) * new + keep * state, self.dropout, self.training)

    def forward(self, state: Tensor, vectors: Tensor, owners: Tensor) -> Tensor:
        """Run the unit over the samples of each class in turn; a class with more samples takes more steps."""
        turns = _turns(owners, len(state))
        for turn in range(int(turns.max()) + 1):
            now = (turns == turn).nonzero().flatten()
            rows = owners[now]
            state = state.index_copy(0, rows, self.step(vectors[now], state[rows]))
        return state


def _turns(owners: Tensor, count: int) -> Tensor:
    """Count, for each sample, the samples of its class before it in the batch (B)."""
    before = F.one_hot(owners, count).cumsum(0)
    return before.gather(1, owners.unsqueeze(1)).squeeze(1) - 1
