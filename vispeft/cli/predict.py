"""``vispeft predict``: predict a folder of images with a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from vispeft.cli.common import make_parser
from vispeft.cli.evaluate import header_of, load_task
from vispeft.cli.prediction_table import Table, Work, listing_digest
from vispeft.cli.reading import add_reading, check_names, end_with, goes_on, workers_of
from vispeft.cli.runs import Run
from vispeft.cli.token_merging import add_token_merging, merge_as_asked
from vispeft.cli.zero_shot import add_classes, classified, config_without_adapter, is_run
from vispeft.data.base import ImageData
from vispeft.data.images import PLAIN, Reading, find_images
from vispeft.errors import check_count
from vispeft.resources import find_config
from vispeft.retrieval.collection import file_digest
from vispeft.storage.class_embeddings import ClassEmbeddings
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.predictions import Prediction, Predictor
from vispeft.tasks.token_merging import merge_tokens

__all__ = ["main", "predict"]

EXAMPLE = """example:
  vispeft predict runs/digits_ssf/1 my_images --out predictions
  vispeft predict my_clip.yaml my_images --classes classes.safetensors --out predictions

Writes predictions/predictions.csv with the path of each image and the prediction of the run's task: class and
probability (at the temperature that was fitted on validation), labels and the probability of each, or numbers in their
own unit. A segmentation run writes predictions/masks (PNG of class indices, with the classes' colours),
predictions/overlays, and predictions/areas.csv with the pixels of each class. A run of several dense tasks writes a
folder for each task (PNG of class indices, of probabilities times 255, of normals as red, green and blue; numbers of
depth and other values in .npy files, with a picture), predictions/strips, and predictions/predictions.csv.
Folders are searched through; grey images and images with transparency are turned into RGB.
Rows are kept batch by batch in the folder "unfinished": the same command goes on behind the last batch after it was
stopped. Images that cannot be read get no row; they are listed at the end and in left_out.csv, and the exit status is
1. --strict stops at the first of them.
With --classes, a file of class embeddings (vispeft encode-classes) classifies instead of the trained classifier, all
of its classes being possible. A config in place of a run stands for its backbone without an adapter."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.

    Raises:
        SystemExit: With status 1, if images could not be read.
    """
    parser = make_parser("predict", "Predict images with a finished run.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run directory; with --classes also a config")
    parser.add_argument("images", metavar="IMAGES", help="folder of images, or one image")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the table and the pictures")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time; default 64; for masks one")
    add_reading(parser)
    add_token_merging(parser)
    add_classes(parser)
    given = parser.parse_args(list(argv))
    check_count("--batch_size", given.batch_size)
    classes = None if given.classes is None else ClassEmbeddings.load(given.classes)
    run = Run.open(given.run) if classes is None or is_run(given.run) else None
    paths = find_images(given.images)
    task, trainer = _plain_task(given.run) if run is None else load_task(run)
    if classes is not None:
        classified(task, classes)
    merging = merge_as_asked(task, given.token_merging)
    reading = Reading.from_notes(task.bank.notes())
    if given.max_pixels is not None:
        reading = replace(reading, max_pixels=given.max_pixels)
    check_names(paths, "predicted")
    predictor = task.predictor()
    own = 0 if run is None else workers_of(run)
    workers = own if given.workers is None else given.workers
    work = Work(task, predictor, trainer, reading, workers=workers, strict=given.strict)
    plan = {
        "run": [*_digests(run, given.run), *merging, *([] if classes is None else [file_digest(Path(given.classes))])],
        "images": listing_digest(paths),
        "reading": [reading.notes(), predictor.columns],
        "batch_size": given.batch_size,
    }
    table = Table(Path(given.out), predictor, plan)
    targets = table.targets(paths, Path(given.images))
    predictor.check(paths, reading)
    with goes_on():
        left_out = table.fill(work, paths, targets, given.batch_size)
    end_with(left_out)


def _plain_task(config: str) -> tuple[AdapterTask, Trainer]:
    """Create the task of a config without an adapter, with the notes that a finished run has."""
    cli = config_without_adapter(config, [])
    merge_tokens(cli.model, cli.config_init["token_merging"])
    if isinstance(cli.datamodule, ImageData):
        cli.datamodule.fit_to(cli.model.preprocessing)  # a trainer would tell it
    preprocessing = getattr(cli.datamodule, "preprocessing", cli.model.preprocessing)
    notes = getattr(cli.datamodule, "output_notes", dict)()
    cli.model.bank.annotate(preprocessing=preprocessing.to_dict(), output={**cli.model.output(), **notes})
    return cli.model, cli.trainer


def _digests(run: Run | None, place: str) -> list[Any]:
    """Return what tells whether the same model predicts."""
    if run is None:
        return [file_digest(find_config(place))]
    return [header_of(run).get("digest"), file_digest(run.config)]


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

    Raises:
        DataError: If a file cannot be read.
    """
    work = Work(task, predictor, trainer, reading)
    count = min(batch_size, work.at_once or batch_size)
    for batch in work.reader.batches([paths[start : start + count] for start in range(0, len(paths), count)]):
        yield from work(batch)
