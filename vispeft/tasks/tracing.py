"""Search for the operation in which the first value of a step that is not finite arises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Origin", "trace"]

_FILLS = ("fill", "full", "masked_fill", "where", "scalar_tensor", "empty", "new_empty", "empty_like", "empty_strided")
"""Operations that write given values, or none: an infinity in an attention mask is meant."""


@dataclass(frozen=True)
class Origin:
    """Where a value that is not finite arises."""

    kind: str
    """``weight``, ``batch``, ``forward`` or ``backward``."""
    place: str
    """Name of the tensor, or of the module."""
    operation: str
    """PyTorch's name of the operation; empty for a tensor that was not finite to begin with."""
    shape: tuple[int, ...]
    broken: int
    """Entries that are not finite."""
    nan: int
    """Those of them that are NaN."""
    largest: float
    """Largest absolute value of the operation's inputs, or of the tensor's finite entries."""


def trace(task: Any, batch: Any, index: int) -> Origin | None:
    """Run a step, and find the first value that is not finite.

    Weights and batch are looked at first. The step's operations are then seen one by one, forward and backward.

    Args:
        task: The task, in training mode, with the weights of the step.
        batch: The batch.
        index: Its number in the epoch.

    Returns:
        Where it arises; None if all values are finite.
    """
    for name, tensor in [*task.named_parameters(), *task.named_buffers()]:
        if (found := _of_tensor("weight", name, tensor)) is not None:
            return found
    for path, value in pytree.tree_flatten_with_path(batch)[0]:
        if (
            isinstance(value, Tensor)
            and (found := _of_tensor("batch", "batch" + pytree.keystr(path), value)) is not None
        ):
            return found
    watcher = _Watcher()
    with watcher.paths(task), watcher:
        loss = task.training_step(batch, index)
        watcher.phase = "backward"
        if watcher.found is None:
            loss.backward()
    task.zero_grad(set_to_none=True)
    return watcher.found


def _of_tensor(kind: str, place: str, tensor: Tensor) -> Origin | None:
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return None
    return _origin(kind, place, "", tensor, tensor)


def _origin(kind: str, place: str, operation: str, tensor: Tensor, source: Tensor | None) -> Origin:
    largest = 0.0
    if source is not None and source.numel():
        finite = source.detach().float()
        largest = float(torch.where(finite.isfinite(), finite, 0).abs().max())
    broken, nan = int((~tensor.isfinite()).sum()), int(tensor.isnan().sum())
    return Origin(kind, place, operation, tuple(tensor.shape), broken, nan, largest)


class _Watcher(TorchDispatchMode):
    """Look at the result of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.found = "forward", None
        self._stack: list[str] = []
        self._nodes: dict[Any, str] = {}
        self._last = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if self.found is None:
            self._look(func, args, kwargs or {}, outputs)
        return outputs

    def _look(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        place = self._place()
        name = func.name().partition("::")[2].partition(".")[0]
        if name.strip("_") in _FILLS:
            return
        made = [value for value in pytree.tree_leaves(outputs) if _is_float(value)]
        broken = next((value for value in made if not bool(value.isfinite().all())), None)
        if broken is None:
            return
        given = [value for value in pytree.tree_leaves((args, kwargs)) if _is_float(value)]
        # An operation on a masked score passes an infinity on; NaN is never meant.
        if any(not bool(value.isfinite().all()) for value in given if value is not broken) and not broken.isnan().any():
            return
        source = max(given, key=_largest, default=None)
        self.found = _origin(self.phase, place, name, broken, source)

    def _place(self) -> str:
        if self.phase == "forward":
            return self._stack[-1] if self._stack else "loss"
        node = torch._C._current_autograd_node()
        self._last = self._nodes.get(node, self._last)
        return self._last or "loss"

    @contextmanager
    def paths(self, task: nn.Module) -> Iterator[None]:
        """Follow which module runs."""
        with ExitStack() as hooks:
            for name, module in task.named_modules():
                if name:
                    before = module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name))
                    after = module.register_forward_hook(
                        lambda _m, _x, output, name=name: self._leave(name, output), always_call=True
                    )
                    hooks.callback(before.remove)
                    hooks.callback(after.remove)
            yield

    def _leave(self, name: str, output: Any) -> None:
        if self._stack and self._stack[-1] == name:
            self._stack.pop()
        for value in pytree.tree_leaves(output):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                self._nodes.setdefault(value.grad_fn, name)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _largest(tensor: Tensor) -> float:
    return float(torch.where(tensor.isfinite(), tensor, 0).abs().max())
