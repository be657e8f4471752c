"""Files of class embeddings: what the text encoder of a CLIP says of each class, for classifying images by it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vispeft.errors import ConfigError, FileError, counted, near_names
from vispeft.storage.disk import write_atomically

__all__ = ["SCHEMA", "ClassEmbeddings", "check_order"]

logger = logging.getLogger(__name__)

SCHEMA = "1"
"""Version of the form of the files."""
KIND = "vispeft class embeddings"
"""Value of ``kind`` in the metadata."""
UNIT = 1e-3
"""Largest difference of the norm of an embedding from one."""
LARGEST_SCALE = 1000.0
"""Largest multiplier of cosines; CLIP's training keeps it at 100 or below (arXiv 2103.00020, section 2.5)."""


@dataclass(frozen=True, eq=False)
class ClassEmbeddings:
    """Embeddings of classes in the joint space of a CLIP, and the way of an image's features there.

    An image with the features f of the visual tower has the scores ``scale * cos(P f, t_c)`` (arXiv 2103.00020).
    """

    embeddings: Tensor
    """float32 (classes, E), each of norm one."""
    class_names: tuple[str, ...]
    """Names of the classes, in this order."""
    scale: float
    """Multiplier of the cosines: the exponential of CLIP's ``logit_scale``."""
    projection: Tensor
    """float32 (E, features): P, from the pooled features of the timm tower to the joint space."""
    source: str = ""
    """What made the embeddings, for people."""

    def __post_init__(self) -> None:
        """Check shapes and values.

        Raises:
            ConfigError: If they do not fit each other or are not finite.
        """
        fault = self._fault()
        if fault is not None:
            raise ConfigError(f"These class embeddings cannot be used: {fault}.")

    def _fault(self) -> str | None:
        tensors = {"embeddings": self.embeddings, "projection": self.projection}
        for name, tensor in tensors.items():
            if tensor.ndim != 2 or not tensor.numel() or tensor.dtype != torch.float32:
                return f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; a float32 matrix is needed"
            if not tensor.isfinite().all():
                return f"{name} has values that are not finite"
        if len(self.projection) != self.embeddings.shape[1]:
            wide = self.embeddings.shape[1]
            return f"embeddings have {wide} dimensions, and the projection gives {len(self.projection)}"
        names = self.class_names
        if len(names) != len(self.embeddings) or not all(isinstance(name, str) and name for name in names):
            return f"there are {counted(len(names), 'class name')} for {counted(len(self.embeddings), 'embedding')}"
        if len(set(names)) < len(names):
            return f"the class {next(name for name in names if names.count(name) > 1)!r} is there twice"
        off = (self.embeddings.norm(dim=1) - 1).abs().max()
        if off > UNIT:
            return f"the norm of an embedding differs from one by {float(off):.2g}; divide each by its norm"
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not number or not 0 < self.scale <= LARGEST_SCALE:
            return f"the scale is {self.scale!r}; it lies above 0 and is at most {LARGEST_SCALE:g}"
        return None

    def scores(self, features: Tensor) -> Tensor:
        """Compute the scores of images, (B, classes).

        Args:
            features: Pooled features of the visual tower in front of its projection, (B, features).
        """
        projection, embeddings = self.projection.to(features), self.embeddings.to(features)
        return self.scale * F.linear(F.normalize(F.linear(features, projection), dim=-1), embeddings)

    def linear_weight(self, features: Tensor) -> Tensor:
        """Compute the weight of the linear classifier nearest to the scores: with the mean norm in place of each norm.

        Args:
            features: Features of some images, (N, features).

        Returns:
            (classes, features).
        """
        norm = F.linear(features, self.projection.to(features)).norm(dim=-1).mean()
        return (self.scale / norm * self.embeddings.to(features)) @ self.projection.to(features)

    def ordered(self, names: Sequence[str]) -> ClassEmbeddings:
        """Return the embeddings of some classes, in an order.

        Args:
            names: Names of the classes.

        Raises:
            ConfigError: If one has no embedding.
        """
        place = {name: index for index, name in enumerate(self.class_names)}
        missing = [name for name in names if name not in place]
        if missing:
            raise ConfigError(
                f"{counted(len(missing), 'class')} of the data, first {missing[0]!r}, have no embedding in the file"
                f"{f' ({self.source})' if self.source else ''}. {near_names(missing[0], place)} Write a file of the "
                "data's class names."
            )
        rows = self.embeddings[[place[name] for name in names]]
        return ClassEmbeddings(rows, tuple(names), self.scale, self.projection, self.source)

    def save(self, path: str | Path) -> None:
        """Write the file: safetensors with ``embeddings`` and ``projection``, and the rest in its metadata.

        Args:
            path: The file.

        Raises:
            FileError: If it cannot be written.
        """
        notes = {
            "kind": KIND,
            "schema": SCHEMA,
            "class_names": json.dumps(list(self.class_names)),
            "scale": repr(float(self.scale)),
            "source": self.source,
        }
        tensors = {"embeddings": self.embeddings.contiguous(), "projection": self.projection.contiguous()}
        write_atomically({Path(path): save(tensors, notes)})

    @classmethod
    def load(cls, path: str | Path) -> ClassEmbeddings:
        """Read a file that `save`, or another program, wrote.

        Args:
            path: The file.

        Raises:
            FileError: If it is missing, not of this form, or its values cannot be used.
        """
        if not Path(path).is_file():
            raise FileError(f"There is no file of class embeddings {str(path)!r}. vispeft encode-classes writes one.")
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise FileError(f"{path} cannot be read: {error}.") from error
        if notes.get("kind") != KIND or notes.get("schema") != SCHEMA:
            raise FileError(
                f"{path} is no file of class embeddings of schema {SCHEMA}: its metadata say kind "
                f"{notes.get('kind')!r} and schema {notes.get('schema')!r}."
            )
        if set(tensors) != {"embeddings", "projection"}:
            raise FileError(
                f"{path} has the tensors {', '.join(sorted(tensors)) or 'none'}; embeddings and projection are needed."
            )
        try:
            names: Any = json.loads(notes["class_names"])
            scale = float(notes["scale"])
            found = tuple(names) if isinstance(names, list) else ()
            return cls(
                tensors["embeddings"].float(),
                found,
                scale if math.isfinite(scale) else 0.0,
                tensors["projection"].float(),
                notes.get("source", ""),
            )
        except (KeyError, ValueError, RecursionError) as error:
            raise FileError(f"{path} has no readable {error}; class_names (JSON) and scale are needed.") from error
        except ConfigError as error:
            raise FileError(f"{path}: {error}") from error


def check_order(embeddings: ClassEmbeddings, names: Sequence[str], asked: str) -> None:
    """Refuse embeddings of the data's classes that are in another order.

    Args:
        embeddings: The embeddings.
        names: Names of the data's classes, in their order.
        asked: Who names them, for the message.

    Raises:
        ConfigError: If the order differs.
    """
    own = embeddings.class_names
    if tuple(names) == tuple(own):
        return
    if set(names) == set(own):
        first = next(index for index, pair in enumerate(zip(names, own, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"{asked} has the data's classes in another order: number {first} is {own[first]!r} there and "
            f"{names[first]!r} in the data. Write the file anew, with the names in the order of the data."
        )
    logger.warning(
        "%s has classes of other names than the data (first %r, and %r in the data); their order is taken to be equal.",
        asked,
        own[0],
        names[0],
    )
