"""Fields that many methods share, and checks of fields."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, wraps
from types import SimpleNamespace, UnionType
from typing import Any, ClassVar, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from vispeft.errors import ConfigError, SiteError, UnknownNameError

__all__ = [
    "Bits",
    "DropPath",
    "FewBits",
    "Tasks",
    "check_choices",
    "check_factor",
    "check_fields",
    "check_roles_in",
    "check_share",
    "check_task_names",
    "check_types",
    "check_whole",
    "field_hint",
    "named_fields",
]

Bits = Literal[1, 2, 4, 8, 32]
"""Bits per weight of a matrix; 32 means no quantisation."""


@dataclass(frozen=True, kw_only=True)
class DropPath:
    """Stochastic depth in the backbone while the adapter trains. List it before `Method` among a method's bases."""

    drop_path: float = 0.0
    """Rate of stochastic depth in the last block while training; it rises linearly from 0 in the first block."""

    def stochastic_depth(self) -> float:
        """Return the rate of the last block."""
        return self.drop_path


@dataclass(frozen=True, kw_only=True)
class FewBits:
    """Low-bit matrices and a low-bit classifier. List it before `Method` among a method's bases."""

    bits: Bits = 32
    """Bits per weight of the unit's matrices; 32 means no quantisation."""
    head_bits: Bits = 32
    """Bits per weight of the classifier, which then has no bias; 32 means an ordinary classifier."""

    def low_bit_head(self) -> int:
        """Return the bits per weight of the classifier."""
        return self.head_bits


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks of a method that plans for them itself. List it before `Method` among a method's bases."""

    tasks: tuple[str, ...] = ()
    """Names of the tasks; ``attach(model, method, tasks=[...])`` says the same."""

    multi_task: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the names, and then the fields of the other bases."""
        if self.tasks:
            check_task_names(self.tasks, f"{type(self).__name__}(tasks={self.tasks!r})")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        super().__post_init__()  # type: ignore[misc]  # of `Method`

    def task_names(self) -> tuple[str, ...]:
        """Return the tasks."""
        return self.tasks

    def for_tasks(self, tasks: Sequence[str] | None) -> Self:
        """Return the method for the tasks given to `attach`.

        Args:
            tasks: Names of the tasks; None if `attach` was given none.

        Raises:
            ConfigError: If there are no tasks, or others than in the configuration.
        """
        name = type(self).__name__
        if not (tasks or self.tasks):
            raise ConfigError(f"{name} has no tasks. Name them, such as {name}(tasks=('seg', 'depth')).")
        if tasks and self.tasks and tuple(tasks) != self.tasks:
            raise ConfigError(
                f"attach(..., tasks={list(tasks)!r}) was called with {name}(tasks={self.tasks!r}). Name the tasks once."
            )
        return dataclasses.replace(self, tasks=tuple(tasks or self.tasks))

    def with_tasks(self, tasks: Sequence[str], before: Mapping[str, str]) -> Self:
        """Return the method after its tasks were changed.

        Args:
            tasks: Names of all tasks.
            before: The names of these tasks before the change; those that are new have none.
        """
        return dataclasses.replace(self, tasks=tuple(tasks))


def check_task_names(tasks: Any, asked: str) -> None:
    """Check a list of task names.

    Args:
        tasks: The list.
        asked: The call or field it was given to, for the message.

    Raises:
        ConfigError: If it is empty, is no list, or has a name that is invalid or given twice.
    """
    bad = isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks
    bad = bad or any(not (isinstance(task, str) and _NAME.fullmatch(task)) for task in tasks)
    if bad or len(set(tasks)) < len(tasks):
        raise ConfigError(
            f"{asked}: give a list of different names of letters, digits, '-' and '_', such as ['seg', 'depth'], or "
            "leave tasks out."
        )


_NAME = re.compile(r"[A-Za-z0-9_-]+")


_PEFT = {
    "r": ("rank",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "target_modules": ("roles",),
    "layers_to_transform": ("blocks",),
    "use_rslora": ("rslora",),
    "use_dora": ("dora",),
    "init_lora_weights": ("start",),
    "num_virtual_tokens": ("num_tokens", "length"),
    "prefix_projection": ("mid_dim",),
    "reduction_factor": ("reduction", "bottleneck"),
}
"""Fields of peft's configurations, and those of ours that mean the same, where a method has one of them."""


