"""Attaching and loading: the two ways to get a bank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from vispeft.adapters.bank import AdapterBank
from vispeft.core.arguments import check_arguments
from vispeft.core.method import Method

__all__ = ["attach", "load"]


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    tasks: Sequence[str] | None = None,
    verify: bool = True,
) -> AdapterBank:
    """Attach an adapter to a timm model, in place: freeze the base, inject units, verify gradients.

    The model keeps its timm class, its methods and the names of the base's tensors. The adapter gets a classifier of
    its own, a copy of the base's.

    Args:
        model: A timm model of a supported family, or a ``features_only`` wrapper around one.
        method: The method, such as ``vispeft.SSF()``.
        name: Name of the adapter on this model.
        tasks: Names of the tasks, for methods that have several.
        verify: Check that something trains, and with one image of noise that every trainable tensor receives a
            gradient.

    Returns:
        The model's bank; every call on the same model returns the same bank.

    Raises:
        BackboneError: If the model is not supported.
        SiteError: If a role matches nothing, or the method has no stated form for the family.
        ConfigError: If the name is taken, or neither units nor a classifier train.
        VerificationError: If a trainable tensor receives no gradient.

    Example:
        >>> model = timm.create_model("vit_base_patch16_224", num_classes=100)
        >>> bank = vispeft.attach(model, vispeft.SSF())
    """
    check_arguments(attach, {"name": name})
    with AdapterBank.opened(model) as bank:
        bank.add(method, name, tasks, verify)
    return bank


def load(
    model: nn.Module, path: str | Path, *, name: str | None = None, allow_base_mismatch: bool = False
) -> AdapterBank:
    """Attach a saved adapter to a timm model.

    Args:
        model: The backbone the adapter was trained on; its classifier may have any number of classes.
        path: The adapter's directory, or ``zoo:NAME``.
        name: Its name on this model; by default ``default``, or the directory's name if that is taken.
        allow_base_mismatch: Also load it on a base with other weights.

    Returns:
        The model's bank.

    Raises:
        ConfigError: If the model is none, the path or the name is no text, the name is taken, or the zoo has no such
            adapter.
        FileError: If a file is missing, truncated or altered.
        BaseMismatchError: If the adapter was trained on another backbone.
    """
    check_arguments(load, {"path": path, "name": name})
    with AdapterBank.opened(model) as bank:
        bank.load(path, name, allow_base_mismatch)
    return bank
