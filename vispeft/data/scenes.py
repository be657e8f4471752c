"""Generated scenes of balls, boxes and cylinders in a room, with exact labels for each pixel.

A scene is a function of (seed, index) only; its size changes just the resolution. It is ray-cast: one ray through the
centre of each pixel, and one to the light. Colours and patterns are independent of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vispeft.data.facts import ImageFacts
from vispeft.data.label_files import find_borders
from vispeft.data.listed import ListedData
from vispeft.data.listing import Listing
from vispeft.data.masks import ListedMasks, MaskCoding, MaskFacts
from vispeft.data.palettes import Colour
from vispeft.data.segmentation import SegmentationData
from vispeft.data.sources import Source
from vispeft.errors import ConfigError

__all__ = [
    "COLOURS",
    "SCENE_CLASSES",
    "SCENE_PARTS",
    "GeneratedScenes",
    "Scene",
    "SceneSource",
    "ScenesData",
    "render_scene",
]

VERSION = 1
"""Version of the generator, incremented whenever the same seed gives a different scene."""

SCENE_CLASSES = ("wall", "floor", "ball", "box", "cylinder")
SCENE_PARTS = (
    "none",
    "upper half of a ball",
    "lower half of a ball",
    "top of a box",
    "side of a box",
    "top of a cylinder",
    "side of a cylinder",
)
COLOURS: tuple[Colour, ...] = ((128, 128, 128), (166, 118, 29), (231, 41, 138), (27, 158, 119), (117, 112, 179))

VIEW = 60.0
"""Field of view along the longer side, in degrees."""
AMBIENT = 0.35
"""Fraction of the light in shadows."""
NEAR = 1e-4
"""Smallest distance of a hit in metres, so that a ray to the light does not hit its own origin."""

FACES = 6
"""Largest number of faces of an object."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Scene:
    """A rendered scene with its per-pixel labels."""

    image: Tensor
    """Colours, uint8 (3, H, W)."""
    mask: Tensor
    """Index into `SCENE_CLASSES`, uint8 (H, W)."""
    parts: Tensor
    """Index into `SCENE_PARTS`, uint8 (H, W); equal for all objects of a class."""
    depth: Tensor
    """Depth along the camera's axis in metres, float32 (H, W)."""
    normals: Tensor
    """Outward unit normals, float32 (3, H, W): components right, up, and towards the camera."""
    edges: Tensor
    """Whether the pixel to the right or below shows another object or face, bool (H, W)."""


@lru_cache(maxsize=8)  # an image and its mask are requested in sequence
def render_scene(seed: int, index: int, size: tuple[int, int]) -> Scene:
    """Render a scene.

    Args:
        seed: Seed of the set of scenes, from 0.
        index: Index of the scene, from 0.
        size: Height and width in pixels.
    """
    random = np.random.default_rng([VERSION, seed, index])
    things = _furnish(random)
    camera, turn = _camera(random)
    light = _unit(np.array([[random.uniform(-1, 1)], [random.uniform(0.8, 1.6)], [random.uniform(-1.2, -0.2)]]))
    rays = _rays(size)
    distance, which = _first_hit(things, camera, turn @ rays)
    points = camera + distance * (turn @ rays)
    seen = _look(things, which, points)
    lit = np.maximum((light * seen["normals"]).sum(0), 0) * ~_shadowed(things, points, light)
    colours = seen["colours"] * (AMBIENT + (1 - AMBIENT) * lit)
    normals = turn.T @ seen["normals"] * [[1], [1], [-1]]
    return Scene(
        image=_as_map((colours * 255).round(), size, np.uint8),
        mask=_as_map(seen["classes"], size, np.uint8),
        parts=_as_map(seen["parts"], size, np.uint8),
        depth=_as_map(distance * rays[2], size, np.float32),
        normals=_as_map(normals, size, np.float32),
        edges=torch.from_numpy(find_borders((which * FACES + seen["faces"]).reshape(size))),
    )


def _as_map(values: Array, size: tuple[int, int], kind: type) -> Tensor:
    """Reshape values of all pixels (..., H * W) to (..., H, W)."""
    return torch.from_numpy(values.reshape(*values.shape[:-1], *size).astype(kind))


# ------------------------------------------------------------------ things Vectors are columns, (3, N), for which numpy
# sums components fast. The room's axes point right, up, and away from the camera.


