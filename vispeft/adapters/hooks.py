"""Hooks of the methods on a model: further losses, changes of gradients, starts from data, and schedules.

A task and a plain loop call the same functions, as methods of `AdapterBank`:

    bank.start_from(loader)                             # once, before the first step of a fresh training
    for batch in loader:
        output = model(batch[0])
        loss = criterion(output, batch[1])
        term = bank.loss_terms(batch, output)
        (loss if term is None else loss + term).backward()
        bank.change_gradients()                         # before clipping and the optimiser's step
        optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from vispeft.core.method import Step
from vispeft.core.plan import Plan

__all__ = ["callbacks", "change_gradients", "loss_terms", "reads_result", "start_from"]


class Bank(Protocol):
    """The part of `AdapterBank` the hooks need."""

    @property
    def names(self) -> list[str]:
        """Names of all adapters."""
        ...

    @property
    def active(self) -> list[str]:
        """Names of the adapters that act."""
        ...

    @property
    def frozen(self) -> list[str]:
        """Names of the adapters that training leaves alone."""
        ...

    def plan(self, name: str | None = None) -> Plan:
        """Plan of an adapter, which knows its method."""
        ...


def loss_terms(bank: Bank, step: Step) -> Tensor | None:
    """Sum the losses that methods add to the task's own: those of the adapters that act and are not frozen.

    Args:
        bank: The bank.
        step: The step so far.

    Returns:
        A scalar with a gradient; None where no method adds a loss.
    """
    acting = [name for name in bank.active if name not in bank.frozen]
    terms = [bank.plan(name).method.loss_term(bank, name, step) for name in acting]
    given = [term for term in terms if term is not None]
    return sum(given[1:], start=given[0]) if given else None


def change_gradients(bank: Bank) -> None:
    """Let methods change the gradients of a step, after the backward pass and before clipping and the optimiser.

    Args:
        bank: The bank.
    """
    for name in _trained(bank):
        bank.plan(name).method.change_gradients(bank, name)


def start_from(bank: Bank, loader: Iterable[Any]) -> None:
    """Let methods compute start values from the training data.

    Args:
        bank: The bank.
        loader: Batches as the training steps get them, on the model's device; it may be iterated over repeatedly.
    """
    for name in _trained(bank):
        bank.plan(name).method.start_from(bank, name, loader)


def callbacks(bank: Bank) -> list[Any]:
    """Collect the schedules of the methods.

    Args:
        bank: The bank.

    Returns:
        Lightning callbacks, in the order of the adapters.
    """
    return [callback for name in _trained(bank) for callback in bank.plan(name).method.callbacks()]


def reads_result(bank: Bank) -> bool:
    """Whether the loss of a method needs the run result of the model's forward pass.

    Args:
        bank: The bank.
    """
    return any(bank.plan(name).method.reads_result for name in _trained(bank))


def _trained(bank: Bank) -> list[str]:
    """Names of the adapters that train, whichever of them act."""
    return [name for name in bank.names if name not in bank.frozen]
