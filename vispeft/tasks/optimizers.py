"""The optimiser of a task, chosen by name from a closed list, so that a config cannot run code of its own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import nn
from torch.optim import Optimizer

from vispeft.building.arguments import check_plain
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.methods.sparse_schedules import SM3, SparseAdamW

__all__ = ["OPTIMIZERS", "ClipsGradients", "check_optimizer", "make_optimizer", "optimizer_node"]

PREFIX, TIMM, FREE = "torch.optim.", "timm.optim.", "schedulefree."
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
} | {"SM3": SM3, "SparseAdamW": SparseAdamW}
"""Optimisers by their name in ``torch.optim``, and those of sparse changes."""
SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
"""Optimisers of the package schedulefree (arXiv 2405.15682)."""
_UNFIT = {
    "LBFGS": "it needs the loss as a closure and has one group of parameters",
    "Muon": "it takes matrices alone, and adapters have vectors too",
    "SparseAdam": "it needs sparse gradients",
    f"{TIMM}adahessian": "it needs second derivatives",
    f"{TIMM}adamuon": "it takes matrices alone, and adapters have vectors too",
    f"{TIMM}muon": "it takes matrices alone, and adapters have vectors too",
    f"{TIMM}nadamuon": "it takes matrices alone, and adapters have vectors too",
    f"{TIMM}nmuon": "it takes matrices alone, and adapters have vectors too",
}
"""Optimisers that cannot train a task, and the reason."""
_UNFIT_ARGUMENTS = {
    "capturable": "no task records its steps as a CUDA graph",
    "differentiable": "no task computes gradients through a step",
}
"""Arguments that a task cannot use, and the reason."""
_FUSED = ("Adam", "AdamW")
"""Optimisers whose step is one kernel on CUDA, unless their arguments say otherwise."""
_TAKEN = ("lr", "weight_decay")
"""Arguments that are settings of the task, since learning rate and decay differ by group."""


def optimizer_node(given: Any) -> dict[str, Any]:
    """Check the optimiser of a config, and expand it.

    Args:
        given: A name such as ``"SGD"`` or ``"torch.optim.SGD"``; a name of timm's factory, as ``"timm.optim.lion"``;
            one of the package schedulefree, as ``"schedulefree.AdamWScheduleFree"``; or a mapping with ``class_path``
            (one of these) and ``init_args``.

    Returns:
        ``class_path`` (with the package in front) and ``init_args``.

    Raises:
        UnknownNameError: If the optimiser, a key or an argument does not exist.
        ConfigError: If the optimiser cannot train a task, or an argument is a setting of the task.
    """
    node = {"class_path": given} if isinstance(given, str) else given
    if not isinstance(node, Mapping) or "class_path" not in node:
        raise ConfigError(
            f"optimizer is {given!r}; give a name such as SGD, or a class_path with init_args, such as "
            "{class_path: SGD, init_args: {momentum: 0.9}}."
        )
    for key in node:
        if key not in ("class_path", "init_args"):
            raise UnknownNameError("key", f"optimizer.{key}", ["optimizer.class_path", "optimizer.init_args"])
    name = _name(str(node["class_path"]))
    arguments = node.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"optimizer.init_args is {arguments!r}; arguments of {name} by name are needed.")
    known = [key for key in _signature(name) if key not in ("params", *_TAKEN)]
    for key, value in arguments.items():
        if key in _TAKEN:
            raise ConfigError(
                f"optimizer.init_args has {key}, which is a setting of the task, since it differs by group of "
                f"parameters. Give model.{key} instead."
            )
        if key not in known:
            raise UnknownNameError(f"argument of {name}", key, known)
        if value and key in _UNFIT_ARGUMENTS:
            raise ConfigError(f"optimizer.init_args has {key}: {_UNFIT_ARGUMENTS[key]}. Leave it out.")
        if isinstance(_signature(name)[key].default, bool) and not isinstance(value, bool):
            raise ConfigError(f"optimizer.init_args has {key}: {value!r}; true or false is needed.")
    check_plain(arguments, "model.optimizer")
    whole = name if name.startswith((TIMM, FREE)) else f"{PREFIX}{name}"
    return {"class_path": whole, "init_args": dict(arguments)}


def is_schedule_free(node: Mapping[str, Any]) -> bool:
    """Whether an optimiser keeps an average instead of following a schedule.

    Args:
        node: As `optimizer_node` returns it.
    """
    return str(node["class_path"]).startswith(FREE)


def check_optimizer(given: Any, weight_decay: float) -> dict[str, Any]:
    """Check an optimiser and its arguments before there are parameters.

    Args:
        given: As `optimizer_node` takes it.
        weight_decay: Weight decay of the task.

    Returns:
        As `optimizer_node` returns it.

    Raises:
        ConfigError: If the optimiser refuses an argument, or has no weight decay and the task has one.
    """
    node = optimizer_node(given)
    name = _name(node["class_path"])
    if weight_decay and "weight_decay" not in _signature(name):
        raise ConfigError(f"{name} has no weight decay, and weight_decay is {weight_decay:g}. Set weight_decay to 0.")
    shapes = ((2, 2), (2,))
    make_optimizer(node, [{"params": [nn.Parameter(torch.zeros(shape))], "lr": 1e-3} for shape in shapes])
    return node


def make_optimizer(node: Mapping[str, Any], groups: list[dict[str, Any]], scaled: bool = False) -> Optimizer:
    """Create an optimiser; on CUDA its step is fused where PyTorch can do that.

    Args:
        node: As `optimizer_node` returns it.
        groups: Groups with ``params``, ``lr``, ``weight_decay`` and ``name``.
        scaled: Whether gradients are scaled (16-mixed). Lightning refuses to clip them for a fused step.

    Raises:
        ConfigError: If it refuses an argument.
    """
    name = _name(node["class_path"])
    # YAML has lists where torch needs tuples, as for betas.
    arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in node["init_args"].items()}
    if not scaled and _can_fuse(name, groups, arguments):
        arguments["fused"] = True
    try:
        return _maker(name)(groups, **arguments)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        told = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ConfigError(f"The optimizer {name}({told}) cannot be made: {error}.") from error


def _can_fuse(name: str, groups: list[dict[str, Any]], arguments: Mapping[str, Any]) -> bool:
    """Return whether a fused step is possible and nothing else was asked for."""
    if name not in _FUSED or "fused" in arguments or "foreach" in arguments:
        return False
    return all(p.is_cuda and p.is_floating_point() for group in groups for p in group["params"])


class ClipsGradients(LightningModule):
    """A module whose gradients are clipped beside a fused optimiser too."""

    @property
    def scaled(self) -> bool:
        """Whether gradients are scaled, as 16-mixed does."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients.

        Lightning refuses this for every fused optimiser under mixed precision, although only scaled gradients are still
        to be divided by their scale in its step.

        Args:
            optimizer: The optimiser.
            gradient_clip_val: Largest value or norm; None or 0 for no clipping.
            gradient_clip_algorithm: ``norm`` (default) or ``value``.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and not self.scaled:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


