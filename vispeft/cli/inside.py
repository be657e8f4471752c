"""``vispeft inspect --plots``: pictures of what happens inside of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluate import load_run, load_task
from vispeft.cli.runs import Run, names_run
from vispeft.cli.token_merging import without_token_merging
from vispeft.core.modes import evaluating
from vispeft.data.base import ImageData
from vispeft.data.images import Reading, find_images, read_image
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError, FileError
from vispeft.resources import find_config
from vispeft.tasks.base import AdapterTask
from vispeft.viz import activation_shift, attention_of, draw_attention, draw_prompts, draw_shift, embedding_plot

__all__ = ["Seen", "draw_inside", "first_task", "plots"]

SHOWN = 4
"""Images whose attention is drawn."""
EMBEDDED = 500
"""Images whose embeddings are drawn."""
AT_ONCE = 32
"""Images that pass the model together."""


@dataclass(frozen=True)
class Seen:
    """Images to look at."""

    images: Tensor
    """Normalised (N, 3, H, W)."""
    labels: Tensor | None
    """Their classes (N,); None where an image has no single class."""
    preprocessing: Preprocessing
    """How they were normalised."""
    names: Sequence[str] | None = None
    """Names of the classes."""

    def pictures(self, count: int) -> list[Tensor]:
        """Undo the normalisation of the first images: uint8 (3, H, W) each.

        Args:
            count: Number of images.
        """
        known = (self.preprocessing.mean, self.preprocessing.std)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in known)
        plain = self.images[:count].cpu().float() * std + mean
        return list((plain.clamp(0, 1) * 255).round().to(torch.uint8))


def plots(place: str, out: str | Path, images: str | None = None, overrides: Sequence[str] = ()) -> list[Path]:
    """Draw what happens inside of the model of a run, or of a config whose training has not begun.

    Args:
        place: A run directory, zoo:NAME, a config, or the name of a packaged one.
        out: Folder for the pictures; new or empty.
        images: Folder of images of one's own, or one image; None takes the test images of the data.
        overrides: Changes to the config; of a run to its sections data and trainer.

    Returns:
        The pictures.

    Raises:
        ConfigError: If the folder is not empty, or settings cannot work.
        DataError: If images cannot be read.
        FileError: If the run cannot be read, or files cannot be written.
    """
    folder = Path(out)
    _check_empty(folder)
    if names_run(place):
        task, seen = _of_run(Run.open(place), images, overrides)
    else:
        cli = ConfigCLI(find_config(place), overrides)
        task = cli.model
        seen = _of_files(task, images, cli.datamodule) if images else _of_data(task, cli.datamodule)
    return draw_inside(task, seen, folder)


def _check_empty(out: Path) -> None:
    try:
        there = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise FileError(f"--plots is {out}, where nothing can be written ({error.strerror}).") from error
    if there:
        raise ConfigError(f"{out} is not empty, and nothing in it is overwritten. Choose another --plots.")


def _of_run(run: Run, images: str | None, overrides: Sequence[str]) -> tuple[AdapterTask, Seen]:
    if images is None:
        cli = load_run(run, overrides)
        without_token_merging(cli.model, "drawn")
        return cli.model, _of_data(cli.model, cli.datamodule)
    if overrides:
        raise ConfigError(f"{' '.join(overrides)} was given with --images, which replaces the data. Leave it out.")
    task, _ = load_task(run)
    without_token_merging(task, "drawn")
    return task, _of_files(task, images, None)


def _of_files(task: AdapterTask, place: str, data: Any) -> Seen:
    """Read images of the user's own, prepared as the run's were."""
    notes = task.bank.notes()
    known = notes.get("preprocessing")
    if isinstance(data, ImageData):
        data.fit_to(task.preprocessing)
    found = Preprocessing.from_dict(known) if known else getattr(data, "preprocessing", task.preprocessing)
    reading, prepare = Reading.from_notes(notes), found.transform()
    paths = find_images(place)[:EMBEDDED]
    return Seen(torch.stack([prepare(read_image(path, reading=reading)) for path in paths]), None, found)


def _of_data(task: AdapterTask, data: Any) -> Seen:
    """Take the first images of the test split, all of one size."""
    if isinstance(data, ImageData):
        data.fit_to(task.preprocessing)
    data.setup("test")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in data.test_dataloader():
        some, target = (batch["image"], None) if isinstance(batch, Mapping) else (batch[0], batch[1])
        if images and some.shape[1:] != images[0].shape[1:]:
            break
        images.append(some)
        if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
            labels.append(target)
        if sum(map(len, images)) >= EMBEDDED:
            break
    joined = torch.cat(images)[:EMBEDDED]
    classes = torch.cat(labels)[:EMBEDDED] if len(labels) == len(images) else None
    names = getattr(data, "label_names", None) or getattr(data, "class_names", None)
    return Seen(joined, classes, getattr(data, "preprocessing", task.preprocessing), names)


def draw_inside(task: AdapterTask, seen: Seen, folder: Path) -> list[Path]:
    """Draw attention, attention of prompts, the shift of activations, and embeddings with and without the adapter.

    Of a method with tasks, the first one is shown.

    Args:
        task: The task, whose adapter acts.
        seen: The images.
        folder: Folder for the pictures.

    Returns:
        The pictures. Prompts are left out where there are none, embeddings where images have no class, and what
        compares with the frozen model where the method changes its weights.
    """
    model: Any = task.model
    device = next(model.parameters()).device
    few = seen.images[:SHOWN].to(device, task.base_dtype)
    pictures = seen.pictures(len(few))
    with evaluating(task), first_task(task):
        found = attention_of(model, few)
        drawn = [
            draw_attention(pictures, found, folder / "attention.png"),
            draw_prompts(pictures[0], found, folder / "prompts.png"),
            draw_shift({task.bank.active[0]: activation_shift(model, few)}, folder / "shift.png"),
        ]
        if seen.labels is not None and len(seen.labels) > 2:
            images = seen.images.to(device, task.base_dtype)
            drawn.append(_embeddings(model, images, seen, folder / "embeddings.png"))
            with task.bank.disabled():
                drawn.append(_embeddings(model, images, seen, folder / "embeddings_frozen.png"))
    return [path for path in drawn if path is not None]


@contextlib.contextmanager
def first_task(task: AdapterTask) -> Iterator[None]:
    """Choose the first task of the adapter that acts, if it has several.

    Args:
        task: The task whose adapter acts.
    """
    names = task.bank.plan(task.bank.active[-1]).tasks
    if not names:
        yield
        return
    with task.bank.using(task=names[0]):
        yield


@torch.no_grad()
def _embeddings(model: Any, images: Tensor, seen: Seen, path: Path) -> Path:
    """Draw the pooled features of the backbone, which a classifier reads."""
    rows = [model.forward_head(model.forward_features(part), pre_logits=True).float() for part in images.split(AT_ONCE)]
    features = torch.nn.functional.normalize(torch.cat(rows), dim=1)
    assert seen.labels is not None
    return embedding_plot(features, seen.labels, path, seen.names)
