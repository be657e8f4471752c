"""Emoji as three vendors draw them: retrieval of characters that were never trained on.

The files are the archives of npm ``emoji-datasource-google`` 16.0.0 (Noto Emoji, Apache-2.0), of
``emoji-datasource-twitter`` 16.0.0 (Twemoji, CC BY 4.0: copyright Twitter, Inc. and other contributors) and of
``@lobehub/fluent-emoji-3d`` 1.1.0 (Fluent Emoji, MIT: copyright Microsoft Corporation). The packages are MIT.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from vispeft.data.augmentation import Augmentation
from vispeft.data.folder import ImageFolderData
from vispeft.data.images import UNREADABLE, why
from vispeft.data.made_once import make_once
from vispeft.data.metric_listing import RetrievalListing
from vispeft.data.metric_published import PublishedMetricData, in_halves, sort_classes
from vispeft.errors import DataError

__all__ = ["EmojiData", "draw_emoji"]

SCHEMA = 1
"""Version of the folder, incremented whenever images are made differently, so old ones are not reused."""

VENDORS = {
    "google": ("emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz", "package/img/google/64/"),
    "twitter": ("emoji-datasource-twitter@16.0.0", "emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/"),
}
"""Package, archive and folder of the drawings, by vendor."""
TABLE = "package/emoji.json"
"""Descriptions of all characters, in the archive of the first vendor."""
LEFT_OUT = ("Flags", "Component")
"""Categories that are no classes: flags differ between vendors in outline alone, components are parts of others."""
CODES = re.compile(r"[0-9A-F]{2,6}(-[0-9A-F]{2,6})*")
"""Code points of one character."""
NAMES = "names.json"
"""Names of the characters by code points, beside their folders."""
WHITE = (255, 255, 255, 255)


class EmojiData(PublishedMetricData):
    """1,599 characters, each drawn by three vendors; a class is a character.

    Ordered by their code points, the first 799 are training classes, the other 800 test classes; validation classes
    are the last ones of the training classes. Drawings are laid on white, once, in vispeft's cache folder. Training
    images are not flipped: some characters are the mirror images of others.
    """

    title = "The emoji set"
    counts = {"train": (2397, 799), "test": (2400, 800)}
    by_order: ClassVar[bool] = True

    def __init__(
        self,
        *,
        validation: float | None = 0.2,
        images_per_class: int = 2,
        crop_pct: float | None = None,
        augment: Augmentation | None = Augmentation(crop="resized", crop_area=(0.5, 1.0)),  # noqa: B008 - it is frozen
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            validation: With the protocol ``literature``, the share of the training classes for validation.
            images_per_class: Images of each class in a training batch, up to 3.
            crop_pct: Fraction of the image that the centre crop keeps; None keeps all.
            augment: Augmentation of training images.
            settings: `root`, the folder of the three archives, and other settings of `PublishedMetricData`,
                `MetricData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(
            validation=validation, images_per_class=images_per_class, crop_pct=crop_pct, augment=augment, **settings
        )

    @cached_property
    def folder(self) -> Path:
        """The folder of the drawings, which are made on first access.

        Raises:
            DataError: If an archive is missing or damaged.
        """
        return draw_emoji(self.root)

    def read(self) -> RetrievalListing:
        """List the drawings, making them first if needed."""
        found = ImageFolderData(root=str(self.folder)).read()
        names = json.loads((self.folder / NAMES).read_text(encoding="utf-8"))
        found = sort_classes(found, _numbers)
        found.class_names = tuple(f"{code} {names[code]}" for code in found.class_names)
        found.findings = []  # the list of names is no image, and is left out
        return self.published_listing(in_halves(found))


def draw_emoji(root: Path) -> Path:
    """Lay the drawings of all vendors on white, unless this was done before.

    Args:
        root: The folder of the three archives.

    Returns:
        A folder with a folder of drawings per character, named by its code points, and their names in ``names.json``.

    Raises:
        DataError: If an archive is missing or damaged.
        FileError: If the drawings cannot be written.
    """
    missing = [package for package, archive, _ in VENDORS.values() if not (root / archive).is_file()]
    if missing:
        raise DataError(
            f"{str(root)!r} lacks the archives of {', '.join(missing)}. Fetch them: mkdir -p {root}; npm pack "
            f"--pack-destination {root} "
            f"{' '.join(missing)}"
        )
    parts = [f"{SCHEMA}".encode()]
    for _, archive, _ in VENDORS.values():
        with (root / archive).open("rb") as file:
            parts.append(hashlib.file_digest(file, "sha256").digest())
    return make_once("emoji", parts, partial(_write, root=root), "150 MB")


def _write(home: Path, root: Path) -> None:
    """Write the drawings that all vendors have."""
    table, packed = {}, dict[str, dict[str, bytes]]()
    for vendor, (_, archive, folder) in VENDORS.items():
        packed[vendor] = {}
        for name, content in _members(root / archive, folder):
            if name == TABLE:
                table = _characters(content, root / archive)
            else:
                packed[vendor][Path(name).stem.lower()] = content
    for code, (image, _) in list(table.items()):
        if not all(image in drawings for drawings in packed.values()):
            del table[code]
            continue
        place = home / code
        place.mkdir()
        for vendor, drawings in packed.items():
            _on_white(drawings[image], f"{vendor}'s {image}").save(place / f"{vendor}.png")
    names = {code: name for code, (_, name) in table.items()}
    (home / NAMES).write_text(json.dumps(names, indent=1), encoding="utf-8")


def _members(archive: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """Yield the drawings and the table of an archive; nothing is unpacked to the disk."""
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.isfile() and (member.name.startswith(folder) or member.name == TABLE):
                    file = opened.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{archive} cannot be read ({error}). Remove and fetch it again.") from error


def _characters(content: bytes, archive: Path) -> dict[str, tuple[str, str]]:
    """Return the file name and the name of each character, by its code points."""
    try:
        found = {
            entry["unified"]: (Path(entry["image"]).stem.lower(), str(entry["name"] or entry["short_name"]).lower())
            for entry in json.loads(content)
            if entry["category"] not in LEFT_OUT
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{archive} has no readable table {TABLE} ({error}). Take the version named here.") from error
    # They become names of folders.
    if wrong := [code for code in found if not CODES.fullmatch(code)]:
        raise DataError(f"{archive}: {TABLE} has {wrong[0]!r} in place of code points. Take the version named here.")
    return found


def _numbers(code: str) -> list[int]:
    return [int(point, 16) for point in code.split("-")]


def _on_white(content: bytes, name: str) -> Image.Image:
    """Decode a drawing and lay it on white."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            drawn = image.convert("RGBA")
    except UNREADABLE as error:
        raise DataError(f"{name} is no readable image ({why(error)}). Fetch its archive again.") from error
    return Image.alpha_composite(Image.new("RGBA", drawn.size, WHITE), drawn).convert("RGB")
