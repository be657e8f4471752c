"""``vispeft predict``: predict a folder of images with a finished run."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from rich.progress import track

from vispeft.cli.common import console, make_parser
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run, write_text
from vispeft.data.images import PLAIN, Reading, find_images, read_image
from vispeft.data.threads import in_threads
from vispeft.errors import ConfigError, DataError, FileError, check_count, counted, is_utf8, printable
from vispeft.storage.disk import write_atomically
from vispeft.storage.tables import as_csv
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.predictions import Prediction, Predictor

__all__ = ["check_readable", "main", "predict"]

EXAMPLE = """example:
  vispeft predict runs/digits_ssf/1 my_images --out predictions

Writes predictions/predictions.csv with the path of each image and the prediction of the run's task: class and
probability (at the temperature that was fitted on validation), labels and the probability of each, or numbers in their
own unit. A segmentation run writes predictions/masks (PNG of class indices, with the classes' colours),
predictions/overlays, and predictions/areas.csv with the pixels of each class. A run of several dense tasks writes a
folder for each task (PNG of class indices, of probabilities times 255, of normals as red, green and blue; numbers of
depth and other values in .npy files, with a picture), predictions/strips, and predictions/predictions.csv.
Folders are searched through; grey images and images with transparency are turned into RGB."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("predict", "Predict images with a finished run.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("images", metavar="IMAGES", help="folder of images, or one image")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the table and the pictures")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time; default 64; for masks one")
    parser.add_argument("--max_pixels", type=int, help="largest number of pixels of an image; default: as trained")
    given = parser.parse_args(list(argv))
    out = Path(given.out)
    check_count("--batch_size", given.batch_size)
    run = Run.open(given.run)
    paths = find_images(given.images)
    task, trainer = load_task(run)
    reading = Reading.from_notes(task.bank.notes())
    if given.max_pixels is not None:
        reading = replace(reading, max_pixels=given.max_pixels)
    check_readable(paths, reading, "predicted")
    predictor = task.predictor()
    table = out / predictor.table
    try:
        there = table.exists()
    except OSError as error:  # such as a name that is too long
        raise FileError(f"--out is {given.out}, where nothing can be written ({error.strerror}).") from error
    if there:
        raise ConfigError(f"{table} exists already and is not overwritten. Choose another --out.")
    targets = _targets(paths, Path(given.images), out, predictor)
    predictor.check(paths, reading)
    rows, broken = [["path", *predictor.columns]], []
    found = predict(task, predictor, trainer, paths, given.batch_size, reading)
    shown = track(found, "predicting", len(paths), console=console, disable=not console.is_terminal)
    for path, target, prediction in zip(paths, targets, shown, strict=True):
        rows.append([str(path), *prediction.row])
        broken += [] if prediction.finite else [str(path)]
        written = {out / folder / target: _png(picture) for folder, picture in prediction.pictures.items()}
        arrays = prediction.arrays.items()
        written |= {(out / folder / target).with_suffix(".npy"): _npy(array) for folder, array in arrays}
        if written:
            write_atomically(written)
    write_text(table, as_csv(rows))
    console.print(f"{counted(len(paths), 'image')} predicted: {table}", soft_wrap=True)
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        console.print(
            f"The outputs for {len(broken)} of them are not finite, and their cells are empty: "
            f"{', '.join(broken[:5])}{more}.",
            soft_wrap=True,
        )


def predict(
    task: AdapterTask,
    predictor: Predictor,
    trainer: Trainer,
    paths: Sequence[Path],
    batch_size: int = 64,
    reading: Reading = PLAIN,
) -> Iterator[Prediction]:
    """Predict image files with a trainer's precision and device.

    Args:
        task: A trained task.
        predictor: The task's predictor.
        trainer: A trainer for evaluation.
        paths: The files.
        batch_size: Images per batch, if the predictor accepts several.
        reading: How pixels become RGB.

    Yields:
        One prediction per file, in order.
    """
    task.to(trainer.strategy.root_device).eval()
    count = min(batch_size, predictor.at_once or batch_size)
    for start in range(0, len(paths), count):
        images = [read_image(path, reading=reading) for path in paths[start : start + count]]
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            predictions = predictor(images)
        yield from predictions


def check_readable(paths: Sequence[Path], reading: Reading, done: str) -> None:
    """Read every image before the work begins, so that a broken one wastes none.

    Args:
        paths: The files.
        reading: How pixels become RGB.
        done: Participle of the work, for the message.

    Raises:
        DataError: If some cannot be read; the message names them.
    """
    found = in_threads(partial(_problem, reading=reading), paths)
    shown = track(found, "reading", len(paths), console=console, transient=True, disable=not console.is_terminal)
    if broken := [problem for problem in shown if problem]:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise DataError(
            f"{len(broken)} of {counted(len(paths), 'image')} cannot be used: {'; '.join(broken[:5])}{more}. "
            f"Nothing was {done}; mend what is named there, or leave these images out."
        )


def _problem(path: Path, reading: Reading) -> str:
    """Tell why an image cannot be used; empty if it can."""
    if not is_utf8(str(path)):
        return f"{printable(str(path))} has a name that is no UTF-8, which the table could not hold"
    try:
        read_image(path, reading=reading)
    except DataError as error:
        return str(error).removesuffix(".")
    return ""


def _targets(paths: Sequence[Path], root: Path, out: Path, predictor: Predictor) -> list[Path]:
    """Return the output paths of each image, after checking before the first prediction that none exists."""
    base = root if root.is_dir() else root.parent
    targets = [path.relative_to(base).with_suffix(".png") for path in paths]
    if not predictor.folders:
        return targets
    twice = [target for target, count in Counter(targets).items() if count > 1]
    if twice:
        raise ConfigError(f"Two images would be written to {twice[0]}: only their endings differ. Rename one of them.")
    there = [out / folder / target for target in targets for folder in predictor.folders]
    arrays: tuple[str, ...] = getattr(predictor, "arrays", ())
    there += [(out / folder / target).with_suffix(".npy") for target in targets for folder in arrays]
    found = next((path for path in there if path.exists()), None)
    if found is not None:
        raise ConfigError(f"{found} exists already and is not overwritten. Choose another --out.")
    return targets


def _npy(array: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
