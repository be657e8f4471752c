"""Hooks of the methods on a model: extra losses, changes of gradients, initialisation from data, and schedules.

A task and a plain loop call the same functions:

    bank.start_from(loader)                             # once, before the first step of a new training run
    for batch in loader:
        output = model(batch[0])
        loss = criterion(output, batch[1])
        term = bank.loss_terms(batch, output)
        (loss if term is None else loss + term).backward()
        bank.change_gradients()                         # before clipping and the optimiser step
        optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from vispeft.adapters.holder import BankState
from vispeft.core.method import Method, Step
from vispeft.errors import ConfigError

__all__ = ["HookBank"]


class HookBank(BankState):
    """The hooks of a bank."""

    def loss_terms(self, batch: Any, output: Any, result: Any = None) -> Tensor | None:
        """Sum the losses that the methods of acting adapters add to the task's loss.

        Args:
            batch: The batch of the step.
            output: The model's output for it.
            result: Run result of the forward pass, if a method needs it (`reads_result`).

        Returns:
            A scalar with a gradient; None if no method adds a loss.

        Raises:
            ConfigError: If a method needs the run result, and none is given.
        """
        if result is None and self.reads_result():
            raise ConfigError(
                "A method reads the run result of the model for its loss. Give it: result = model.run(images); "
                "output = model.forward_head(model.features(result)); bank.loss_terms(batch, output, result)."
            )
        step, acting = Step(batch, output, result), set(self.active)
        terms = [method.loss_term(self, name, step) for name, method in self._training() if name in acting]
        given = [term for term in terms if term is not None]
        return sum(given[1:], start=given[0]) if given else None

    def reads_result(self) -> bool:
        """Return whether the loss of an acting method needs the run result of the model's forward pass."""
        acting = set(self.active)
        return any(method.reads_result for name, method in self._training() if name in acting)

    def change_gradients(self) -> None:
        """Let methods modify gradients; call after the backward pass, before clipping and the optimiser step."""
        for name, method in self._training():
            method.change_gradients(self, name)

    def start_from(self, loader: Iterable[Any]) -> None:
        """Let methods initialise adapters from data; call once, before the first step of a new training run.

        Args:
            loader: Training batches on the model's device; may be iterated over several times.
        """
        for name, method in self._training():
            method.start_from(self, name, loader)

    def callbacks(self) -> list[Any]:
        """Collect the schedules of the methods, as Lightning callbacks, in the order of the adapters."""
        return [callback for _, method in self._training() for callback in method.callbacks()]

    def _training(self) -> Iterator[tuple[str, Method]]:
        """Iterate over the adapters that are not frozen, each with its method."""
        for name, entry in self._entries.items():
            if not entry.frozen:
                yield name, entry.method