def field_hint(asked: str, known: Iterable[str]) -> str:
    """Return a sentence on a field of peft; empty for any other name.

    Args:
        asked: The name that was given.
        known: The fields of the method.
    """
    if asked == "modules_to_save":
        return "The classifier is trained and saved with every adapter."
    ours = next((name for name in _PEFT.get(asked, ()) if name in known), None)
    more = ", names of places such as 'attn.qkv', which `vispeft inspect` lists" if ours == "roles" else ""
    return f"The name here for peft's {asked} is {ours}{more}." if ours else ""


def check_fields(cls: type, fields: Iterable[str], known: Collection[str]) -> None:
    """Refuse fields that a method does not have.

    Args:
        cls: The method's class.
        fields: Names that were given.
        known: Names of its fields.

    Raises:
        UnknownNameError: If it lacks one; the message names the field that means the same as one of peft's.
    """
    for field in fields:
        if field not in known:
            raise UnknownNameError(f"field of {cls.__name__}", field, known, field_hint(field, known))


def named_fields(cls: type) -> None:
    """Let a class refuse unknown fields, and values without a name, in its own words.

    Args:
        cls: The class, whose ``__init__`` is replaced by one with these checks in front.
    """
    init = cls.__init__  # type: ignore[misc]
    parameters = list(inspect.signature(init).parameters.values())[1:]
    if any(p.kind is not p.KEYWORD_ONLY for p in parameters):
        return  # written by hand, and free to take other arguments
    known = [parameter.name for parameter in parameters]

    @wraps(init)
    def checked(self: Any, *values: Any, **fields: Any) -> None:
        if values:
            raise ConfigError(
                f"{cls.__name__}({values[0]!r}): a field is given by its name, as in FIELD={values[0]!r}. There are "
                f"{', '.join(known)}."
            )
        check_fields(cls, fields, known)
        init(self, **fields)

    cls.__init__ = checked  # type: ignore[misc]


def check_choices(config: Any) -> None:
    """Check every field whose annotation is a ``Literal``, or a union that contains one.

    Args:
        config: An instance of a dataclass.

    Raises:
        ConfigError: If a value is not among the choices; the message lists them and suggests the nearest.
    """
    for field, (choices, others) in _choices(cast(type, type(config))).items():
        value = getattr(config, field)
        # True == 1, so types are compared too.
        if any(value == choice and type(value) is type(choice) for choice in choices) or isinstance(value, others):
            continue
        names = [choice for choice in choices if isinstance(choice, str)]
        near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{type(config).__name__}({field}={value!r}): choose {_listed(choices)}.{hint}")


def check_types(cls: type, fields: Mapping[str, Any]) -> None:
    """Check that values read from a file are of the kinds that a dataclass states for its fields.

    Args:
        cls: The dataclass.
        fields: Values by field; ``Literal`` fields are left to `check_choices`.

    Raises:
        ConfigError: If a value is of another kind, or a number is not finite.
    """
    hints = _hints(cls)
    for field, value in fields.items():
        kinds = [part for part in _parts(hints.get(field, Any)) if get_origin(part) is not Literal]
        if len(kinds) < len(_parts(hints.get(field, Any))) or any(_fits(value, kind) for kind in kinds):
            continue
        names = " or ".join(_KINDS.get(kind, str(kind)) for kind in kinds)
        raise ConfigError(f"{cls.__name__}({field}={value!r}): {names} is needed.")


