"""``vispeft predict``: predict a folder of images with a finished run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Trainer
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from vispeft.cli.common import console, make_parser
from vispeft.cli.evaluate import load_task
from vispeft.cli.predict_masks import AREAS, predict_masks
from vispeft.cli.runs import Run, write_text
from vispeft.data.images import ImageFiles, find_images, read_image
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError, DataError
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.segmentation import Segmentation
from vispeft.tasks.supervised import SupervisedTask

__all__ = ["main"]

FILE = "predictions.csv"
EXAMPLE = """example:
  vispeft predict runs/digits_ssf/1 my_images --out predictions

Writes predictions/predictions.csv with the path of each image and what the run's task predicts: class and probability
(at the temperature that was fitted on validation), labels and the probability of each, or numbers in their own unit.
A segmentation run writes predictions/masks (PNG of class indices, with the classes' colours), predictions/overlays, and
predictions/areas.csv with the pixels of each class.
Folders are searched through; grey images and images with transparency are turned into RGB."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("predict", "Predict images with a finished run.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("images", metavar="IMAGES", help="folder of images, or one image")
    parser.add_argument("--out", metavar="DIR", required=True, help="where predictions.csv goes")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time; default 64; for masks one")
    given = parser.parse_args(list(argv))
    out = Path(given.out)
    for name in (FILE, AREAS):
        if (out / name).exists():
            raise ConfigError(f"{out / name} exists already and is not overwritten. Choose another --out.")
    if given.batch_size < 1:
        raise ConfigError(f"--batch_size is {given.batch_size}; at least 1 is needed.")
    run = Run.open(given.run)
    paths = find_images(given.images)
    _check_readable(paths)
    task, trainer = load_task(run)
    if isinstance(task, Segmentation):
        task.to(trainer.strategy.root_device)
        with trainer.precision_plugin.forward_context():
            target, rows = out / AREAS, predict_masks(task, paths, Path(given.images), out)
    else:
        target, rows = out / FILE, predict(run, task, trainer, paths, given.batch_size)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(target, text.getvalue())
    console.print(f"{len(paths)} images predicted: {target}", soft_wrap=True)


def _check_readable(paths: Sequence[Path]) -> None:
    """Read every image once before the first is predicted, so that a broken one costs no finished work."""
    broken = []
    for path in track(paths, "reading", console=console, transient=True, disable=not console.is_terminal):
        try:
            read_image(path)
        except DataError as error:
            broken.append(str(error).removesuffix("."))
    if broken:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise DataError(
            f"{len(broken)} of {len(paths)} images cannot be used: {'; '.join(broken[:5])}{more}. "
            "Nothing was predicted; repair or remove them."
        )


def predict(
    run: Run, task: AdapterTask, trainer: Trainer, paths: Sequence[Path], batch_size: int = 64
) -> list[list[str]]:
    """Predict image files.

    Args:
        run: The run.
        task: Its task, with the trained adapter.
        trainer: A trainer that evaluates.
        paths: The files.
        batch_size: Images at a time.

    Returns:
        A table: its head, then a row per file, in their order.

    Raises:
        ConfigError: If the run's task does not say how its predictions are written.
    """
    if not isinstance(task, SupervisedTask):
        raise ConfigError(f"{run.path} was trained as {type(task).__name__}, whose predictions are no table.")
    notes = task.bank.notes()
    transform = Preprocessing.from_dict(notes["preprocessing"]).transform()
    loader = DataLoader(ImageFiles(paths, transform), batch_size=batch_size)
    values = torch.cat(cast(list[Tensor], trainer.predict(task, loader)))
    names = notes["class_names"] or [str(index) for index in range(values.shape[1])]
    rows = [[str(path), *task.row(row, names)] for path, row in zip(paths, values, strict=True)]
    return [["path", *task.columns(names)], *rows]
