"""The gate of a model: its forward passes run beside each other, and a change of it runs alone.

A pass that has begun ends before a change begins, and one that begins meanwhile waits, so that each is of one state.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar, cast

from torch import nn

from vispeft.core.tracing import in_graph
from vispeft.errors import ConfigError

__all__ = ["PASSES", "Gate", "plain_class", "waits_for_changes"]

F = TypeVar("F", bound=Callable[..., Any])

PASSES = ("forward", "forward_features", "forward_intermediates", "forward_head", "run", "task_maps")
"""Methods of a model that run a whole forward pass."""
PATIENCE = 60.0
"""Seconds that a change waits for forward passes of a model that had no adapters when they began."""
_GATES: weakref.WeakSet[Gate] = weakref.WeakSet()


class Gate:
    """The gate of one model."""

    def __init__(self) -> None:
        """Create an open gate."""
        self._open_again()
        _GATES.add(self)

    def _open_again(self) -> None:
        self._free = threading.Condition()
        self._inside: set[int] = set()
        """Threads that are in a forward pass or enter a choice."""
        self._waiting = 0
        self._changing: int | None = None
        self._ending = False
        """Whether the change waits for forward passes of the model that began while it was a plain one."""
        self.graphs = threading.RLock()
        """Held while a compiled graph runs, and while the adapters of the graphs are exchanged."""
        self._model: Callable[[], nn.Module | None] = lambda: None
        """Returns the model that is changed, or was changed last."""

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run beside other forward passes, after any change."""
        own = threading.get_ident()
        if own in self._inside or self._changing == own:
            yield  # inside of a pass, or of a change that runs the model itself
            return
        try:
            self._enter(own)
            yield
        finally:  # also if an interrupt comes between the two
            with self._free:
                self._inside.discard(own)
                self._free.notify_all()

    def _enter(self, thread: int) -> None:
        with self._free:
            while self._changing is not None or self._waiting:
                # Part of a pass that the change waits for, such as the call of the classifier behind the features.
                if (self._ending or self._changing is None) and _runs_plain(self._model(), sys._getframe()):
                    break
                self._free.wait()
            self._inside.add(thread)

    @contextmanager
    def alone(self, model: nn.Module, wanted: str) -> Iterator[None]:
        """Change a model alone, after the forward passes that have begun.

        Args:
            model: The model, with adapters or without.
            wanted: The change, for the error message.

        Raises:
            ConfigError: If the calling thread is in the middle of a forward pass of the model, or one that began
                before the model had adapters does not end.
        """
        if self._changing == threading.get_ident():
            yield
            return
        if threading.get_ident() in self._inside or _runs_plain(model, sys._getframe()):
            raise ConfigError(f"The model cannot {wanted} in the middle of its own forward pass, such as in a hook.")
        self._wait_for_others(model)
        try:
            with self._closed(model, wanted):
                yield
        finally:
            with self._free:
                self._changing, self._ending = None, False
                self._free.notify_all()

    def _wait_for_others(self, model: nn.Module) -> None:
        with self._free:
            self._model = weakref.ref(model)
            self._waiting += 1
            try:
                while self._changing is not None or self._inside:
                    self._free.wait()
                self._changing, self._ending = threading.get_ident(), True
            finally:
                self._waiting -= 1
                self._free.notify_all()

    @contextmanager
    def _closed(self, model: nn.Module, wanted: str) -> Iterator[None]:
        """Let passes of a plain model wait as well: those that begin, and for those that have begun."""
        changed: Any = model
        if not hasattr(model, "gate"):
            changed.__class__ = self.closed_class(type(model))
        try:
            self._wait_for_plain_passes(model, wanted)
            yield
        finally:
            changed.__class__ = plain_class(model)

    def _wait_for_plain_passes(self, model: nn.Module, wanted: str) -> None:
        """Wait for forward passes in other threads that began while the model was a plain one, which has no gate."""
        until = time.monotonic() + PATIENCE
        while True:
            with self._free:  # in which no thread enters, so that none does after the last look
                self._ending = _runs_plain_elsewhere(model)
            if not self._ending:
                return
            if time.monotonic() > until:
                raise ConfigError(
                    f"The model cannot {wanted}: a forward pass in another thread has not ended for {PATIENCE:g} "
                    "seconds."
                )
            time.sleep(0.001)

    def closed_class(self, plain: type[nn.Module]) -> type[nn.Module]:
        """Return the class of a model without hosts: while it is changed, one whose forward passes wait.

        Args:
            plain: Its class in timm.
        """
        if self._changing != threading.get_ident():
            return plain
        passes = {name: waits_for_changes(getattr(plain, name)) for name in PASSES if hasattr(plain, name)}
        return type(plain.__name__, (plain,), {"__module__": __name__, "gate": self, "replaces": plain, **passes})


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, also while its forward passes wait for a change.

    Args:
        module: The module.
    """
    kind = type(module)
    return cast("type[nn.Module]", vars(kind)["replaces"]) if isinstance(vars(kind).get("gate"), Gate) else kind


def waits_for_changes(method: F) -> F:
    """Decorate a method that runs a forward pass, so that it waits for changes; its object has ``gate``.

    Args:
        method: The method.

    Returns:
        The method, with the same signature.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if in_graph():
            return method(self, *args, **kwargs)
        gate: Gate | None = getattr(self, "gate", None)
        if gate is not None:
            with gate.beside():
                if any(vars(kind).get(method.__name__) is run for kind in type(self).__mro__):
                    return method(self, *args, **kwargs)
        return getattr(self, method.__name__)(*args, **kwargs)  # the model was changed while this call waited

    return run  # type: ignore[return-value]


_GATED = cast(Any, waits_for_changes(lambda: None)).__code__
"""The code of methods that wait for changes."""


def _runs_plain_elsewhere(model: nn.Module) -> bool:
    own = threading.get_ident()
    return any(thread != own and _runs_plain(model, top) for thread, top in sys._current_frames().items())


def _runs_plain(model: nn.Module | None, top: FrameType) -> bool:
    """Whether a thread is in a forward pass of a model that began while the model was a plain one.

    Such a pass shows in the frames of its thread alone: in that of the model's method, and before and behind it in that
    of the call, where hooks run.

    Args:
        model: The model; None for no model.
        top: The innermost frame of the thread.
    """
    frame = None if model is None else top
    while frame is not None:
        name = frame.f_code.co_name
        if name in PASSES and frame.f_code is not _GATED and frame.f_locals.get("self") is model:
            return True
        if name == "_call_impl" and frame.f_locals.get("self") is model:
            method = frame.f_locals.get("forward_call")  # the model's method, as it was when the call began
            if method is not None and not hasattr(method, "__wrapped__"):
                return True
        frame = frame.f_back
    return False


def _forget_threads() -> None:
    """Open the gates of a process that was forked: the threads that stood in them are not in it."""
    for gate in list(_GATES):
        gate._open_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