def _name(path: str) -> str:
    """Name of an optimiser: in ``torch.optim``, or with the package in front if it is of another one."""
    name = path.rpartition(".")[2]
    if path.startswith(TIMM):
        return _of_timm(name)
    if path.startswith(FREE):
        return _of_schedulefree(name)
    name = name if path.startswith(PREFIX) else path
    known = [key for key in OPTIMIZERS if key not in _UNFIT]
    if name not in OPTIMIZERS:
        more = "Optimizers are the classes of torch.optim, timm.optim.NAME, and schedulefree.NAME."
        raise UnknownNameError("optimizer", path, known, more)
    return _fit(name)


def _of_timm(name: str) -> str:
    from timm.optim import list_optimizers

    # Those of bitsandbytes and apex need a GPU and another package to be made at all.
    known = list_optimizers(exclude_filters=["bnb*", "fused*"])
    if name not in known:
        raise UnknownNameError("optimizer of timm", name, known)
    return _fit(f"{TIMM}{name}")


def _of_schedulefree(name: str) -> str:
    if name not in SCHEDULE_FREE:
        raise UnknownNameError("optimizer of schedulefree", name, SCHEDULE_FREE)
    try:
        importlib.import_module("schedulefree")
    except ImportError as error:
        raise ConfigError(f"optimizer is {FREE}{name}, which needs a package: pip install schedulefree.") from error
    return f"{FREE}{name}"


def _fit(name: str) -> str:
    if name in _UNFIT:
        raise ConfigError(f"optimizer {name} cannot train a task: {_UNFIT[name]}. Choose another, such as AdamW.")
    return name


def _maker(name: str) -> Callable[..., Optimizer]:
    """Return what makes an optimiser."""
    short = name.rpartition(".")[2]
    if name.startswith(TIMM):
        from timm.optim import get_optimizer_class, get_optimizer_info

        # 0.9 is what timm's factory gives where nothing else is asked for.
        own = {"momentum": 0.9} if get_optimizer_info(short).has_momentum else {}
        return partial(get_optimizer_class(short), **own)
    if name.startswith(FREE):
        found: Callable[..., Optimizer] = getattr(importlib.import_module("schedulefree"), short)
        return found
    return OPTIMIZERS[name]


def _signature(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_maker(name)).parameters