@dataclass(frozen=True)
class _Thing:
    """A unit solid, scaled, rotated about the vertical axis and translated."""

    kind: int
    """Index into `SCENE_CLASSES`."""
    centre: Array
    """Position of its centre in metres (3, 1)."""
    scale: Array
    """Half of its width, height and length in metres (3, 1)."""
    turn: Array
    """Rotation from the room's axes to its own (3, 3)."""
    pattern: Callable[[Array], Array]
    """Colours (3, N) in [0, 1] at points (3, N), given in metres from its centre along its own axes."""

    def inward(self, points: Array) -> Array:
        """Transform points in the room to the unit solid's coordinates."""
        return self.turn @ (points - self.centre) / self.scale

    def hit(self, origins: Array, rays: Array) -> Array:
        """Return the distance to the first hit along each ray (3, N), in ray lengths (N,); infinity for none."""
        # Scaling changes lengths but not the fraction of a ray, so the result needs no inverse scaling.
        with np.errstate(divide="ignore", invalid="ignore"):
            return _HITS[self.kind](self.inward(origins), self.turn @ rays / self.scale)


def _wall(origins: Array, rays: Array) -> Array:
    """Intersect the plane z = 0 from the camera's side."""
    return _beyond(-origins[2] / rays[2], rays[2] > 0)


def _floor(origins: Array, rays: Array) -> Array:
    """Intersect the plane y = 0 from above."""
    return _beyond(-origins[1] / rays[1], rays[1] < 0)


def _round(origins: Array, rays: Array) -> Array:
    """Intersect the unit ball, or the unit circle in two dimensions, from outside: nearer root of |o + t r| = 1."""
    a, b = (rays**2).sum(0), (origins * rays).sum(0)
    inside = b**2 - a * ((origins**2).sum(0) - 1)
    return _beyond((-b - np.sqrt(np.maximum(inside, 0))) / a, inside > 0)


def _box(origins: Array, rays: Array) -> Array:
    """Intersect the cube from -1 to 1: at the last of the planes entered, if none has been left before."""
    one, other = (-1 - origins) / rays, (1 - origins) / rays
    entered, left = np.fmin(one, other).max(0), np.fmax(one, other).min(0)
    return _beyond(entered, entered <= left)


def _cylinder(origins: Array, rays: Array) -> Array:
    """Intersect the upright cylinder of radius 1 from -1 to 1."""
    level = [0, 2]
    side = _round(origins[level], rays[level])
    height = origins[1] + np.where(np.isfinite(side), side, 0) * rays[1]
    side = np.where(np.abs(height) <= 1, side, np.inf)
    lid = (np.where(rays[1] < 0, 1, -1) - origins[1]) / rays[1]
    place = origins[level] + lid * rays[level]
    return np.minimum(side, _beyond(lid, (place**2).sum(0) <= 1))


def _beyond(distance: Array, met: Array) -> Array:
    return np.where(met & (distance > NEAR), distance, np.inf)


_HITS = (_wall, _floor, _round, _box, _cylinder)


def _surface(thing: _Thing, points: Array) -> tuple[Array, Array, Array]:
    """Return outward normals (3, N) in the room, faces and parts (N,) at points on an object."""
    own = thing.inward(points)
    normals, count = np.zeros_like(own), own.shape[1]
    faces, parts = np.zeros(count, np.int64), np.zeros(count, np.int64)
    name = SCENE_CLASSES[thing.kind]
    if name == "wall":
        normals[2] = -1
    elif name == "floor":
        normals[1] = 1
    elif name == "ball":
        normals, parts = own, np.where(own[1] >= 0, 1, 2)
    elif name == "box":
        axis, each = np.abs(own).argmax(0), np.arange(count)
        normals[axis, each] = np.sign(own[axis, each])
        faces, parts = axis * 2 + (own[axis, each] > 0), np.where(axis == 1, 3, 4)
    else:
        # A point on the side lies on the unit circle up to rounding, one on a lid lies inside it.
        lid = np.abs(own[1]) > np.hypot(own[0], own[2])
        normals = np.where(lid, np.sign(own) * _UP, own * (1 - _UP))
        faces, parts = lid.astype(np.int64), np.where(lid, 5, 6)
    return thing.turn.T @ _unit(normals / thing.scale), faces, parts


_UP = np.array([[0.0], [1.0], [0.0]])


# ------------------------------------------------------------------ a room


