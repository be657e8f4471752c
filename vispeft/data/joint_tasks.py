"""Joint transforms of an image and its labels for several dense tasks: flip, rotation, scale, resize, ignored pixels.

The steps, their order and their numbers are those of the public code for PASCAL-Context and NYUD-v2
(SimonVandenhende/Multi-Task-Learning-PyTorch, ``data/custom_transforms.py``, and scale-lab/MTLoRA, which derives from
it). Three things differ. Nearest pixels are those whose centres are nearest, so labels are not moved against images. A
pixel has a normal where the nearest pixel of the file has one, as cubic interpolation would smear normals over pixels
that have none. Images and normals that become smaller are low-pass filtered, as by timm's preprocessing; OpenCV's cubic
interpolation reads four pixels per axis, however far apart those of the result lie.

Labels are (C, H, W) as `vispeft.data.label_files` reads them. Normals have the components right, down and towards the
camera. Random numbers come from the global generators; call the transforms inside `vispeft.data.randomness.seeded`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vispeft.data.dense_targets import DenseTarget, TargetKind
from vispeft.data.label_files import labelled
from vispeft.data.masks import IGNORE
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError

__all__ = [
    "NYUD_AUGMENTATION",
    "PASCAL_AUGMENTATION",
    "JointTasks",
    "TaskAugmentation",
    "finish_label",
    "flip_label",
    "resize_label",
    "rotate_normals",
    "warp_image",
    "warp_label",
]

BESIDE_IGNORE = IGNORE + 2**-16
"""Depth in metres that stands for one of exactly `IGNORE`, which has a label: the next number in float32."""
SHORTEST = 1e-6
"""Length below which an interpolated normal has no direction."""


@dataclass(frozen=True, kw_only=True)
class TaskAugmentation:
    """Augmentation of training images and their labels for several tasks."""

    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotation: float = 0.0
    """Largest angle in degrees by which image and labels are rotated about the centre, either way."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random factor by which they are scaled about the centre; their size stays."""
    scales: tuple[float, ...] | None = None
    """Factors of which one is drawn, instead of a range."""
    border: Literal["zero", "ignore"] = "ignore"
    """Label of pixels that rotation and scale bring in from outside. ``zero`` is the public code: classes, saliency and
    edges become 0 there, so the network learns the first class for black corners. With ``ignore`` they have no label.
    Normals, depths and other values have none in both."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If one of them is invalid.
        """
        object.__setattr__(self, "scale", tuple(self.scale))
        if self.scales is not None:
            object.__setattr__(self, "scales", tuple(self.scales))
        faults = {
            "flip": (not 0 <= self.flip <= 1, "a probability from 0 to 1 is needed"),
            "rotation": (not 0 <= self.rotation <= 180, "an angle from 0 to 180 degrees is needed"),
            "scale": (
                len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf,
                "two factors above 0 are needed, smaller first",
            ),
            "scales": (
                self.scales is not None
                and (not self.scales or not 0 < min(self.scales) <= max(self.scales) < math.inf or self._ranges()),
                "factors above 0 are needed, and no range scale beside them",
            ),
            "border": (self.border not in ("zero", "ignore"), "the choices are zero and ignore"),
        }
        for name, (wrong, need) in faults.items():
            if wrong:
                raise ConfigError(f"TaskAugmentation({name}={getattr(self, name)!r}): {need}.")

    def _ranges(self) -> bool:
        return self.scale != (1.0, 1.0)

    def draw_scale(self) -> float:
        """Draw a factor."""
        if self.scales is not None:
            return self.scales[int(torch.randint(len(self.scales), ()))]
        return float(torch.empty(()).uniform_(*self.scale)) if self._ranges() else self.scale[0]

    def draw_angle(self) -> float:
        """Draw an angle in degrees, counterclockwise."""
        return float(torch.empty(()).uniform_(-self.rotation, self.rotation)) if self.rotation else 0.0


PASCAL_AUGMENTATION = TaskAugmentation(rotation=20.0, scale=(0.75, 1.25), border="zero")
"""That of the public code for PASCAL-Context."""
NYUD_AUGMENTATION = TaskAugmentation(scales=(1.0, 1.2, 1.5), border="zero")
"""That of the public code for NYUD-v2; with factors from 1 there is no border."""


