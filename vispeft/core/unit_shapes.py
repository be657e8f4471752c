"""Units whose tensors have other shapes in a file than at their start, such as those that a training has resized."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vispeft.core.units import Unit

__all__ = ["other_shapes", "resize_units", "units_of"]


def other_shapes(
    units: Mapping[str, Unit], tensors: Mapping[str, Tensor | tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Find tensors that are about to be loaded in another shape than their units have, and take.

    Args:
        units: The units by the beginning of their tensors' names.
        tensors: The tensors, or their shapes, by name; those of other modules are left out.
    """
    shapes = {key: tuple(t.shape) if isinstance(t, Tensor) else tuple(t) for key, t in tensors.items()}
    found: dict[str, tuple[int, ...]] = {}
    for start, unit in units.items():
        own = unit.state_dict()
        given = {name: shapes[start + name] for name in own if start + name in shapes}
        if given != {name: tuple(tensor.shape) for name, tensor in own.items()} and unit.takes(given):
            found |= {start + name: shape for name, shape in given.items()}
    return found


def units_of(module: nn.Module) -> dict[str, Unit]:
    """Collect the units of a module by the beginning of their tensors' names.

    Args:
        module: The module.
    """
    return {f"{path}.": found for path, found in module.named_modules() if isinstance(found, Unit)}


def resize_units(units: Mapping[str, Unit], tensors: Mapping[str, Tensor | tuple[int, ...]]) -> None:
    """Give units the shapes of tensors that are about to be loaded, where they take them.

    Args:
        units: The units by the beginning of their tensors' names.
        tensors: The tensors, or their shapes, by name; those of other modules are left out.
    """
    shapes = other_shapes(units, tensors)
    for start, unit in units.items():
        for name, held in [*unit.named_parameters(), *unit.named_buffers()]:
            if start + name in shapes:
                held.data = held.data.new_zeros(shapes[start + name])
