"""Choice of base tensors to train, for methods that add no tensors of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from vispeft.core.method import Method, PlanItem
from vispeft.core.sites import Site, View, select
from vispeft.core.units import SelectionUnit, Unit

__all__ = ["below", "selections"]


def below(method: Method, view: View) -> Callable[[str], bool]:
    """Build a test of whether a module is at or below the sites of a method's roles and blocks.

    Args:
        method: The method; without roles and blocks it selects the whole model.
        view: The model's description.

    Returns:
        A function from a module path to whether it is selected.

    Raises:
        SiteError: If a role matches nothing.
    """
    if method.roles is None and method.blocks is None:
        return lambda path: True
    sites = select(view, method.roles or ("block",), method.blocks)
    parents = {site.path for site in sites}
    return lambda path: any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def selections(view: View, model: nn.Module, unit: str, wanted: Callable[[str, str], bool]) -> Iterator[PlanItem]:
    """Plan one selection unit per module that owns chosen parameters, except the classifier.

    Args:
        view: The model's description.
        model: The model.
        unit: Name of the units.
        wanted: Function of module path and parameter name; whether the parameter is chosen.

    Yields:
        The plan's items, in the order of the modules.
    """
    for path, names in view.tensors.items():
        module = model.get_submodule(path)
        chosen = [name for name in names if wanted(path, name)]
        if chosen:
            site = site_of(view, path)
            values = partial(_values, module, tuple(chosen))
            yield PlanItem(site, unit, partial(_build, values, site.null), start=values)


def _values(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name in names if (tensor := module._parameters[name]) is not None}


def _build(values: Callable[[], dict[str, Tensor]], null: tuple[str, ...]) -> Unit:
    return SelectionUnit(values(), null)


def site_of(view: View, path: str) -> Site:
    """Find the site of a module, or create one with the role of its nearest ancestor that has a site.

    Args:
        view: The model's description.
        path: The module's path.

    Returns:
        A site with that path.
    """
    by_path = {site.path: site for site in reversed(view.sites) if site.rows is None}
    if path in by_path:
        return by_path[path]
    above = path
    while above and above not in by_path:
        above = above.rpartition(".")[0]
    parent, whole = by_path[above], view.whole_name(path)
    return replace(
        parent, path=path, alias=None if whole == path else whole, null=(), consumers=(), owner=None, reads_weight=False
    )
