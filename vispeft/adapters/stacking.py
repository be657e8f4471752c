"""Several adapters at once: a stack with weights, and the exchange of one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vispeft.adapters.training import TrainingBank
from vispeft.core.route import Route
from vispeft.errors import ConfigError

__all__ = ["StackBank", "check_weights"]


def check_weights(asked: str, names: Sequence[str], weights: Any) -> tuple[float, ...]:
    """Check a list of weights.

    Args:
        asked: The call they were given to, for the message.
        names: The adapters they belong to.
        weights: The weights.

    Returns:
        One number for each adapter.

    Raises:
        ConfigError: If they are of another number than the adapters, or one is no finite number.
    """
    given = list(weights) if isinstance(weights, Sequence) and not isinstance(weights, str) else [weights]
    if len(given) != len(names):
        raise ConfigError(
            f"{asked}: {len(given)} weights were given for {len(names)} adapters ({', '.join(names)}). Give one for "
            "each, in their order."
        )
    for weight in given:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"{asked}: a weight is {weight!r}; a finite number is needed.")
    return tuple(float(weight) for weight in given)


class StackBank(TrainingBank):
    """Adapters that act together."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each adapter that acts, in the order in which they act."""
        present = self._routing.present()
        return dict(zip(present.names, present.weights or (1.0,) * len(present.names), strict=True))

    def stack(
        self,
        names: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        freeze_lower: bool = False,
        task: str | None = None,
    ) -> None:
        """Let several adapters act at once, as the default for every thread's next forward pass.

        Low-rank terms and other additive changes are added, each multiplied by its weight: ``W + sum_j c_j D_j``.
        Adapters that change an output act one after the other, the first one lowest (a domain below a task:
        ``h + A_task(h + A_domain(h))``). The classifier is that of the last one that has one. The weights end with the
        stack: `set_active`, and `using` with names, let adapters act unweighted.

        Args:
            names: The adapters, the lowest one first.
            weights: A multiplier of each contribution; None for 1.
            freeze_lower: Freeze all but the last one, and let that one train.
            task: The task, if an adapter has tasks.

        Raises:
            UnknownNameError: If there is no such adapter, or it has no such task.
            ConfigError: If names or weights are no lists, weights are of another number or not finite, or an adapter
                adds what no weight can multiply, such as tokens.
            SiteError: If two of them replace the same tensor.
            MergeError: If the model is merged.

        Example:
            >>> bank.stack(["domain", "task"], weights=[0.5, 1.0], freeze_lower=True)
        """
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ConfigError(f"stack({names!r}): give a list of names, the lowest adapter first.")
        chosen = tuple(names)
        given = () if weights is None else check_weights(f"stack(weights={weights!r})", chosen, weights)
        if all(weight == 1 for weight in given):
            given = ()
        with self._routing.gate.beside():
            self.check_ready("stack adapters")
            self._routing.set(self.route(chosen, task, given))
        if freeze_lower:
            for name in chosen[:-1]:
                self.freeze(name)
            self.unfreeze(chosen[-1])

    def swap(self, old: str, new: str) -> None:
        """Let another adapter act in the place of one, with its weight: another domain under the same task.

        Nothing else changes. Swapping back gives the former outputs, bit for bit.

        Args:
            old: An adapter that acts.
            new: The one that takes its place.

        Raises:
            UnknownNameError: If there is no such adapter.
            ConfigError: If `old` does not act, `new` acts already, or what it adds cannot be weighted.
        """
        self._label(new)
        default = self._routing.default
        if self._label(old) not in default.names:
            raise ConfigError(
                f"swap({old!r}, {new!r}): {old!r} does not act ({', '.join(default.names) or 'none'} do)."
            )
        names = tuple(new if name == old else name for name in default.names)
        with self._routing.gate.beside():
            self.check_ready("swap adapters")
            self._routing.set(self.route(names, default.task, default.weights))

    def chosen(self) -> Route:
        """Return the choice of every thread's next forward pass, for `choose_again`."""
        return self._routing.default

    def choose_again(self, route: Route) -> None:
        """Make a choice the default again, with its task and its weights.

        Args:
            route: A result of `chosen`, whose adapters are still there.
        """
        with self._routing.gate.beside():
            self._routing.set(self.route(route.names, route.task, route.weights))
