"""Dense targets: what a data set offers for one dense task, read by losses, metrics, decoders and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError

__all__ = ["IGNORE", "DenseTarget", "TargetKind"]


TargetKind = Literal["classes", "saliency", "edge", "normals", "depth", "values"]


@dataclass(frozen=True, kw_only=True)
class DenseTarget:
    """One dense task of a data set.

    Batches hold its targets by kind, all with `IGNORE` for pixels without a label:

    * classes: int64 (B, h, w), class indices;
    * saliency, edge: float32 (B, 1, h, w), 0 or 1;
    * normals: float32 (B, 3, h, w), unit vectors; the three values of a pixel are `IGNORE` together;
    * depth: float32 (B, 1, h, w), metres;
    * values: float32 (B, 1, h, w), any scale, such as a relief in [0, 1].
    """

    kind: TargetKind
    """Kind of the targets, which determines loss, metrics and picture."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, for ``classes`` alone."""
    palette: tuple[tuple[int, int, int], ...] = ()
    """Colour of each class, red, green and blue from 0 to 255; empty for a generated palette."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If the kind is unknown, or class names are missing or given to another kind.
        """
        kinds = get_args(TargetKind)
        if self.kind not in kinds:
            raise ConfigError(f"DenseTarget(kind={self.kind!r}): choose {', '.join(map(repr, kinds))}.")
        if (self.kind == "classes") != bool(self.class_names):
            raise ConfigError(
                f"DenseTarget(kind={self.kind!r}, class_names={self.class_names!r}): give class names for the kind "
                "'classes', and for no other."
            )

    @property
    def channels(self) -> int:
        """Number of scores or values per pixel that a decoder computes."""
        return {"classes": len(self.class_names), "normals": 3}.get(self.kind, 1)
