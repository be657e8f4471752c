"""Comparison of an adapter's file with the model it is to be loaded on, before anything is built."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vispeft.adapters.entry import Entry
from vispeft.adapters.holder import BankState
from vispeft.core.method import Method, PlanItem, method_from_dict
from vispeft.core.plan import make_plan
from vispeft.core.unit_shapes import resize_units
from vispeft.core.units import Unit
from vispeft.errors import FileError, VispeftError, brief
from vispeft.storage.files import HEAD, UnknownTensorError
from vispeft.storage.fingerprint import absent_parts
from vispeft.storage.form import shown

__all__ = ["CutModel", "check_planned", "method_of", "tasks_of", "warn_of_channels"]

logger = logging.getLogger(__name__)

FILE_FIELDS = ("source", "teacher", "classes")
"""Fields of methods that name a file to start from. An adapter's file has what was read there, and names none."""


def method_of(header: Mapping[str, Any]) -> Method:
    """Build the method that a file names.

    Args:
        header: The content of ``adapter.json``.

    Raises:
        VispeftError: If this version does not know the method or a field, or a value cannot be.
    """
    fields = header["method"].get("fields") if isinstance(header["method"], Mapping) else None
    for field in FILE_FIELDS:
        if isinstance(fields, Mapping) and fields.get(field) is not None:
            raise FileError(f"The adapter's method names the file {shown(fields[field])} as its {field}; none may.")
    try:
        return method_from_dict(header["method"])
    except VispeftError:
        raise
    except Exception as error:  # of a method outside of this package, which checks its fields in its own way
        raise FileError(
            f"The adapter's method is {shown(header['method'])}, which cannot be: {brief(error)}"
        ) from error


def tasks_of(header: Mapping[str, Any], method: Method) -> list[str] | None:
    """Return the tasks of the adapter in a file; files of earlier versions may list tasks that nothing uses.

    Args:
        header: The content of ``adapter.json``.
        method: Its method.
    """
    tasks = header["tasks"] if method.multi_task or header.get("per_task") else None
    return tasks or list(method.task_names()) or None


def check_planned(bank: BankState, header: Mapping[str, Any]) -> None:
    """Compare the tensors listed in a file with those its method makes on a model, without allocating them.

    Args:
        bank: The bank of the model.
        header: The content of ``adapter.json``.

    Raises:
        FileError: If a tensor is missing, unknown or of another shape.
        SiteError: If the method does not fit the model.
    """
    method = method_of(header)
    listed = {key: tuple(entry["shape"]) for key, entry in header["tensors"].items() if not key.startswith(HEAD)}
    tasks = tasks_of(header, method)
    if tasks is not None and len(tasks) > max(1, len(listed)):
        raise FileError(f"The adapter names {len(tasks):,} tasks and has {len(listed):,} tensors.")
    planned = _planned(make_plan(method, bank._outer, tasks).items, listed)
    missing = [key for key in planned if key not in listed]
    if missing:
        raise FileError(f"{len(missing)} of {len(planned)} tensors are missing, first {', '.join(missing[:3])}.")
    cut = CutModel(bank, header)
    for key, shape in listed.items():
        if key not in planned and not cut.absent and cut.has(key):
            raise UnknownTensorError(key, planned)
        if key in planned and shape != planned[key] and not (cut.absent and _holds(shape, planned[key])):
            raise FileError(f"{key} has shape {shape}; {planned[key]} is needed.{_other_images(bank, header)}")


def _planned(items: Sequence[PlanItem], listed: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """List the tensors of planned units by their names in files, in the shapes of a file where units take them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for item in items:
        try:
            with torch.device("meta"):
                unit = item.build()
                resize_units({f"{item.key}.": unit}, listed)
                shapes |= {f"{item.key}.{name}": tuple(tensor.shape) for name, tensor in unit.state_dict().items()}
        except VispeftError:
            raise
        except (RuntimeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise FileError(f"The adapter's method makes no unit {item.key!r}: {brief(error)}") from error
    return shapes


def _holds(whole: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return len(whole) == len(part) and all(length >= own for length, own in zip(whole, part, strict=True))


def _input_shapes(bank: BankState, header: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Find tensors that depend on the images: their shape in the file and on this model, where the two differ."""
    own = dict(bank.base_tensors())
    saved = {key: tuple(entry["shape"]) for key, entry in header["backbone"]["fingerprint"]["bound"].items()}
    pairs = {key: (shape, tuple(own[key].shape)) for key, shape in saved.items() if key in own}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _other_images(bank: BankState, header: Mapping[str, Any]) -> str:
    """Return a sentence about images of other sizes or channels; empty if the models take the same ones."""
    other = [f"{key} {saved} there, {own} here" for key, (saved, own) in _input_shapes(bank, header).items()]
    if not other:
        return ""
    return (
        f" The adapter was saved on a model for other images ({'; '.join(other)}); create the backbone like that one."
    )


def warn_of_channels(bank: BankState, header: Mapping[str, Any]) -> None:
    """Log a warning if a model takes images of other channels than the one an adapter was saved from.

    Args:
        bank: The bank of the model.
        header: The content of ``adapter.json``.
    """
    for saved, own in _input_shapes(bank, header).values():
        if len(saved) == len(own) == 4 and saved[1] != own[1]:
            logger.warning(
                "The adapter was trained on images of %d channels, and this model takes %d (in_chans).",
                saved[1],
                own[1],
            )


class CutModel:
    """The parts of a full model that a truncated one lacks, and the adapter tensors that belong to them."""

    def __init__(self, bank: BankState, header: Mapping[str, Any]) -> None:
        """Compare the model with the one the adapter was saved from.

        Args:
            bank: The bank of the model.
            header: The header of the adapter's file.
        """
        self.view = bank.view
        self.absent = absent_parts(header["backbone"]["fingerprint"], bank._model, bank.view)

    def has(self, key: str) -> bool:
        """Return whether a model that is not truncated has the part a tensor of the file belongs to.

        Args:
            key: Its name in the file.
        """
        no_norm = self.view.head_path is None and not any(True for _ in self.view.at("final_norm"))
        return not (no_norm and key.split("/", 1)[0] == "norm")

    def keeps(self, key: str, entry: Entry) -> bool:
        """Return whether a tensor of the file belongs to a part this model has.

        Args:
            key: Its name in the file.
            entry: The adapter on this model.
        """
        site = key.split("/", 1)[0]
        if self.absent and not site and key not in entry.state():
            return False  # a unit of the full model may hold tensors for parts that a truncated one lacks
        if any(site.partition(":")[0] == part or site.startswith(f"{part}.") for part in self.absent):
            return site in {known.key for known in self.view.sites}
        return self.has(key)

    @staticmethod
    def fit(key: str, tensor: Tensor, units: Mapping[str, Unit]) -> Tensor:
        """Slice a tensor of the file to the shape this model's unit expects.

        Args:
            key: Its name in the file.
            tensor: The tensor.
            units: The adapter's units by key.
        """
        place, _, name = key.rpartition("/")
        unit_name, _, tensor_name = name.partition(".")
        unit = units.get(f"{place}/{unit_name}")
        return tensor if unit is None else unit.sliced(tensor_name, tensor)
