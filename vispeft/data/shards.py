"""WebDataset shards: tar files in which an image and its label share a name.

The shards are listed once and their images read in place. Any order is therefore free, and order and augmentation stay
functions of (seed, epoch, index) for any number of workers and after a resume, which the streaming readers of the
webdataset package, with their shuffle buffers, cannot guarantee.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vispeft.data.listed import ListedData
from vispeft.data.listing import Finding, ListedSplit, Listing, Target, gather
from vispeft.data.sources import ShardSource
from vispeft.data.targets import Entry, check_labelling, encode, whole_number
from vispeft.data.trees import EXTENSIONS, LeftOut, is_hidden
from vispeft.errors import ConfigError, DataError

__all__ = ["WebDatasetData", "expand"]

Member = tuple[str, str, int, int]
"""Shard, name inside it, offset and size in bytes."""


@dataclass
class _Odd:
    """Remarkable members of the shards of a split."""

    left: LeftOut
    lost: list[str] = field(default_factory=list)
    """Labels without an image."""
    several: list[str] = field(default_factory=list)
    """Images under the name of another one."""


class WebDatasetData(ListedData):
    """Images in tar shards in the WebDataset convention: ``000017.jpg`` next to ``000017.cls``.

    A label is the text of a member (``.cls``), or a key of a JSON member. Shards are uncompressed tar files on disk.
    """

    def __init__(
        self,
        *,
        train_shards: str,
        validation_shards: str | None = None,
        test_shards: str | None = None,
        label: str = "cls",
        target: Target = "class",
        names: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            train_shards: The training shards: a path, optionally with ``{000..012}``, ``{a,b}`` or ``*``.
            validation_shards: The validation shards; None draws validation images from train.
            test_shards: The test shards; None draws test images from train.
            label: Suffix of the member with the label, such as ``cls``, or ``json:KEY`` for a key of a JSON member.
            target: ``class`` (one class), ``multilabel`` (any number of labels) or ``regression`` (numbers).
            names: Names of the classes, the labels or the numbers; None derives them from the shards.
            settings: Settings of `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(**settings)
        check_labelling("WebDatasetData", target, names)
        ending, _, key = label.partition(":")
        if not ending or (ending == "json") != bool(key):
            raise ConfigError(
                f"WebDatasetData(label={label!r}): give the ending of a member, such as cls, or json:KEY for a key of "
                "a JSON member."
            )
        given = {"train": train_shards, "validation": validation_shards, "test": test_shards}
        self.patterns = {split: pattern for split, pattern in given.items() if pattern is not None}
        self.label, self.target, self.names = label, target, None if names is None else tuple(names)

    def read(self) -> Listing:
        """List the images of all shards; only headers and labels are read.

        Raises:
            DataError: If a shard is missing or is not an uncompressed tar file.
        """
        findings: list[Finding] = []
        left = LeftOut("")
        members: dict[str, dict[str, Member]] = {}
        entries: dict[str, list[Entry]] = {}
        for split, pattern in self.patterns.items():
            members[split], entries[split] = {}, []
            odd = _Odd(left)
            files = expand(pattern)
            for shard in files:
                self._list(shard, members[split], entries[split], odd)
            text = "Shards without the end mark of a tar file, so they were cut short; make or copy them again"
            findings += gather("error", {("shard-cut-short", text): [s.name for s in files if not _ended(s)]})
            text = f"Labels in {split} without an image of their name; is a member missing?"
            findings += gather("error", {("label-without-image", text): odd.lost})
            text = f"Several images under one name in {split}, so it cannot be told which one is meant"
            findings += gather("error", {("several-images", text): odd.several})
            if not entries[split]:
                raise DataError(f"There is no image in the shards {pattern}; looked for {', '.join(EXTENSIONS)}.")
        if left:
            findings.append(Finding(left.level, "left-out", left.line()))
        names, encoded, problems = encode(entries, self.target, self.names)
        shards = {os.path.abspath(place) for own in members.values() for place, _, _, _ in own.values()}
        root = None
        if len({os.path.basename(shard) for shard in shards}) < len(shards):
            root = os.path.commonpath([os.path.dirname(shard) for shard in shards])
        splits = {
            split: ListedSplit(ShardSource((members[split][entry.name] for entry in kept), root), targets)
            for split, (kept, targets) in encoded.items()
        }
        place = ", ".join(self.patterns.values())
        return Listing(place, names, splits, self.target, [*findings, *problems])

    def _list(self, shard: Path, members: dict[str, Member], entries: list[Entry], odd: _Odd) -> None:
        """List one shard: members with the same folder and name up to the first dot are one sample."""
        ending, _, key = self.label.partition(":")
        images: dict[str, Member] = {}
        labels: dict[str, Any] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    named = f"{shard.name}:{member.name}"
                    if member.isdir():
                        continue
                    if any(map(is_hidden, member.name.split("/"))):
                        odd.left.add("hidden", named)
                        continue
                    if not member.isfile():
                        odd.left.add("link", named)
                        continue
                    sample, _, kind = _parts(member.name)
                    # The whole suffix counts: a.seg.png next to a.jpg is a mask.
                    if f".{kind.lower()}" in EXTENSIONS:
                        if sample in images:
                            odd.several.append(named)
                        images[sample] = (str(shard), member.name, member.offset_data, member.size)
                    elif kind == ending:
                        content = archive.extractfile(member)
                        assert content is not None
                        labels[sample] = _label(content.read(), key if ending == "json" else None)
                    else:
                        odd.left.add("member", named)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(
                f"The shard {shard} cannot be read as a plain tar file ({error}). Compressed shards have to be "
                "unpacked (gunzip) first, so that images can be read in place."
            ) from error
        for sample, place in images.items():
            unique = f"{shard}:{sample}"
            members[unique] = place
            entries.append(Entry(unique, labels.get(sample), f"{shard.name}:{place[1]}"))
        odd.lost += [f"{shard.name}:{sample}" for sample in labels if sample not in images]


def expand(pattern: str) -> list[Path]:
    """Expand a pattern to its shards.

    Args:
        pattern: A path with ``{000..012}``, ``{a,b}`` or ``*``.

    Returns:
        The files, in order.

    Raises:
        DataError: If one of them is missing.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"{pattern} is no path. Shards are read in place, so they have to lie on a disk.")
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if index % 2 else [part] for index, part in enumerate(parts)]
    paths: list[Path] = []
    missing: list[str] = []
    for text in map("".join, itertools.product(*choices)):
        found = [path for path in (sorted(glob.glob(text)) if glob.has_magic(text) else [text]) if os.path.isfile(path)]
        paths += map(Path, found)
        missing += [] if found else [text]
    if missing:
        more = f", and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{pattern} names shards that are not there: {', '.join(missing[:3])}{more}.")
    return paths


def _choices(text: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if bounds is None:
        return text.split(",")
    return [str(number).zfill(len(bounds[1])) for number in range(int(bounds[1]), int(bounds[2]) + 1)]


def _ended(shard: Path) -> bool:
    """Whether a tar file has its end marker, two empty blocks."""
    with open(shard, "rb") as file:
        file.seek(max(0, shard.stat().st_size - 1024))
        return file.read() == bytes(1024)


def _parts(name: str) -> tuple[str, str, str]:
    folder, slash, file = name.rpartition("/")
    sample, dot, kind = file.partition(".")
    return folder + slash + sample, dot, kind


def _label(content: bytes, key: str | None) -> Any:
    """Read a label; None if there is none, which is reported later with all others."""
    text = content.decode("utf-8", errors="replace").strip()
    if key is None:
        return text or None
    try:
        return json.loads(text, parse_int=whole_number).get(key)
    except (ValueError, AttributeError, RecursionError):
        return None
