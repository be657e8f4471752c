"""Predicting masks: index PNG, overlay and the pixels of each class, image after image."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from vispeft.cli.common import console
from vispeft.data.images import read_image
from vispeft.data.joint import EvaluationPair
from vispeft.data.palettes import Colour, make_palette
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError, DataError
from vispeft.storage.files import write_atomically
from vispeft.tasks.segmentation import Segmentation
from vispeft.viz import lay_over

__all__ = ["AREAS", "predict_masks"]

AREAS, MASKS, OVERLAYS = "areas.csv", "masks", "overlays"


def predict_masks(task: Segmentation, paths: Sequence[Path], root: Path, out: Path) -> list[list[str]]:
    """Write masks and overlays of image files, of the size of each image.

    Args:
        task: A trained task, on the device it is to compute on.
        paths: The files.
        root: Names of what is written follow the paths relative to it.
        out: Folder for ``masks`` and ``overlays``.

    Returns:
        A table: its head, then for each file its path and the pixels of each class.

    Raises:
        ConfigError: If two images would be written to one file, or something is there already.
        DataError: If an image cannot be read, or is smaller than the sliding window.
    """
    notes = task.bank.notes()
    output = notes["output"] or {}
    names = notes["class_names"] or [str(index) for index in range(task.num_classes)]
    colours = [tuple(colour) for colour in output.get("palette") or make_palette(len(names))]
    prepare = EvaluationPair(
        Preprocessing.from_dict(notes["preprocessing"]), output.get("evaluation") == "whole", output.get("short_side")
    )
    rows = [["path", *names]]
    task.eval()
    targets = _targets(paths, root, out)
    _check_sizes(task, prepare, paths)
    for path, target in track(
        list(zip(paths, targets, strict=True)), "predicting", console=console, disable=not console.is_terminal
    ):
        image = read_image(path)
        size = tuple(image.shape[-2:])
        mask = _mask(task, prepare, image, size)
        write_atomically(
            {
                out / MASKS / target: _index_png(mask, colours),
                out / OVERLAYS / target: _png(Image.fromarray(lay_over(image, mask, colours).permute(1, 2, 0).numpy())),
            }
        )
        counts = torch.bincount(mask.flatten(), minlength=len(names))
        rows.append([str(path), *(str(count) for count in counts.tolist())])
    return rows


def _targets(paths: Sequence[Path], root: Path, out: Path) -> list[Path]:
    """Name the files that are written, and see that they are free, before the first image is predicted."""
    base = root if root.is_dir() else root.parent
    targets = [path.relative_to(base).with_suffix(".png") for path in paths]
    twice = [target for target, count in Counter(targets).items() if count > 1]
    if twice:
        raise ConfigError(f"Two images would be written to {twice[0]}: only their endings differ. Rename one of them.")
    there = [out / folder / target for target in targets for folder in (MASKS, OVERLAYS)]
    found = next((path for path in there if path.exists()), None)
    if found is not None:
        raise ConfigError(f"{found} exists already and is not overwritten. Choose another --out.")
    return targets


def _check_sizes(task: Segmentation, prepare: EvaluationPair, paths: Sequence[Path]) -> None:
    """Find images smaller than the sliding window before the first one is predicted."""
    if task.inference.mode != "slide":
        return
    small = []
    for path in paths:
        with Image.open(path) as image:
            if min(prepare.size_of(image.height, image.width)) < task.inference.window:
                small.append(str(path))
    if small:
        raise DataError(
            f"{len(small)} of {len(paths)} images {'is' if len(small) == 1 else 'are'} smaller than the sliding window "
            f"of {task.inference.window} pixels that the run was trained with: {', '.join(small[:5])}"
            f"{' and more' if len(small) > 5 else ''}. Nothing was predicted; enlarge or remove them."
        )


@torch.inference_mode()
def _mask(task: Segmentation, prepare: EvaluationPair, image: Tensor, size: tuple[int, ...]) -> Tensor:
    prepared, _ = prepare(image, torch.zeros(size, dtype=torch.uint8))
    return task.predict(prepared[None].to(task.device), size)[0].cpu()


def _index_png(mask: Tensor, colours: Sequence[Colour]) -> bytes:
    """Write class indices, of which there are 255 at most, with a palette."""
    image = Image.fromarray(mask.numpy().astype(np.uint8))
    image.putpalette([value for colour in colours for value in colour])
    return _png(image)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