class JointTasks:
    """Transform an image and its labels: uint8 (3, H, W) and labels as read in, those of a batch out, of one size."""

    def __init__(
        self,
        targets: Mapping[str, DenseTarget],
        preprocessing: Preprocessing,
        augmentation: TaskAugmentation | None = None,
        blank: Collection[str] = (),
    ) -> None:
        """Store the settings.

        Args:
            targets: The tasks, by name.
            preprocessing: Source of size, interpolation of images, mean and standard deviation.
            augmentation: Augmentation of training images; None for evaluation.
            blank: Tasks whose label is ignored as a whole where no class but the first is left.
        """
        self._kinds = {task: target.kind for task, target in targets.items()}
        self._size, self._blank, self._augmentation = preprocessing.size, frozenset(blank), augmentation
        self._resize, self._normalise = preprocessing.resize(), preprocessing.normalise()

    def __call__(self, image: Tensor, labels: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Transform an image and its labels.

        Args:
            image: uint8 (3, H, W).
            labels: Labels (C, H, W) by task; of classes also (H, W).

        Returns:
            The normalised image, float32 (3, h, w), and the labels in the form that `DenseTarget` describes, without
            the first dimension.
        """
        found = {task: label[None] if label.ndim == 2 else label for task, label in labels.items()}
        if self._augmentation is not None:
            image, found = self._augmented(image, found, self._augmentation)
        found = {
            task: finish_label(
                resize_label(label, self._kinds[task], self._size), self._kinds[task], task in self._blank
            )
            for task, label in found.items()
        }
        return self._normalise(self._resize(image)), found

    def _augmented(
        self, image: Tensor, labels: dict[str, Tensor], augmentation: TaskAugmentation
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if torch.rand(()) < augmentation.flip:
            image = F.horizontal_flip(image)
            labels = {task: flip_label(label, self._kinds[task]) for task, label in labels.items()}
        angle, scale = augmentation.draw_angle(), augmentation.draw_scale()
        if (angle, scale) == (0.0, 1.0):
            return image, labels
        ignore = augmentation.border == "ignore"
        return warp_image(image, angle, scale), {
            task: warp_label(label, self._kinds[task], angle, scale, ignore) for task, label in labels.items()
        }


# ------------------------------------------------------------------ steps


def flip_label(label: Tensor, kind: TargetKind) -> Tensor:
    """Mirror a label from left to right; the x component of normals changes its sign.

    Args:
        label: (C, H, W).
        kind: Its kind.
    """
    flipped = F.horizontal_flip(label)
    return flipped * flipped.new_tensor([-1, 1, 1]).view(3, 1, 1) if kind == "normals" else flipped


def warp_image(image: Tensor, angle: float, scale: float) -> Tensor:
    """Rotate and scale an image about its centre, with cubic interpolation and black outside.

    Args:
        image: uint8 (3, H, W); its size stays.
        angle: Degrees, counterclockwise.
        scale: Factor.
    """
    return _warp(image.float(), angle, scale, "bicubic").clamp(0, 255).round().to(torch.uint8)


def warp_label(label: Tensor, kind: TargetKind, angle: float, scale: float, ignore: bool = True) -> Tensor:
    """Rotate and scale a label about its centre, as `warp_image` does an image.

    Normals are rotated in the image plane. Depths are divided by the scale, as what is enlarged seems nearer; they stay
    in metres.

    Args:
        label: (C, H, W).
        kind: Its kind.
        angle: Degrees, counterclockwise.
        scale: Factor.
        ignore: Whether classes, saliency and edges have no label outside, instead of 0.
    """
    if kind == "normals":
        known = _warp(labelled(label, kind)[None].float(), angle, scale, "nearest")
        return rotate_normals(_warp(label, angle, scale, "bicubic"), angle) * known
    warped = _warp(label.float(), angle, scale, "nearest")
    if kind == "depth":
        return warped / scale
    if ignore or kind == "values":
        inside = _warp(torch.ones(1, *label.shape[-2:]), angle, scale, "nearest")
        warped = warped.masked_fill(inside == 0, IGNORE)
    return warped.to(label.dtype)


def rotate_normals(normals: Tensor, angle: float) -> Tensor:
    """Rotate normals in the image plane.

    The formula of the public code: with a = atan2(x, y), x = |(x, y)| sin(a + angle), y = |(x, y)| cos(a + angle). With
    y pointing down, this is the rotation that the pixels undergo.

    Args:
        normals: (3, H, W).
        angle: Degrees, counterclockwise.
    """
    x, y, z = normals
    around, length = torch.atan2(x, y) + math.radians(angle), torch.hypot(x, y)
    return torch.stack([length * around.sin(), length * around.cos(), z])


def resize_label(label: Tensor, kind: TargetKind, size: tuple[int, int]) -> Tensor:
    """Resize a label without keeping its aspect ratio: normals by cubic interpolation, others to the nearest pixel.

    Args:
        label: (C, H, W).
        kind: Its kind.
        size: Height and width.
    """
    if tuple(label.shape[-2:]) == tuple(size):
        return label
    if kind != "normals":
        return _nearest(label, size)
    known = _nearest(labelled(label, kind)[None].to(torch.uint8), size)
    smooth = F.resize(label, list(size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return smooth * known


def finish_label(label: Tensor, kind: TargetKind, blank: bool = False) -> Tensor:
    """Mark pixels without a label by `IGNORE`, and bring a label into the form of a batch.

    Args:
        label: (C, H, W) as read and transformed.
        kind: Its kind.
        blank: Whether a label of classes is ignored as a whole where no class but the first is left.

    Returns:
        Of classes int64 (H, W), of others float32 (C, H, W); normals have unit length.
    """
    if kind == "classes":
        classes = label[0].long()
        empty = blank and not bool(((classes != 0) & (classes != IGNORE)).any())
        return torch.full_like(classes, IGNORE) if empty else classes
    if kind == "normals":
        length = label.norm(dim=0, keepdim=True)
        return torch.where(length > SHORTEST, label / length.clamp(min=SHORTEST), torch.tensor(float(IGNORE))).float()
    if kind == "depth":
        metres = label.float().masked_fill(label == IGNORE, BESIDE_IGNORE)
        return metres.masked_fill(label <= 0, IGNORE)
    return label.float()


def _nearest(label: Tensor, size: tuple[int, int]) -> Tensor:
    return F.resize(label, list(size), interpolation=v2.InterpolationMode.NEAREST_EXACT)


def _warp(values: Tensor, angle: float, scale: float, mode: str) -> Tensor:
    """Rotate and scale float values (C, H, W) about the centre; zero outside.

    torchvision rotates tensors with nearest and linear interpolation alone.
    """
    height, width = values.shape[-2:]
    cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    # From a pixel of the result to the one it comes from, in halves of the width and height from the centre, down.
    inverse = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = affine_grid(inverse[None], [1, 1, height, width], align_corners=False)
    return grid_sample(values[None], grid, mode=mode, padding_mode="zeros", align_corners=False)[0]
