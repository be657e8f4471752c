"""Prompts of each class: all on the device, or in host memory with the optimiser's state of each class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vispeft.core.model_units import TokensUnit
from vispeft.errors import ConfigError

__all__ = ["BankedPrompts", "ClassPrompts", "ClassTokens", "SteppedTokens"]


ROW_BY_ROW = ("Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
"""Optimisers of ``torch.optim`` whose state has a number for each entry of a parameter, all 0 at the start. So the rows
of a class can be taken out of it and put back."""


class SteppedTokens(TokensUnit):
    """Tokens of the first blocks, whose number may differ; each block replaces those of the block before."""

    pool = "all"

    def __init__(self, counts: tuple[int, ...], length: int) -> None:
        """Store the numbers.

        Args:
            counts: Tokens of each of the first blocks; the others have none.
            length: Most tokens of a block.
        """
        super().__init__()
        self.counts, self.length = counts, length

    def own(self, block: int) -> Tensor:
        """Return the tokens that a block may use, (1 or B, length, D).

        Args:
            block: Index of a block that uses any, or of one before it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement own.")

    def tokens(self, block: int, batch: int) -> Tensor | None:
        """Return the tokens of a block, (B, count, D), or None where neither it nor the block before has any."""
        count, before = self._count(block), self._count(block - 1)
        if not count and not before:
            return None
        return self.own(block if count else block - 1)[:, :count].expand(batch, -1, -1)

    def replaces(self, block: int) -> bool:
        """Return whether a block has tokens of its own."""
        return True

    def _count(self, block: int) -> int:
        return self.counts[block] if 0 <= block < len(self.counts) else 0


class ClassTokens(SteppedTokens):
    """Prompts of one batch, picked for each image by its class."""

    def __init__(self, rows: Tensor, counts: tuple[int, ...]) -> None:
        """Store the prompts.

        Args:
            rows: (B, blocks that use any, length, D).
            counts: Prompts that each block uses.
        """
        super().__init__(counts, rows.shape[2])
        self.rows = rows

    def own(self, block: int) -> Tensor:
        """Return the prompts of a block, (B, length, D)."""
        return self.rows[:, block]


class ClassPrompts(nn.Module):
    """Prompts of all classes, a parameter (C, n, D) for each block, with an ordinary optimiser.

    They start normal with standard deviation ``sqrt(2 / (D (n + C)))``: Xavier's rule on the tensor of a block, whose
    fans mix the axis of the classes (public code). Blocks that use no prompt have some all the same, as there.
    """

    def __init__(self, counts: tuple[int, ...], shape: tuple[int, int, int]) -> None:
        """Allocate and draw the prompts.

        Args:
            counts: Prompts that each block uses.
            shape: Number of classes C, prompts of a class in a block n, and width of the backbone's tokens D.
        """
        super().__init__()
        self.used = sum(map(bool, counts))
        self.blocks = nn.ParameterList(nn.Parameter(_drawn(*shape)) for _ in counts)

    @property
    def elsewhere(self) -> int:
        """Number of trained values that are not parameters."""
        return 0

    def rows(self, classes: Tensor) -> Tensor:
        """Return the prompts of classes in the blocks that use any, (U, blocks, n, D).

        Args:
            classes: Different classes, int64 (U).
        """
        return torch.stack([prompts[classes] for prompts in list(self.blocks)[: self.used]], dim=1)