def _furnish(random: np.random.Generator) -> list[_Thing]:
    """Create wall and floor, and place objects on the floor that do not touch."""
    one, upright = np.ones((3, 1)), np.eye(3)
    behind = np.array([[0], [0], [random.uniform(7, 10)]])
    room = [
        _Thing(0, behind, one, upright, _pattern(random)),
        _Thing(1, np.zeros((3, 1)), one, upright, _pattern(random)),
    ]
    taken: list[tuple[float, float, float]] = []
    things = []
    for _ in range(int(random.integers(5, 13))):
        kind = int(random.integers(2, len(SCENE_CLASSES)))
        scale = random.uniform(0.25, 0.7, 3)
        if SCENE_CLASSES[kind] == "ball":
            scale[:] = scale[0]
        elif SCENE_CLASSES[kind] == "cylinder":
            scale[2] = scale[0]
        spread = float(np.hypot(scale[0], scale[2]))
        # Always drawn, so that an object without room does not change the others.
        z, angle = random.uniform(2.8, 6.5), random.uniform(0, np.pi)
        x, pattern = random.uniform(-0.55, 0.55) * z, _pattern(random)
        if any(np.hypot(x - a, z - b) < spread + far for a, b, far in taken):
            continue
        taken.append((x, z, spread))
        things.append(_Thing(kind, np.array([[x], [scale[1]], [z]]), scale[:, None], _about_vertical(angle), pattern))
    return [*room, *things]


def _pattern(random: np.random.Generator) -> Callable[[Array], Array]:
    """Draw a pattern of two colours: none, squares, stripes or waves."""
    kind = int(random.integers(4))
    first, second = random.uniform(0.1, 1, (2, 3, 1))
    step = random.uniform(0.15, 0.5)
    along = _unit(random.normal(size=(3, 1)))
    waves, phases = random.normal(size=(3, 3)) * 2 / step, random.uniform(0, 2 * np.pi, (3, 1))

    def share(points: Array) -> Array:
        if kind == 0:
            return np.zeros((1, points.shape[1]))
        if kind == 1:
            # Offset by half a millimetre, so that a face does not lie on the border of two squares.
            return np.floor((points + 5e-4) / step).sum(0, keepdims=True) % 2
        if kind == 2:
            return np.floor(along.T @ points / step) % 2
        return np.sin(waves @ points + phases).mean(0, keepdims=True) * 0.5 + 0.5

    return lambda points: first + share(points) * (second - first)


def _about_vertical(angle: float) -> Array:
    return np.array([[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]])


def _camera(random: np.random.Generator) -> tuple[Array, Array]:
    """Draw the camera's position (3, 1) and orientation, from its axes to the room's (3, 3)."""
    place = np.array([[0.0], [random.uniform(1.6, 2.6)], [0.0]])
    down, aside = np.radians(random.uniform(10, 22)), np.radians(random.uniform(-8, 8))
    pitch = np.array([[1, 0, 0], [0, np.cos(down), -np.sin(down)], [0, np.sin(down), np.cos(down)]])
    return place, _about_vertical(aside) @ pitch


def _rays(size: tuple[int, int]) -> Array:
    """Return unit vectors (3, H * W) through the pixel centres, in the camera's axes: right, up, away."""
    height, width = size
    side = 2 * np.tan(np.radians(VIEW / 2)) / max(size)
    right = (np.arange(width) + 0.5 - width / 2) * side
    up = (height / 2 - np.arange(height) - 0.5) * side
    return _unit(np.stack([*np.meshgrid(right, up), np.ones(size)]).reshape(3, -1))


def _unit(vectors: Array) -> Array:
    return vectors / np.sqrt((vectors**2).sum(0))


# ------------------------------------------------------------------ looking


def _first_hit(things: Sequence[_Thing], origin: Array, rays: Array) -> tuple[Array, Array]:
    """Return the distance to the first hit of each ray, and the index of the object that is hit."""
    distances = np.stack([thing.hit(origin, rays) for thing in things])
    which = distances.argmin(0)
    return distances[which, np.arange(len(which))], which


def _shadowed(things: Sequence[_Thing], points: Array, light: Array) -> Array:
    """Return which points (3, N) are in shadow; wall and floor cast none."""
    dark = np.zeros(points.shape[1], bool)
    for thing in things[2:]:
        dark |= np.isfinite(thing.hit(points, light))
    return dark


def _look(things: Sequence[_Thing], which: Array, points: Array) -> dict[str, Array]:
    """Collect the labels of points on objects: (N,), or (3, N) for normals and colours."""
    count = len(which)
    seen: dict[str, Array] = {name: np.zeros(count, np.int64) for name in ("classes", "faces", "parts")}
    seen |= {name: np.zeros((3, count)) for name in ("normals", "colours")}
    for position, thing in enumerate(things):
        here = np.flatnonzero(which == position)
        if len(here):
            there = points[:, here]
            seen["classes"][here] = thing.kind
            seen["normals"][:, here], seen["faces"][here], seen["parts"][here] = _surface(thing, there)
            seen["colours"][:, here] = thing.pattern(thing.turn @ (there - thing.centre))
    return seen


