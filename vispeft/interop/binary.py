"""The published files of Bi-AdaptFormer and Bi-LoRA (JieShibo/PETL-ViT at 026e4f1, MIT): codes without a header.

A file is a sequence of matrices: for each the packed codes, then mean and standard deviation as float32. The loaded
matrices keep exactly the decoded values and are never quantised again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from vispeft.adapters.bank import AdapterBank
from vispeft.core.families import describe, unwrap
from vispeft.core.plan import make_plan
from vispeft.errors import FileError, UnknownNameError
from vispeft.interop.blocks import hyper_of
from vispeft.interop.official import find_source, load_official, official_names
from vispeft.storage.quantize import decode

__all__ = ["BINARY_SOURCES", "load_binary"]

BINARY_SOURCES = {"biadaptformer": "adapter_down.weight", "bilora": "lora_q.adapter_down.weight"}
"""The public codes with such files, each with the name ending of a matrix whose first axis is the bottleneck."""
HEAD_BITS = 1
"""Bits per weight of a quantised classifier in these files, independent of the adapter's bits."""
_STATISTICS = 8
_SPREADS = (1e-8, 1e4)
"""Range of standard deviations of trained matrices; four bytes read at a wrong offset are rarely within it."""


class _Reader:
    """Sequential reader of a file's bytes."""

    def __init__(self, content: bytes, asked: str) -> None:
        self.content, self.asked, self.place = content, asked, 0

    @property
    def left(self) -> int:
        """Number of bytes not yet read."""
        return len(self.content) - self.place

    def take(self, count: int, part: str) -> Tensor:
        """Read bytes as uint8."""
        if count > self.left:
            raise FileError(
                f"The file ends within {part}: it has {len(self.content)} bytes, which is too few for {self.asked}. "
                "Give the bits and the bottleneck it was trained with, and the model's own size."
            )
        found = torch.frombuffer(bytearray(self.content[self.place : self.place + count]), dtype=torch.uint8)
        self.place += count
        return found

    def matrix(self, shape: tuple[int, ...], bits: int, part: str) -> Tensor:
        """Read one quantised matrix without unpacking it."""
        numbers = math.prod(shape)
        if numbers * bits % 8:
            raise FileError(
                f"{part} has {numbers} numbers of {bits} bits, which fill no whole bytes; the public code drops the "
                "rest, so that such a file is not complete."
            )
        packed = self.take(numbers * bits // 8 + _STATISTICS, part)
        std = float(packed[-4:].view(torch.float32))
        if not _SPREADS[0] < std < _SPREADS[1]:
            raise FileError(
                f"{part} would have the standard deviation {std:g}, so the file does not hold {self.asked}."
            )
        return packed

    def numbers(self, shape: tuple[int, ...], part: str) -> Tensor:
        """Read float32 numbers."""
        return self.take(4 * math.prod(shape), part).view(torch.float32).reshape(shape).clone()


def load_binary(model: nn.Module, source: str, content: bytes, hyper: Mapping[str, Any]) -> AdapterBank:
    """Attach an adapter from a published file without a header.

    Args:
        model: The backbone the adapter belongs to.
        source: ``biadaptformer`` or ``bilora``.
        content: The file's bytes.
        hyper: ``bits``, ``bottleneck`` and ``scale``, which the file does not contain; ``bihead`` if both kinds of
            classifier fit the number of bytes.

    Returns:
        The model's bank; quantised matrices keep the decoded values, and are saved again byte for byte.

    Raises:
        UnknownNameError: If the source has no such files.
        FileError: If the bytes do not fit the settings; then the model is unchanged.
    """
    if source not in BINARY_SOURCES:
        raise UnknownNameError("source of files without a header", source, BINARY_SOURCES)
    found = hyper_of(hyper, source, "bits", "bottleneck", "scale")
    packed, plain = _read(model, source, content, found)
    found["bihead"] = not plain
    tensors = {**plain, **{name: decode(tensor, bits, shape) for name, (tensor, bits, shape) in packed.items()}}
    bank = load_official(model, source, tensors, found)
    label = bank.active[-1]
    ours = {theirs: own for own, theirs in official_names(find_source(source), bank, label).items()}
    bank.keep_encoded({ours[name]: tensor for name, (tensor, _, _) in packed.items()}, label)
    return bank


Packed = dict[str, tuple[Tensor, int, tuple[int, ...]]]
"""Bytes, bits and shape by the authors' names."""


def _read(model: nn.Module, source: str, content: bytes, hyper: dict[str, Any]) -> tuple[Packed, dict[str, Tensor]]:
    """Read the quantised matrices and the other tensors of a file."""
    entry, view = find_source(source), describe(model)
    if view.head_path is None:
        raise FileError("The file holds a classifier, and this model has no place for one. Give the whole model.")
    first = {BINARY_SOURCES[source]: torch.empty(hyper["bottleneck"], view.widths[0], device="meta")}
    plan = make_plan(entry.method(hyper, first, view), model)
    bits, reader = hyper["bits"], _Reader(content, ", ".join(f"{k}={hyper[k]}" for k in ("bits", "bottleneck")))
    packed: Packed = {}
    names = entry.names(plan)
    for own, shape in plan.shapes().items():
        packed[names[own]] = (reader.matrix(shape, bits, names[own]), bits, shape)
    width = cast(int, unwrap(model).num_features)
    weight, bias = f"{view.head_path}.weight", f"{view.head_path}.bias"
    if _quantised_head(reader, width, hyper.get("bihead")):
        shape = ((reader.left - _STATISTICS) * 8 // (width * HEAD_BITS), width)
        packed[weight] = (reader.matrix(shape, HEAD_BITS, weight), HEAD_BITS, shape)
        return packed, {}
    classes = reader.left // (4 * (width + 1))
    return packed, {weight: reader.numbers((classes, width), weight), bias: reader.numbers((classes,), bias)}


def _quantised_head(reader: _Reader, width: int, told: bool | None) -> bool:
    """Determine from the number of remaining bytes whether the classifier is quantised."""
    left = reader.left
    fits = {
        False: left > 0 and left % (4 * (width + 1)) == 0,
        True: left > _STATISTICS and (left - _STATISTICS) * 8 % (width * HEAD_BITS) == 0,
    }
    kinds = [kind for kind, good in fits.items() if good and told in (None, kind)]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise FileError(
            f"The last {left} bytes may be a classifier of float32 with {left // (4 * (width + 1))} classes, or one of "
            f"1 bit with {(left - _STATISTICS) * 8 // width}. Give bihead=true or bihead=false."
        )
    asked = {None: "classifier", False: "classifier of float32", True: "classifier of 1 bit"}[told]
    raise FileError(
        f"{left} bytes are left after {reader.asked}, which is no {asked} of {width} channels. Give the bits and the "
        "bottleneck the file was trained with, and the model's own size."
    )
