"""Tensors that are computed from others: in evaluation they are made once for each state of their sources."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Generated", "MakesTensors"]

T = TypeVar("T")


class Generated:
    """A cache of tensors that are computed from others.

    An entry holds for one state of its sources: their storages, their versions (in-place changes count up), their place
    in the storage, and autocast; and until the next step of an optimiser. It keeps the storages alive, so that no new
    tensor can take their address. In-place changes through ``tensor.data`` are not counted by PyTorch; call `drop`
    after them.

    Nothing is kept while gradients are recorded, in compiled, exported and traced graphs, and for tensors that are more
    than plain ones (distributed, fake, inside `torch.func`). A copy and a pickle are empty.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._held: dict[Hashable, tuple[tuple[Any, ...], tuple[Any, ...], Any]] = {}

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._held)

    def __deepcopy__(self, memo: dict[int, Any]) -> Generated:
        """Make an empty one: a copy has tensors of its own."""
        return Generated()

    def __reduce__(self) -> tuple[type[Generated], tuple[()]]:
        """Pickle nothing of what is held."""
        return Generated, ()

    def drop(self) -> None:
        """Forget everything."""
        self._held.clear()

    def get(self, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """Look up what was made, or make it.

        Args:
            key: What is asked for, such as a task.
            sources: All tensors it is computed from.
            make: Computes it: a tensor, or several. Do not change them in place.

        Returns:
            What `make` returns.
        """
        stamp = _stamp(sources)
        if stamp is None:
            return make()
        held = self._held.get(key)
        if held is not None and held[0] == stamp:
            found: T = held[2]
            return found
        # Tensors made in inference mode could not enter a graph later.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(), torch.no_grad():
            made = make()
        _steps.watch()
        self._held[key] = (stamp, tuple(source.untyped_storage() for source in sources), made)
        return made


class _Steps:
    """Counts the steps of all optimisers, since fused ones do not count up the versions of their tensors."""

    def __init__(self) -> None:
        self.count, self.watches = 0, False

    def watch(self) -> None:
        """Begin to count."""
        if not self.watches:
            self.watches = True
            register_optimizer_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        self.count += 1


_steps = _Steps()


def _stamp(sources: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
    """State of the sources; None where nothing may be kept or taken."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    records = torch.is_grad_enabled()
    for source in sources:
        plain = type(source) is Tensor or type(source) is nn.Parameter
        if not plain or source.is_inference() or source.is_meta or (records and source.requires_grad):
            return None
    try:
        states = tuple(
            (t.untyped_storage().data_ptr(), t._version, t.storage_offset(), t.shape, t.stride(), t.dtype, t.device)
            for t in sources
        )
    except (NotImplementedError, RuntimeError):
        return None  # inside vmap or another transform a tensor has no storage
    kinds = {source.device.type for source in sources}
    casts = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
    return _steps.count, states, casts


class MakesTensors(nn.Module):
    """A module that computes tensors from its own, such as a hypernetwork; a unit names it in front of its kind.

    In evaluation they are made once for each state of the module's tensors. They are forgotten on a change of the mode,
    on a move or cast of the module, and when a state dict is loaded into it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Start with nothing made."""
        super().__init__(*args, **kwargs)
        self.generated = Generated()

    def once(self, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """Compute tensors, or take them from before; while the module trains they are computed every time.

        Args:
            key: What is asked for, such as a task.
            sources: All tensors they are computed from.
            make: Computes them. Do not change them in place.

        Returns:
            What `make` returns.
        """
        return make() if self.training else self.generated.get(key, sources, make)

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and forget."""
        self.generated.drop()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast, and forget."""
        self.generated.drop()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Load, also as a part of another module, and forget."""
        self.generated.drop()
        super()._load_from_state_dict(state_dict, *args, **kwargs)