# ------------------------------------------------------------------ data module


class SceneSource(Source):
    """Scenes by index; `read` returns the image or, with `masks`, the mask."""

    def __init__(self, seed: int, numbers: Sequence[int], size: tuple[int, int], masks: bool = False) -> None:
        """Store the settings of the scenes.

        Args:
            seed: Seed of the set of scenes.
            numbers: Indices of the scenes.
            size: Height and width in pixels.
            masks: Whether to return masks (H, W) instead of images (3, H, W).
        """
        self.seed, self.numbers, self.size, self.masks = seed, list(numbers), size, masks

    def __len__(self) -> int:
        """Count the scenes."""
        return len(self.numbers)

    def name(self, index: int) -> str:
        """Return the index of a scene as text."""
        return f"scene {self.numbers[index]}"

    def scene(self, index: int) -> Scene:
        """Render a scene.

        Args:
            index: Its position.
        """
        return render_scene(self.seed, self.numbers[index], self.size)

    def read(self, index: int) -> Tensor:
        """Render a scene and return its image or its mask."""
        scene = self.scene(index)
        return scene.mask if self.masks else scene.image

    def take(self, indices: Sequence[int]) -> SceneSource:
        """Return a source of some of the scenes."""
        return SceneSource(self.seed, [self.numbers[index] for index in indices], self.size, self.masks)

    def facts(self, full: bool) -> list[ImageFacts]:
        """Return facts about every scene; with `full`, masks are rendered and counted."""
        return [self._facts(index, full) for index in range(len(self))]

    def digest(self, index: int) -> str:
        """Identify a scene without rendering it.

        Args:
            index: Its position.
        """
        height, width = self.size
        return f"scene {VERSION} {self.seed} {self.numbers[index]} {height} x {width}"

    def _facts(self, index: int, full: bool) -> ImageFacts:
        height, width = self.size
        digest = self.digest(index)
        if not self.masks:
            return ImageFacts(width=width, height=height, mode="RGB", digest=digest)
        counts = self.read(index).flatten().bincount().tolist() if full else []
        codes = [(value, pixels) for value, pixels in enumerate(counts) if pixels]
        facts = MaskFacts(width=width, height=height, mode="L", digest=digest, codes=codes)
        return facts.read_with(MaskCoding(num_classes=len(SCENE_CLASSES)))


class GeneratedScenes(ListedData):
    """Base of the data modules of generated scenes; no files are read or written."""

    def __init__(
        self,
        *,
        images: int = 300,
        scene_size: int | tuple[int, int] = 128,
        scene_seed: int = 0,
        check: Literal["full", "fast"] = "fast",
        **settings: Any,
    ) -> None:
        """Validate and store the settings.

        Args:
            images: Number of scenes in all splits.
            scene_size: Height and width of a scene in pixels, or one number for both.
            scene_seed: Seed of the set of scenes; different seeds share no scene.
            check: With ``full``, all scenes are rendered and their labels counted before training.
            settings: Settings of the other base class, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__(check=check, **settings)
        owner = type(self).__name__
        height, width = (scene_size, scene_size) if isinstance(scene_size, int) else scene_size
        for name, value, least in (("images", images, 3), ("scene_size", min(height, width), 8)):
            if value < least:
                raise ConfigError(f"{owner}({name}={value}): at least {least} is needed.")
        if scene_seed < 0:
            raise ConfigError(f"{owner}(scene_seed={scene_seed}): a whole number from 0 is needed.")
        self.images, self.scene_size, self.scene_seed = images, (height, width), scene_seed

    @property
    def place(self) -> str:
        """Location of the data, for messages."""
        return f"{self.images} generated scenes"


class ScenesData(GeneratedScenes, SegmentationData):
    """Generated scenes with exact masks of five classes."""

    @property
    def own_palette(self) -> tuple[Colour, ...]:
        """Colour of each class."""
        return COLOURS

    def read(self) -> Listing:
        """List the scenes."""
        numbers = range(self.images)
        image, mask = (SceneSource(self.scene_seed, numbers, self.scene_size, masks) for masks in (False, True))
        return Listing(self.place, SCENE_CLASSES, {"train": ListedMasks(image, mask)}, target="mask")
