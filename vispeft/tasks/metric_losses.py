"""Losses and miners of metric learning by name: those of pytorch-metric-learning, and our own.

A config names one of a closed list, with arguments, some of which are objects of the library themselves:

    loss:
      name: TripletMarginLoss
      init_args:
        margin: 0.1
        distance: {name: LpDistance, init_args: {p: 1}}
        reducer: AvgNonZeroReducer
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

import vispeft.losses  # noqa: F401 - so that its classes are found by name
from vispeft.building.arguments import check_plain
from vispeft.building.classes import argument_names, default_of, find_class, import_class
from vispeft.building.known import known_classes
from vispeft.errors import ConfigError, UnknownNameError, VispeftError
from vispeft.losses.base import MetricLoss

__all__ = [
    "compares_images",
    "is_of_library",
    "list_metric_losses",
    "list_miners",
    "loss_node",
    "metric_loss",
    "metric_miner",
    "miner_node",
]

logger = logging.getLogger(__name__)

LIBRARY = "pytorch_metric_learning"
KINDS = {
    "loss": ("losses", "BaseMetricLossFunction"),
    "miner": ("miners", "BaseMiner"),
    "distance": ("distances", "BaseDistance"),
    "reducer": ("reducers", "BaseReducer"),
    "regularizer": ("regularizers", "BaseRegularizer"),
}
"""Package of the library and base class, per kind of object."""
OBJECTS = {
    "distance": "distance",
    "reducer": "reducer",
    "default_reducer": "reducer",
    "reducers": "reducer",
    "embedding_regularizer": "regularizer",
    "weight_regularizer": "regularizer",
    "losses": "loss",
    "miners": "miner",
}
"""Arguments that take an object, or several of them, and its kind."""
NAME_KEYS = ("class_path", "name")
"""Keys of the name of an object, of which a resolved config has the second one."""
FILLED = {"num_classes": "num_classes", "embedding_size": "dim", "descriptors_dim": "dim"}
"""Arguments that the data and the head decide."""

_BASE = "it is a base class"
REFUSED = {
    "BaseDistance": _BASE,
    "BaseLossWrapper": _BASE,
    "BaseMetricLossFunction": _BASE,
    "BaseMiner": _BASE,
    "BaseReducer": _BASE,
    "BaseRegularizer": _BASE,
    "BatchedDistance": "it computes distances by a function of one's own, which a config cannot name",
    "CrossBatchMemory": "a task puts a memory around its loss itself: set memory to its size",
    "DoNothingReducer": "it returns no number that could be minimised",
    "EmbeddingRegularizerMixin": _BASE,
    "EmbeddingsAlreadyPackagedAsTriplets": "it takes batches that are triplets already, and no labels",
    "GenericPairLoss": _BASE,
    "ManifoldLoss": "it takes groups that it draws itself in place of labels",
    "SelfSupervisedLoss": "it takes two views of each image in place of labels",
    "VICRegLoss": "it takes two views of each image in place of labels",
    "WeightRegularizerMixin": _BASE,
}
"""Classes of the library that cannot be used, and the reason."""
UNFIT = {
    "aggregation_func": "it is a function, which a config cannot name",
    "collect_stats": "nothing reads these statistics",
    "mat_based_loss": "the class sets it itself",
    "weight_init_func": "it is a function, which a config cannot name",
}
"""Arguments that cannot be used, and the reason."""
AGEING = {
    "HistogramLoss": "indexes tensors by lists, which torch deprecates",
    "LargeMarginSoftmaxLoss": "hands tensors to numpy in a way that numpy deprecates",
    "SphereFaceLoss": "hands tensors to numpy in a way that numpy deprecates",
}
"""Classes of the library that will fail with later versions of its dependencies, and the reason."""
BOUNDED = ("HistogramLoss", "TupletMarginLoss")
"""Losses of the library that fail where a cosine is 1 or, by rounding, beyond, as those of equal images are: the first
one has no bin for it, and the second one takes the slope of its angle, which is infinite there."""


def list_metric_losses() -> list[str]:
    """List the names of all losses."""
    return sorted([*_classes("loss"), *(cls.__name__ for cls in known_classes(MetricLoss))])


def list_miners() -> list[str]:
    """List the names of all miners."""
    return sorted(_classes("miner"))


def is_of_library(module: nn.Module) -> bool:
    """Whether a module is a loss of the library, and not a sum of several.

    Args:
        module: Any module.
    """
    return type(module).__name__ != "MultipleLosses" and type(module) in _classes("loss").values()


def compares_images(module: nn.Module) -> bool:
    """Whether a module is a loss of the library that compares images with each other, and not with trained classes.

    Without two images of a class in a batch, nearly all of these are 0 and have no gradient.

    Args:
        module: Any module.
    """
    return is_of_library(module) and not _is_filled(type(module), "num_classes")


def loss_node(given: Any) -> dict[str, Any] | None:
    """Check the loss of a config, and expand it; None for none.

    Args:
        given: A name such as ``ProxyAnchorLoss`` or ``RecallAtK``, or ``name`` (or ``class_path``) with ``init_args``.

    Returns:
        ``name`` (the import path) and ``init_args``, objects inside likewise.

    Raises:
        UnknownNameError: If a class, a key or an argument does not exist.
        ConfigError: If a class cannot be used, or an argument is decided elsewhere.
    """
    return None if given is None else _node(given, "loss", "loss")


def miner_node(given: Any) -> dict[str, Any] | None:
    """Check the miner of a config, and expand it; None for none.

    Args:
        given: As for `loss_node`.

    Raises:
        UnknownNameError: If a class, a key or an argument does not exist.
        ConfigError: If a class cannot be used.
    """
    return None if given is None else _node(given, "miner", "miner")


def metric_loss(name: str | Mapping[str, Any], num_classes: int, dim: int, **arguments: Any) -> nn.Module:
    """Create a loss.

    Args:
        name: A name, or a node of `loss_node`.
        num_classes: Number of training classes.
        dim: Width of the embeddings.
        arguments: Arguments of the loss, with objects by name or node.

    Returns:
        A module that is called with embeddings (B, dim) in float32, labels (B,) and, optionally, pairs or triplets.

    Raises:
        UnknownNameError: If a class or an argument does not exist.
        ConfigError: If a class cannot be used, or refuses its arguments.
    """
    node = {"name": name} if isinstance(name, str) else name
    node = {**node, "init_args": {**(node.get("init_args") or {}), **arguments}}
    made: nn.Module = _made(_node(node, "loss", "loss"), {"num_classes": num_classes, "dim": dim})
    return made


def metric_miner(name: str | Mapping[str, Any], **arguments: Any) -> nn.Module:
    """Create a miner.

    Args:
        name: A name, or a node of `miner_node`.
        arguments: Arguments of the miner, with objects by name or node.

    Raises:
        UnknownNameError: If a class or an argument does not exist.
        ConfigError: If a class cannot be used, or refuses its arguments.
    """
    node = {"name": name} if isinstance(name, str) else name
    node = {**node, "init_args": {**(node.get("init_args") or {}), **arguments}}
    made: nn.Module = _made(_node(node, "miner", "miner"), {})
    return made


def _classes(kind: str) -> dict[str, type[nn.Module]]:
    """Return the classes of the library that can be used, by name."""
    package, base = KINDS[kind]
    module = importlib.import_module(f"{LIBRARY}.{package}")
    parent = getattr(importlib.import_module(f"{LIBRARY}.{package}"), base)
    found = {n: cls for n, cls in vars(module).items() if isinstance(cls, type) and issubclass(cls, parent)}
    if kind == "loss":
        found["MultipleLosses"] = module.MultipleLosses
    return {name: cls for name, cls in found.items() if name not in REFUSED}


def _find(path: str, kind: str, place: str) -> type:
    """Find a class by its name or its import path."""
    prefix, name = f"{LIBRARY}.{KINDS[kind][0]}.", path.rpartition(".")[2]
    found = _classes(kind)
    if path in (name, prefix + name):
        if name in found:
            return found[name]
        if name in REFUSED:
            raise ConfigError(f"{place} names {path}, which cannot be used: {REFUSED[name]}.")
    if path.startswith(prefix):
        raise UnknownNameError(kind, path, [prefix + known for known in found])
    if kind == "loss":
        cls: type = import_class(find_class(path, MetricLoss, kind="loss", place=place, known=found))
        return cls
    raise UnknownNameError(kind, path, found, f"A {kind} is a class of {prefix[:-1]}.")


def _node(given: Any, kind: str, place: str) -> dict[str, Any]:
    """Check an object, and expand it."""
    node = {"class_path": given} if isinstance(given, str) else given
    named = [name for name in NAME_KEYS if isinstance(node, Mapping) and name in node]
    if len(named) != 1:
        raise ConfigError(
            f"{place} is {given!r}; give a name, alone or with init_args, such as "
            "{name: TripletMarginLoss, init_args: {margin: 0.1}}."
        )
    for name in node:
        if name not in (*NAME_KEYS, "init_args"):
            raise UnknownNameError("key", f"{place}.{name}", [f"{place}.name", f"{place}.init_args"])
    cls = _find(str(node[named[0]]), kind, place)
    arguments = node.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{place}.init_args is {arguments!r}; arguments of {cls.__name__} by name are needed.")
    checked = {name: _argument(cls, name, value, f"{place}.{name}") for name, value in arguments.items()}
    # Not as class_path: the parser of configs would import it, and look for the types of its arguments.
    return {"name": _path(cls, kind), "init_args": checked}


def _path(cls: type, kind: str) -> str:
    library = cls.__module__.startswith(f"{LIBRARY}.")
    return (
        f"{LIBRARY}.{KINDS[kind][0]}.{cls.__name__}"
        if library
        else find_class(cls.__name__, MetricLoss, kind=kind, place=kind)
    )


def _argument(cls: type, key: str, value: Any, place: str) -> Any:
    """Check an argument, and expand the objects in it."""
    known = [name for name in argument_names(cls) if name not in UNFIT and not _is_filled(cls, name)]
    if key in UNFIT:
        raise ConfigError(f"{place} was given, and {UNFIT[key]}. Leave it out.")
    if key not in known:
        if key in FILLED and key in argument_names(cls):
            raise ConfigError(f"{place} is decided by the data and the head; leave it out.")
        raise UnknownNameError(f"argument of {cls.__name__}", key, known)
    if key in OBJECTS and value is not None:
        return _objects(value, OBJECTS[key], place)
    check_plain(value, place)
    return value


def _objects(value: Any, kind: str, place: str) -> Any:
    """Expand an object, or several in a list or by name."""

    def expanded(one: Any, at: str) -> Any:
        return None if one is None else _node(one, kind, at)

    if isinstance(value, (list, tuple)):
        return [expanded(one, f"{place}[{number}]") for number, one in enumerate(value)]
    if isinstance(value, Mapping) and not _is_node(value):
        return {name: expanded(one, f"{place}.{name}") for name, one in value.items()}
    return expanded(value, place)


def _is_node(value: Mapping[str, Any]) -> bool:
    return any(key in value for key in NAME_KEYS)


def _is_filled(cls: type, name: str) -> bool:
    """Whether a class has an argument that data and head decide: one of these names, without a default."""
    return name in FILLED and name in argument_names(cls) and default_of(cls, name) is inspect.Parameter.empty


def _made(node: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    """Create an object from a checked node, and those in its arguments."""
    module, _, name = next(node[key] for key in NAME_KEYS if key in node).rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if name in AGEING:
        logger.warning("%s %s: it will fail with a later version.", name, AGEING[name])
    arguments = {
        key: _made_inside(value, sizes) if key in OBJECTS else value for key, value in node["init_args"].items()
    }
    filled = {key: sizes[FILLED[key]] for key in argument_names(cls) if _is_filled(cls, key)}
    try:
        made = cls(**filled, **arguments)
    except VispeftError:
        raise
    except (AssertionError, TypeError, ValueError, AttributeError) as error:
        told = ", ".join(f"{key}={value!r}" for key, value in node["init_args"].items())
        raise ConfigError(f"{name}({told}) cannot be made: {error or 'it refuses these arguments'}.") from error
    return _with_bounded_cosines(made) if name in BOUNDED else made


def _with_bounded_cosines(loss: Any) -> Any:
    """Keep the cosines that a loss computes away from -1 and 1; other distances stay as they are."""
    from pytorch_metric_learning.distances import CosineSimilarity

    from vispeft.losses.bounded import BoundedCosine

    if type(loss.distance) is CosineSimilarity:
        loss.distance.__class__ = BoundedCosine
    return loss


def _made_inside(value: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(value, list):
        return [None if one is None else _made(one, sizes) for one in value]
    if isinstance(value, Mapping):
        if _is_node(value):
            return _made(value, sizes)
        return {name: _made(one, sizes) for name, one in value.items()}
    return value
