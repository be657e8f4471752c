"""Folders of images with folders of labels beside them, inside of which, or around which, are those of the splits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vispeft.data.folder import find_splits, leave_beside
from vispeft.data.trees import LeftOut, list_folder
from vispeft.errors import DataError

__all__ = ["find_places"]

Places = dict[str, tuple[str, ...]]
"""By split, the folder of its images and those of its labels, in the order in which they were asked for."""


def find_places(root: Path, images: str, labels: Sequence[str], left: LeftOut, settings: str) -> Places:
    """Find the folders of images and labels of each split.

    They are ``images/train`` or ``train/images``, with the names of `find_splits`; images without such folders are all
    of train. Some of the folders of labels may be missing, but not all.

    Args:
        root: Folder that they are in.
        images: Name of the folder of images.
        labels: Names of the folders of labels.
        left: Receives what is left out.
        settings: Settings that name the folders, for messages.

    Raises:
        DataError: If there are no such folders, or their names leave open which split is meant.
    """
    places = tuple(str(root / name) for name in (images, *labels))
    if _complete(places):
        found = _inside(places, root, left)
    else:
        found = _around(root, (images, *labels), left) if os.path.isdir(root) else {}
    if "train" not in found:
        there = ", ".join(sorted(os.listdir(root))[:6]) if os.path.isdir(root) else ""
        names = [images, *labels]
        wanted = (_listed(names), _listed([f"{name}/train" for name in names]), _listed([f"train/{n}" for n in names]))
        raise DataError(
            f"{root} needs the folders {wanted[0]}, or {wanted[1]}, or {wanted[2]}; found {there or 'nothing'}. Set "
            f"{settings}."
        )
    return found


def _complete(places: Sequence[str]) -> bool:
    """Whether the folder of images and one of the others are there."""
    return os.path.isdir(places[0]) and any(map(os.path.isdir, places[1:]))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _inside(places: tuple[str, ...], root: Path, left: LeftOut) -> Places:
    """Find the folders of the splits inside those of images and labels; without any, all is train."""
    images, *labels = places
    folders, files = list_folder(images, LeftOut(root))
    splits = find_splits(folders, images)
    if not splits:
        return {"train": places}
    leave_beside({name: path for name, path in folders.items() if path not in splits.values()}, files, left)
    names = {split: os.path.basename(place) for split, place in splits.items()}
    for place in filter(os.path.isdir, labels):
        if os.path.realpath(images) != os.path.realpath(place):
            others, files = list_folder(place, left)
            leave_beside({name: path for name, path in others.items() if name not in names.values()}, files, left)
    # Same folder name for the labels; if it is missing, every label of the split is reported.
    return {split: (place, *(os.path.join(label, names[split]) for label in labels)) for split, place in splits.items()}


def _around(root: Path, names: Sequence[str], left: LeftOut) -> Places:
    """Find the folders of images and labels inside those of the splits."""
    folders, files = list_folder(root, left)
    splits = find_splits(folders, root)
    found = {split: tuple(os.path.join(place, name) for name in names) for split, place in splits.items()}
    whole = {split: places for split, places in found.items() if _complete(places)}
    read = {splits[split] for split in whole}
    leave_beside({name: path for name, path in folders.items() if path not in read}, files, left)
    return whole
