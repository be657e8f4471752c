"""Rows of a batch that go through different adapters: who takes which, and how parts of a batch are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispeft.errors import ConfigError

__all__ = ["Rows", "check_batch", "in_parts", "rows_of", "widened"]

Names = tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """The adapter of each image of a batch. Make it with `rows_of`."""

    names: Names
    """One adapter for each image; None for the base."""
    members: Names
    """The different ones among them."""
    index: Tensor
    """Place of each image's adapter in `members`, (B,) int64."""
    images: tuple[Tensor, ...]
    """The images of each member, as int64 indices."""
    order: Tensor
    """Place of each image among the images of all members, one member after the other, (B,) int64."""
    parts: tuple[tuple[Tensor, Any], ...] = ()
    """Where adapters cannot share a pass: the images of each part as int64 indices, and its `Route`. Else empty."""


def rows_of(
    names: Names, members: Names, device: torch.device, parts: Sequence[tuple[Sequence[int], Any]] = ()
) -> Rows:
    """Sort the images of a batch by adapter.

    Args:
        names: One adapter for each image; None for the base.
        members: The different ones among them, in any order.
        device: Where the model is.
        parts: Images and route of each part of the batch that is run apart from the others.
    """
    place = {name: number for number, name in enumerate(members)}
    index = [place[name] for name in names]
    images = [[image for image, found in enumerate(index) if found == member] for member in range(len(members))]
    # Stable: images of one member keep their order.
    order = torch.tensor([image for own in images for image in own], device=device).argsort()
    return Rows(
        names,
        members,
        torch.tensor(index, device=device),
        tuple(torch.tensor(own, dtype=torch.long, device=device) for own in images),
        order,
        tuple((torch.tensor(own, device=device), route) for own, route in parts),
    )


def check_batch(rows: Rows, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the batch among the arguments of a forward pass, after comparing its length with the rows.

    Args:
        rows: The adapter of each image.
        args: The arguments by position; the first one is the batch.
        kwargs: The arguments by name.

    Raises:
        ConfigError: If there is another number of rows, or no batch.
    """
    batch = args[0] if args else kwargs.get("x", kwargs.get("images"))
    if not isinstance(batch, Tensor):
        raise ConfigError("A model whose rows take different adapters was called without a batch of images.")
    if batch.shape[0] != len(rows.names):
        raise ConfigError(
            f"using(rows=...) was given {len(rows.names)} rows, and the batch has {batch.shape[0]} images. Give one "
            "adapter, or None for the base, for each image."
        )
    return batch


def in_parts(
    run: Callable[..., Any], rows: Rows, batch: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], scores: bool
) -> Any:
    """Run each part of a batch under its route, and put the results of all parts in the order of the images.

    Args:
        run: Runs a part; takes its route, its images and the other arguments.
        rows: The parts.
        batch: (B, ...).
        args: The other arguments, by position.
        kwargs: The other arguments, by name.
        scores: Whether the results are scores of classes, of which parts may have different numbers: the missing ones
            are filled with minus infinity, a probability of zero.

    Raises:
        ConfigError: If another argument is a tensor, or the results of the parts cannot be joined.
    """
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        raise ConfigError(
            "The adapters of these rows run in parts of the batch, which cannot share a further tensor such as a mask. "
            "Run them one after the other."
        )
    found = [run(route, batch[images], *args, **kwargs) for images, route in rows.parts]
    return _joined(found, torch.cat([images for images, _ in rows.parts]).argsort(), scores)


def _joined(found: Sequence[Any], order: Tensor, scores: bool) -> Any:
    """Join the results of all parts, inside of lists, tuples and dictionaries too."""
    first = found[0]
    if isinstance(first, Tensor):
        return torch.cat(widened(found) if scores else _alike(found))[order]
    if isinstance(first, dict) and all(set(part) == set(first) for part in found):
        return {key: _joined([part[key] for part in found], order, scores) for key in first}
    if isinstance(first, list | tuple) and not hasattr(first, "_fields") and len({len(part) for part in found}) == 1:
        return type(first)(_joined(list(values), order, scores) for values in zip(*found, strict=True))
    raise ConfigError(
        f"The adapters of these rows run in parts of the batch, and a {type(first).__name__} of each part cannot be "
        "joined. Run the adapters one after the other."
    )


def _alike(found: Sequence[Tensor]) -> list[Tensor]:
    shapes = sorted({tuple(part.shape[1:]) for part in found})
    if len(shapes) > 1:
        raise ConfigError(
            f"The adapters of these rows give features of several shapes: {', '.join(map(str, shapes))} for an image. "
            "One tensor cannot hold them. Run them one after the other, or take the scores of classes: model(images)."
        )
    return list(found)


def widened(found: Sequence[Tensor]) -> list[Tensor]:
    """Fill scores up to the widest with minus infinity, in their common type.

    Args:
        found: Tensors (..., classes), of different numbers of classes.
    """
    width = max(part.shape[-1] for part in found)
    dtype = found[0].dtype
    for part in found:
        dtype = torch.promote_types(dtype, part.dtype)
    return [F.pad(part.to(dtype), (0, width - part.shape[-1]), value=-torch.inf) for part in found]
