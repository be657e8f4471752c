"""Methods: frozen configurations that plan which units go where. One file per method, found by its name."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from vispeft.core.arguments import check_arguments
from vispeft.core.families import describe
from vispeft.core.fields import check_choices, check_fields, check_types, named_fields
from vispeft.core.providers import extra_methods, fill
from vispeft.core.recipes import Recipe, choose_recipe
from vispeft.core.sites import Site, View, check_roles, select
from vispeft.core.units import Unit
from vispeft.errors import ConfigError, SiteError, UnknownNameError

__all__ = ["Method", "PlanItem", "Step", "list_methods", "method", "method_from_dict", "register", "registered_methods"]

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")


@dataclass(frozen=True)
class PlanItem:
    """One unit a method would put at one site."""

    site: Site
    """The place."""
    unit: str
    """Name of the unit at this site, as in files."""
    build: Callable[[], Unit]
    """Makes the unit, without start values."""
    lender: str | None = None
    """Key of an earlier item whose unit's tensors this one also uses."""
    start: Callable[[], Mapping[str, Tensor]] | None = None
    """Computes initial values from the frozen backbone, by tensor name; called on attach, never on load."""
    task: str | None = None
    """The task it belongs to; None if it belongs to all."""

    @property
    def key(self) -> str:
        """Name of the unit in files and plans: the site's path, then the unit, then its task, if it belongs to one."""
        return f"{self.site.key}/{self.unit}" + ("" if self.task is None else f"@{self.task}")

    def copy_for(self, task: str) -> PlanItem:
        """Return this item as one task's copy.

        Args:
            task: The task.
        """
        lender = None if self.lender is None else f"{self.lender}@{task}"
        return dataclasses.replace(self, task=task, lender=lender)

    @property
    def slot(self) -> str:
        """Name of the unit inside its host; unique there, even where several slices of one layer have units."""
        own = self.unit if self.site.part is None else f"{self.unit}_{self.site.part}"
        return own if self.task is None else f"{own}@{self.task}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """List the unit's trainable tensors without allocating them."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in self.build().named_parameters()}


