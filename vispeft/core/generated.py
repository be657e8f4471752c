"""Caching of computed tensors: in evaluation they are computed once per state of their sources."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from vispeft.core.tracing import in_graph

__all__ = ["FrozenCasts", "Generated", "MakesTensors", "steps_taken"]

T = TypeVar("T")


class Generated:
    """A cache of tensors computed from other tensors (their sources).

    An entry is valid for one state of its sources (storage, version counter, offset in the storage, autocast) and only
    until the next optimiser step. It keeps the storages alive, so that no new tensor can reuse their address. PyTorch
    does not count in-place changes through ``tensor.data``; call `drop` after them.

    Nothing is cached while gradients are recorded, in compiled, exported or traced graphs, or for special tensors
    (distributed, fake, inside `torch.func`). Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        """Create an empty cache."""
        self._held: dict[Hashable, tuple[tuple[Any, ...], tuple[Any, ...], Any]] = {}

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._held)

    def __deepcopy__(self, memo: dict[int, Any]) -> Generated:
        """Return an empty cache: a copied module has tensors of its own."""
        return Generated()

    def __reduce__(self) -> tuple[type[Generated], tuple[()]]:
        """Pickle as an empty cache."""
        return Generated, ()

    def drop(self) -> None:
        """Clear the cache."""
        self._held.clear()

    def get(self, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """Return the cached result for a key, or compute and cache it.

        Args:
            key: Key of the entry, such as a task.
            sources: All tensors the result is computed from.
            make: Computes the result, one tensor or several, which must not be changed in place.

        Returns:
            The result of `make`.
        """
        stamp = _stamp(sources)
        if stamp is None:
            return make()
        held = self._held.get(key)
        if held is not None and held[0] == stamp:
            found: T = held[2]
            return found
        # Tensors created in inference mode could not be used by autograd later.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(), torch.no_grad():
            made = make()
        _steps.watch()
        self._held[key] = (stamp, tuple(source.untyped_storage() for source in sources), made)
        return made


class FrozenCasts:
    """Frozen tensors in the type that autocast computes in, cast once and not in each step.

    Casts are kept for training alone, that is while gradients are recorded: their bytes (half of the float32 tensors)
    are those that a training step holds anyway, until its backward pass. An entry is valid for one state of its tensor
    (storage, version counter, strides), and until a pass in which the tensor trains; see `Generated` for changes that
    PyTorch does not count. It keeps the storage alive, so that no new tensor can reuse its address. Copies and pickles
    are empty.
    """

    def __init__(self) -> None:
        """Keep nothing so far."""
        self.keeps = True
        """Whether casts are kept; where weights are put together for each block, they would be a whole model."""
        self._held: dict[int, _Casts] = {}

    def __len__(self) -> int:
        """Count the casts."""
        return len(self._held)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenCasts:
        """Return an empty one: a copied model has tensors of its own."""
        return FrozenCasts()

    def __reduce__(self) -> tuple[type[FrozenCasts], tuple[()]]:
        """Pickle as an empty one."""
        return FrozenCasts, ()

    def drop(self) -> None:
        """Drop all casts."""
        self._held.clear()

    def get(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return the frozen tensors of a layer in a type, or the tensors themselves where nothing is to be kept.

        Args:
            weight: The weight. If it or the bias trains, the casts belong to the graph.
            bias: The bias, if there is one.
            dtype: The type.
        """
        held = self._held.get(id(weight))
        if held is not None and held.dtype is dtype and torch.is_grad_enabled():
            # Written out, since every layer asks in every step.
            same = held.state == (weight.data_ptr(), weight._version, weight.stride()) and not weight.requires_grad
            if same and (held.bias is None if bias is None else held.fits(bias)):
                return held.made
        # Autocast leaves float64 alone.
        if weight.dtype in (dtype, torch.float64) or not torch.is_grad_enabled() or not self.keeps:
            return weight, bias
        if not (_is_frozen(weight) and (bias is None or _is_frozen(bias))):
            self._held.pop(id(weight), None)  # a fused optimiser will change it without counting that
            return weight, bias
        made = weight.to(dtype), None if bias is None else bias.to(dtype)
        # A graph that is captured has not computed them yet.
        if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            key = id(weight)
            # Entries of tensors that are gone would pile up where a caller puts new ones in at every call.
            gone = weakref.ref(weight, lambda _: self._held.pop(key, None))
            self._held[key] = _Casts(weight, bias, made, gone)
        return made


class _Casts:
    """The casts of one layer, and the state of the tensors they were made from."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, made: tuple[Tensor, Tensor | None], gone: weakref.ref[Tensor]
    ) -> None:
        self.gone = gone
        self.made, self.dtype = made, made[0].dtype
        self.state = weight.data_ptr(), weight._version, weight.stride()
        self.bias = None if bias is None else (bias.data_ptr(), bias._version)
        self.storages = [tensor.untyped_storage() for tensor in (weight, bias) if tensor is not None]

    def fits(self, bias: Tensor) -> bool:
        """Return whether a bias is as it was."""
        return self.bias == (bias.data_ptr(), bias._version) and not bias.requires_grad


def _is_frozen(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary one that does not train."""
    return type(tensor) in (nn.Parameter, Tensor) and not tensor.requires_grad and not tensor.is_inference()


class _Steps:
    """A counter of the steps of all optimisers: fused optimisers do not raise the version counters of their tensors."""

    def __init__(self) -> None:
        self.count, self.watches = 0, False

    def watch(self) -> None:
        """Start counting."""
        if not self.watches:
            self.watches = True
            register_optimizer_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        self.count += 1


_steps = _Steps()


def steps_taken() -> int:
    """Count the steps of all optimisers, from the first call on."""
    _steps.watch()
    return _steps.count


def _stamp(sources: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
    """Return the state of the sources; None where the cache must not be used."""
    if in_graph() or torch.jit.is_tracing():
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
        return None  # tensors inside vmap and other transforms have no storage
    kinds = {source.device.type for source in sources}
    casts = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
    return _steps.count, states, casts


class MakesTensors(nn.Module):
    """A module that computes tensors from its own, such as a hypernetwork. List it before the kind in a unit's bases.

    In evaluation the computed tensors are cached per state of the module's own. The cache is cleared when the mode
    changes, when the module is moved or cast, and when a state dict is loaded into it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the module with an empty cache."""
        super().__init__(*args, **kwargs)
        self.generated = Generated()

    def once(self, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """Compute tensors, or return the cached ones; in training mode they are computed on every call.

        Args:
            key: Key of the entry, such as a task.
            sources: All tensors they are computed from.
            make: Computes them. The result must not be changed in place.

        Returns:
            The result of `make`.
        """
        return make() if self.training else self.generated.get(key, sources, make)

    def train(self, mode: bool = True) -> Any:
        """Set the mode and clear the cache."""
        self.generated.drop()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast, and clear the cache."""
        self.generated.drop()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Load a state dict, also as part of another module, and clear the cache."""
        self.generated.drop()
        super()._load_from_state_dict(state_dict, *args, **kwargs)