LARGEST = 1e9
"""Largest number of a field, such as a scale; beyond it the values of an adapter leave the range of float32."""
_KINDS = {
    int: "a whole number",
    float: f"a finite number up to {LARGEST:g}",
    bool: "true or false",
    str: "a text",
    type(None): "none",
}


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the kinds that a union is made of."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, Mapping) and all(
            any(_fits(item, part) for part in _parts(get_args(kind)[1])) for item in value.values()
        )
    if kind in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
        return False
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    if kind is float:
        return abs(value) <= LARGEST
    return isinstance(value, kind) if kind in _KINDS else True


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Read the annotations of a dataclass; fields with names that are imported for type checking only are left out."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        # Subclasses share the Field object of the class that wrote the annotation; its names resolve in that module.
        owner = [base for base in cls.__mro__ if base.__dict__.get("__dataclass_fields__", {}).get(field.name) is field]
        annotated = SimpleNamespace(__annotations__={field.name: field.type})
        with suppress(NameError):
            found |= get_type_hints(annotated, globalns=vars(sys.modules[owner[-1].__module__]))
    return found


@cache
def _choices(cls: type) -> dict[str, tuple[tuple[Any, ...], tuple[type, ...]]]:
    """Choices of each ``Literal`` field of a dataclass, and the other types of its union."""
    found = {}
    for field, hint in _hints(cls).items():
        parts = _parts(hint)
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        if choices:
            found[field] = tuple(choices), tuple(part for part in parts if isinstance(part, type))
    return found


def _listed(choices: Sequence[Any]) -> str:
    *first, last = (repr(choice) for choice in choices)
    return f"{', '.join(first)}{',' if len(first) > 1 else ''}{' or ' if first else ''}{last}"


def _numbers(value: Any) -> Iterator[Any]:
    """Iterate over the numbers of a field: one, or those in a tuple or a mapping."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for inside in value:
            yield from _numbers(inside)
    else:
        yield value


def check_whole(config: Any, *fields: str) -> None:
    """Check that fields are whole numbers of at least 1, or None; also those in tuples and mappings.

    Args:
        config: The method.
        *fields: Names of the fields.

    Raises:
        ConfigError: If a field is neither.
    """
    for field in fields:
        for value in _numbers(getattr(config, field)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(
                    f"{type(config).__name__}({field}={value!r}): a whole number of at least 1 is needed."
                )


def check_share(config: Any, *fields: str) -> None:
    """Check that fields are shares in the half-open range [0, 1); also those in tuples and mappings.

    Args:
        config: The method.
        *fields: Names of the fields.

    Raises:
        ConfigError: If a field is out of range.
    """
    for field in fields:
        for value in _numbers(getattr(config, field)):
            if not (isinstance(value, int | float) and 0 <= value < 1):
                raise ConfigError(
                    f"{type(config).__name__}({field}={value!r}): a share from 0 up to, not including, 1 is needed."
                )


def check_factor(config: Any, *fields: str) -> None:
    """Check that fields are finite numbers other than zero, or None; also those in tuples and mappings.

    Args:
        config: The method.
        *fields: Names of the fields.

    Raises:
        ConfigError: If a field is neither.
    """
    for field in fields:
        for value in _numbers(getattr(config, field)):
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value != 0):
                raise ConfigError(f"{type(config).__name__}({field}={value!r}): a number other than zero is needed.")


def check_roles_in(config: Any, allowed: Sequence[str], hint: str = "") -> None:
    """Check that the roles of a method are among those it can act on.

    Args:
        config: The method.
        allowed: Roles it can act on.
        hint: A further sentence for the message.

    Raises:
        SiteError: If a role is not allowed.
    """
    for role in config.roles or ():
        if role not in allowed:
            raise SiteError(
                f"{type(config).__name__} acts at {' and '.join(allowed)}; {role!r} was asked for."
                f"{' ' + hint if hint else ''}"
            )