@dataclass(frozen=True)
class Step:
    """One training step, as `Method.loss_term` sees it."""

    batch: Any
    """The batch of the step: images (B, 3, H, W) and their targets."""
    output: Any
    """The model's output for these images, in float32."""
    result: Any = None
    """The run result of the forward pass; None unless the method sets `Method.reads_result`."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method: a frozen configuration that plans units for a model's sites.

    To add a method, subclass this in one file, decorate the class with `register`, and list in `items` which units go
    where. Everything else (attaching, saving, merging, switching, verifying) works without further code.
    """

    roles: tuple[str, ...] | None = None
    """Roles to act on; None means the roles of the paper."""
    blocks: tuple[int, ...] | None = None
    """Blocks to act in (negative ones count from the last); None means the whole model."""

    name: ClassVar[str]
    """Name in the registry, in configs and in files."""
    paper: ClassVar[str] = ""
    """Where the method was published."""
    recipes: ClassVar[tuple[Recipe, ...]] = ()
    """Published learning rates and sizes; the first one that fits the model and the number of images is recommended."""
    default_roles: ClassVar[tuple[str, ...]] = ()
    """Roles of the paper."""
    optional_roles: ClassVar[frozenset[str]] = frozenset()
    """Roles of `default_roles` that may be missing in a model."""
    reaches_maps: ClassVar[bool] = True
    """Whether it also changes the intermediate maps, which dense tasks read, and not only the final features."""
    trains_base: ClassVar[bool] = False
    """Whether the base is in training mode (dropout, stochastic depth) while the adapter trains."""

    multi_task: ClassVar[bool] = False
    """Whether it plans for its tasks itself; with any other method, an adapter with tasks has one copy of all units per
    task."""
    one_pass: ClassVar[bool] = False
    """Whether a forward pass without a task computes the maps of all tasks, each as a stream of the task's name."""

    cacheable: ClassVar[bool] = False
    """Whether all trainable tensors act on the unchanged backbone's outputs alone, so that these can be cached."""
    reads_result: ClassVar[bool] = False
    """Whether `loss_term` needs the run result of the forward pass (`Step.result`)."""
    training_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that affect training only: an adapter can start from a saved one that differs in these alone."""

    def __post_init__(self) -> None:
        """Check the fields all methods share.

        Raises:
            UnknownNameError: If a role does not exist in any family.
            ConfigError: If the list of roles or blocks is empty, a ``Literal`` field has another value, or the rate of
                stochastic depth is out of range.
        """
        for field, values in (("roles", self.roles), ("blocks", self.blocks)):
            if values is None:
                continue
            if isinstance(values, int):
                raise ConfigError(f"{type(self).__name__}({field}={values!r}): give a list, such as [{values!r}].")
            object.__setattr__(self, field, tuple(values))
            if isinstance(values, str):
                raise ConfigError(f"{type(self).__name__}({field}={values!r}): give a list, such as [{values!r}].")
            if not values:
                raise ConfigError(
                    f"{type(self).__name__}({field}=()) would adapt nothing; leave it None for the default."
                )
        check_roles(self.roles or ())
        if any(not isinstance(block, int) for block in self.blocks or ()):
            raise ConfigError(f"{type(self).__name__}(blocks={self.blocks!r}): block indices are whole numbers.")
        if "head" in (self.roles or ()):
            raise SiteError("Role 'head' was asked for; the classifier belongs to the adapter and trains as it is.")
        check_choices(self)
        rate = self.stochastic_depth()
        if not 0 <= rate < 1:
            raise ConfigError(
                f"{type(self).__name__}(drop_path={rate}): a rate from 0 up to, not including, 1 is needed."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Plan which units go where, in forward order.

        Args:
            view: The model's description.
            model: The model; only methods that copy its tensors use it.

        Yields:
            One item per unit.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement items.")

    def parameter_count(self, view: View) -> int:
        """Count the trainable parameters by the closed formula of the paper, without the head.

        Args:
            view: The model's description.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement parameter_count.")

    def sites(self, view: View) -> list[Site]:
        """Choose the sites by `roles` and `blocks`.

        Args:
            view: The model's description.

        Returns:
            The sites, in forward order.

        Raises:
            SiteError: If a role matches nothing.
        """
        if self.roles is not None:
            return select(view, self.roles, self.blocks)
        roles = tuple(role for role in self.paper_roles() if role in view.roles or role not in self.optional_roles)
        if self.blocks is None:
            return select(view, roles)
        # With blocks given, roles outside of blocks match nothing, as intended.
        return select(view, roles, self.blocks, optional=True)

    def paper_roles(self) -> tuple[str, ...]:
        """Return the roles to act on by default."""
        return self.default_roles

    def stochastic_depth(self) -> float:
        """Return the drop-path rate of the last block while the adapter trains; 0 turns stochastic depth off."""
        return 0.0

    # ------------------------------------------------------------------ tasks

    def task_names(self) -> tuple[str, ...]:
        """Return the tasks that the configuration names."""
        return ()

    def for_tasks(self, tasks: Sequence[str] | None) -> Method:
        """Return the method for the tasks given to `attach`; see `vispeft.core.fields.Tasks`.

        Args:
            tasks: Names of the tasks; None if `attach` was given none.
        """
        return self

    def with_tasks(self, tasks: Sequence[str], before: Mapping[str, str]) -> Method:
        """Return the method after its tasks were changed.

        Args:
            tasks: Names of all tasks.
            before: The names of these tasks before the change; those that are new have none.

        Raises:
            ConfigError: If tasks of this configuration cannot change.
        """
        return self

    def acts_for(self, owner: str | None, task: str | None) -> bool:
        """Return whether a unit acts while a task is chosen.

        Args:
            owner: The task the unit belongs to; None if it belongs to all.
            task: The chosen task; None for no task.
        """
        return owner in (None, task)

    def reads_merged(self) -> bool:
        """Return whether the tasks of a method that branches read the maps of a Swin behind patch merging."""
        return False

    # ------------------------------------------------------------------ classifiers

    def head_width(self, view: View) -> int | None:
        """Return the number of input features of the classifier; None for the model's own.

        Args:
            view: The model's description.
        """
        return None

    def start_head(self, head: nn.Linear, generator: torch.Generator) -> None:
        """Initialise a classifier of the method's own width, by default as PyTorch does.

        Args:
            head: The classifier.
            generator: Source of all randomness.
        """
        bound = head.in_features**-0.5
        for tensor in head.parameters():
            tensor.uniform_(-bound, bound, generator=generator)

    def trains_head(self) -> bool:
        """Return whether the classifier trains; if not, it stays as `start_head` made it."""
        return True

    def recommended(self, model: nn.Module, n_images: int) -> Recipe:
        """Return the learning rate, weight decay and size published for this method, with their source.

        Logs a warning if the model is narrower than those of the papers.

        Args:
            model: A timm model.
            n_images: Number of training images.

        Raises:
            ConfigError: If the method states no recipe.

        Example:
            >>> recipe = vispeft.LoRA().recommended(model, n_images=1000)
            >>> recipe.lr, recipe.fields
            (0.001, {'rank': 8})
        """
        return choose_recipe(type(self).__name__, self.recipes, describe(model), n_images)

    # ------------------------------------------------------------------ training

    def check_classes(self, names: Sequence[str]) -> None:
        """Refuse classes of the data that do not fit what the method starts from; by default none.

        Args:
            names: Names of the classes, in their order.

        Raises:
            ConfigError: If they do not fit.
        """

    def callbacks(self) -> list[Any]:
        """Create the method's schedules, as Lightning callbacks.

        A task adds them to its trainer. Their hooks get the task, whose ``bank`` holds the adapter. A callback may
        switch ``requires_grad`` of tensors for one step and must restore it; checkpoints and EMA include every tensor
        regardless.
        """
        return []

    def loss_term(self, bank: Any, name: str, step: Step) -> Tensor | None:
        """Compute a loss to add to the task's own. It may run the model again.

        Args:
            bank: The bank of the model.
            name: The adapter of this method.
            step: Batch, output and run result of the step.

        Returns:
            The weighted scalar; None for no loss.
        """
        return None

    def criterion(self, model: nn.Module, head: nn.Module, classes: int, dim: int) -> nn.Module | None:
        """Create the criterion that a method brings for metric learning, in place of a loss.

        It is called as ``criterion(embeddings, labels, images)``: outputs of the head (B, d) in float32, training
        classes int64 (B,), and images (B, 3, H, W). Its parameters train and its buffers are in training checkpoints,
        with what its modules return from ``get_extra_state``; nothing of it is in the adapter's file. Optional:
        ``proxy_tensors`` names the parameters that the learning rate of proxies is for, ``similarity`` how neighbours
        are found, ``watch(optimizer)`` is called once the optimiser exists, and ``steps_each_batch`` says that
        gradients of several batches cannot be summed.

        Args:
            model: The adapted backbone, which must not become a child of the criterion.
            head: A fresh head like that of the task, from (B, D) to (B, d).
            classes: Number of training classes.
            dim: Width of the embeddings d.

        Returns:
            The criterion; None for the loss of the task.
        """
        return None

    def change_gradients(self, bank: Any, name: str) -> None:
        """Modify the gradients in place, after the backward pass and before clipping and the optimiser step.

        Args:
            bank: The bank of the model; ``bank.named_tensors(name)`` gives the tensors with their gradients.
            name: The adapter of this method.
        """

    def start_from(self, bank: Any, name: str, loader: Iterable[Any]) -> None:
        """Initialise the adapter from training data, once before the first step of a new training run.

        Not called when a run is resumed or starts from a saved adapter.

        Args:
            bank: The bank of the model.
            name: The adapter of this method.
            loader: Training batches on the model's device, as in training steps.
        """

    def fresh_head(self) -> str | None:
        """Return why training from a saved adapter needs a new classifier; None if it does not."""
        return None

    def is_like(self, other: Method) -> bool:
        """Return whether a saved adapter of another configuration fits: equal except for `training_fields`.

        Args:
            other: The other configuration.
        """
        same = {field: getattr(self, field) for field in self.training_fields}
        return type(other) is type(self) and dataclasses.replace(other, **same) == self

    def low_bit_head(self) -> int:
        """Return the bits per weight of the classifier; 32 means an ordinary classifier."""
        return 32

    def frozen_outputs(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Compute the frozen backbone's outputs for images, for a `cacheable` method.

        Args:
            model: The adapted timm model.
            images: Normalised images (B, 3, H, W).

        Returns:
            Tensors by name, one row per image; by default the input of the classifier (B, width).
        """
        timm_model: Any = model
        return {"pooled": timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)}

    def from_outputs(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the model's output from `frozen_outputs`.

        Args:
            model: The adapted timm model.
            outputs: The result of `frozen_outputs`.

        Returns:
            Class scores (B, classes).
        """
        timm_model: Any = model
        return timm_model.get_classifier()(outputs["pooled"])

    def frozen_fields(self) -> dict[str, Any]:
        """Return the fields that `frozen_outputs` depends on, as plain values."""
        return {}

    def file_method(self) -> Method:
        """Return the method to name in files: another one where units are stored in its form (`Unit.file_tensors`)."""
        return self

    def without_start(self) -> Method:
        """Return a method that makes the units of its files without what they start from, which a file then replaces.

        By default what files name, which reads no file that a training started from.
        """
        return self.file_method()

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields as plain values, for files."""
        return {"name": self.name, "fields": {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inside) for key, inside in value.items()}
    return [_plain(inside) for inside in value] if isinstance(value, tuple) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _from_plain(inside) for key, inside in value.items()}
    return tuple(_from_plain(inside) for inside in value) if isinstance(value, list) else value


def register(cls: M) -> M:
    """Add a method to the registry, under its `name`.

    Args:
        cls: The method's class.

    Returns:
        The same class.

    Raises:
        ConfigError: If another class has the name already.
    """
    fill("methods")  # so that a name clash is found in any import order
    known = _METHODS.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"Two methods want the name {cls.name!r}: {known.__module__} and {cls.__module__}.")
    if _METHODS.get(cls.name) is not cls:
        named_fields(cls)
    _METHODS[cls.name] = cls
    return cls


def is_registered(config: Method) -> bool:
    """Return whether files of a method are read by its class, and not by another one of its name or by none.

    Args:
        config: The method.
    """
    fill("methods")
    return _METHODS.get(config.name) is type(config)


def list_methods() -> list[str]:
    """List the names of all methods that need no optional dependency."""
    fill("methods")
    return sorted(set(_METHODS) - set(extra_methods()))


def registered_methods() -> list[type[Method]]:
    """List the classes of all methods in the registry, in no order."""
    fill("methods")
    return list(_METHODS.values())


def method(name: str, **fields: Any) -> Method:
    """Build a method by its registry name.

    Args:
        name: One of `list_methods`.
        **fields: The method's fields.

    Returns:
        The configuration.

    Raises:
        UnknownNameError: If the method or a field does not exist.
        ConfigError: If the value of a field is invalid.

    Example:
        >>> vispeft.method("lora", rank=4)
    """
    check_arguments(method, {"name": name})
    fill("methods")
    if name not in _METHODS and name in extra_methods():
        importlib.import_module(extra_methods()[name])
    if name not in _METHODS:
        raise UnknownNameError(
            "method", name, _METHODS, "A method of your own is known once the module with its class is imported."
        )
    cls = _METHODS[name]
    check_fields(cls, fields, {field.name for field in dataclasses.fields(cls)})
    check_types(cls, fields)
    return cls(**fields)


def method_from_dict(entry: dict[str, Any]) -> Method:
    """Rebuild a method from the result of `Method.to_dict`.

    Args:
        entry: Name and fields.

    Returns:
        An equal configuration.

    Raises:
        UnknownNameError: If this version does not know the method or one of its fields.
    """
    fields = {key: _from_plain(value) for key, value in entry["fields"].items()}
    return method(entry["name"], **fields)