class BankedPrompts(nn.Module):
    """Prompts of very many classes in host memory; a step sees, and changes, those of its batch alone.

    The rows of a batch are copied into a small parameter (U, blocks, n, D), and so is their part of the optimiser's
    state; after the step both are copied back. So rows of absent classes keep their values: no stale momentum moves
    them, no weight decay shrinks them. The optimiser's step count is one for all classes, as in the public code: the
    first update of a class that is met late is about 3 learning rates long with AdamW. `watch` connects the optimiser.
    """

    def __init__(self, counts: tuple[int, ...], shape: tuple[int, int, int]) -> None:
        """Allocate and draw the prompts.

        Args:
            counts: Prompts that each block uses.
            shape: Number of classes C, prompts of a class in a block n, and width of the backbone's tokens D.
        """
        super().__init__()
        classes, length, width = shape
        self.used = sum(map(bool, counts))
        self.bank = torch.empty(classes, len(counts), length, width)
        for block in range(len(counts)):
            self.bank[:, block] = _drawn(*shape)
        self.moments: dict[str, Tensor] = {}
        self.present: Tensor | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.batch = nn.Parameter(torch.empty(0, self.used, length, width))

    @property
    def elsewhere(self) -> int:
        """Number of trained values that are not parameters."""
        return self.bank.numel()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state that an optimiser has for each class.

        Args:
            optimizer: The optimiser that trains `batch`.

        Raises:
            ConfigError: If it does not train it, or its state cannot be kept row by row.
        """
        if not isinstance(optimizer, tuple(getattr(torch.optim, name) for name in ROW_BY_ROW)):
            raise ConfigError(
                f"{type(optimizer).__name__} keeps a state that cannot be taken apart by classes, as class prompts in "
                f"host memory need it. Choose {', '.join(ROW_BY_ROW)}, or keep them on the device (bank=False)."
            )
        if not any(p is self.batch for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError(
                "The optimiser does not train the class prompts. Give it the parameters of the criterion too."
            )
        self.optimizer = optimizer
        optimizer.register_step_post_hook(lambda *_: self.store())

    def rows(self, classes: Tensor) -> Tensor:
        """Copy the prompts of classes to the device, with their optimiser state, and return them (U, blocks, n, D).

        Args:
            classes: Different classes, int64 (U).
        """
        if not self.training or not torch.is_grad_enabled():
            return self._own[classes.cpu()].to(self.batch)
        if self.optimizer is None:
            raise ConfigError("Class prompts in host memory train only after watch(optimizer) was called.")
        self.present = classes.cpu()
        self.batch.data = self._own[self.present].to(self.batch)
        self.batch.grad = None
        state = self.optimizer.state.get(self.batch, {})
        for name, moment in self.moments.items():
            state[name] = moment[self.present].to(self.batch)
        return self.batch

    @torch.no_grad()
    def store(self) -> None:
        """Copy the rows of the last batch back, with their optimiser state."""
        if self.present is None or self.optimizer is None:
            return
        self._own[self.present] = self.batch.detach().to(self.bank)
        for name, value in self.optimizer.state.get(self.batch, {}).items():
            if isinstance(value, Tensor) and value.shape == self.batch.shape:
                moment = self.moments.setdefault(name, torch.zeros_like(self._own))
                moment[self.present] = value.to(moment)
        self.present = None

    @property
    def _own(self) -> Tensor:
        """The prompts of the blocks that use any (C, blocks, n, D), a view."""
        return self.bank[:, : self.used]

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the rows of the last batch: those of all classes and their moments."""
        return {"bank": self.bank, "moments": dict(self.moments), "present": len(self.batch)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take these from a checkpoint.

        Args:
            state: The result of `get_extra_state`.

        Raises:
            ConfigError: If it belongs to other classes or prompts.
        """
        if state["bank"].shape != self.bank.shape:
            raise ConfigError(
                f"The checkpoint has class prompts of shape {tuple(state['bank'].shape)}, and this criterion needs "
                f"{tuple(self.bank.shape)} (classes, blocks, prompts, width)."
            )
        self.bank, self.moments = state["bank"].clone(), {k: v.clone() for k, v in state["moments"].items()}
        if len(self.batch) != state["present"]:
            self._fit(state["present"])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Give the rows of a batch the number that the checkpoint has, which depends on its last batch."""
        if (rows := state_dict.get(f"{prefix}batch")) is not None and rows.shape[1:] == self.batch.shape[1:]:
            self._fit(len(rows))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _fit(self, rows: int) -> None:
        self.batch.data = self.batch.data.new_zeros(rows, *self.batch.shape[1:])


def _drawn(classes: int, length: int, width: int) -> Tensor:
    return torch.empty(classes, length, width).normal_(0, math.sqrt(2 / (width * (length + classes))))
