"""``vispeft embed``: embed images with a finished run, and make an index of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from vispeft.cli.common import console, make_parser
from vispeft.cli.config_keys import take_overrides
from vispeft.cli.evaluate import header_of, load_run, load_task
from vispeft.cli.reading import add_reading, check_names, end_with, goes_on, workers_of
from vispeft.cli.runs import Run
from vispeft.cli.token_merging import add_token_merging, merge_as_asked
from vispeft.core.token_merging import TokenMerging
from vispeft.data.images import Reading
from vispeft.data.listed import ListedData
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.reading import BrokenImage, FileReader, watched
from vispeft.errors import ConfigError, counted, printable
from vispeft.retrieval import KINDS, Builder, Built, Collection, Index, Model, collect, collect_split
from vispeft.tasks.embedding import embed_images, similarity_of

__all__ = ["Embedder", "embed", "main"]

logger = logging.getLogger(__name__)

EXAMPLE = """example:
  vispeft embed runs/digits_ssf/1 my_images --out index
  vispeft embed runs/digits_ssf/1 my_images.txt --out index --dtype float16
  vispeft embed runs/folder/1 --split test --out index
  vispeft embed zoo:shells --split test --data.root my_shells --out index
  vispeft search index my_query.jpg

IMAGES is a folder (its subfolders are labels), a list with a path and a label per line, a JSON file from path to label,
or one image; with --split, keys under data can be overridden. A run of metric learning gives the outputs of its head;
any other run gives the pooled features of its adapted backbone. A command that was stopped goes on behind its last
batch when it is given again. Images that cannot be read are left out of the index and listed at the end, and the exit
status is 1; --strict stops at the first."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.

    Raises:
        SystemExit: With status 1, if images could not be read.
    """
    parser = make_parser("embed", "Embed images with a finished run, and make an index of them.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("images", metavar="IMAGES", nargs="?", help="folder, list, or one image")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="a split of the run's data instead")
    parser.add_argument("--out", metavar="INDEX", required=True, help="directory of the index")
    parser.add_argument("--index", choices=KINDS, default="exact", help="ivf and hnsw need the extra search")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="type of stored embeddings")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time; default 64")
    add_reading(parser)
    add_token_merging(parser)
    own, overrides = take_overrides(argv)
    given = vars(parser.parse_args(own))
    images, split, kind = given.pop("images"), given.pop("split"), given.pop("index")
    chosen = {"split": split, "kind": kind, "overrides": overrides}
    index, left_out = _embedded(given.pop("run"), images, given.pop("out"), **chosen, **given)
    width = index.embeddings.shape[1]
    console.print(f"{counted(len(index.collection), 'image')}, {width} dimensions: {index.place}", soft_wrap=True)
    end_with(left_out)


def embed(
    run: str | Path,
    images: str | Path | None,
    out: str | Path,
    *,
    split: str | None = None,
    kind: str = "exact",
    dtype: str = "float32",
    batch_size: int = 64,
    max_pixels: int | None = None,
    workers: int | None = None,
    strict: bool = True,
    token_merging: str | None = None,
    overrides: Sequence[str] = (),
) -> Index:
    """Embed images with a finished run, and make an index of them.

    Args:
        run: The run directory.
        images: Folder (subfolders are labels), list of paths and labels, or one image; None for a split of the data.
        out: Directory of the index. An unfinished one of the same images and run is gone on with.
        split: train, validation or test, of the run's data; only without `images`.
        kind: ``exact``; ``ivf`` or ``hnsw``, which need the extra ``search``.
        dtype: Type of the stored embeddings: float32, or float16 for half the size.
        batch_size: Images at a time.
        max_pixels: Largest number of pixels of an image; None for that of the training.
        workers: Processes that read images; 0 reads in this one; None takes the number of the run's data.
        strict: Whether the first image that cannot be read is an error; else such images are left out and logged.
        token_merging: Tokens that each block merges away, such as ``8``; ``off``; None for the run's own setting.
        overrides: Changes to the run's data, such as ``["--data.root", "photos"]``; only with `split`.

    Raises:
        ConfigError: If settings cannot work, or the directory holds something else.
        DataError: If an image cannot be read, with `strict`, or none can; or if an embedding is not finite.
        FileError: If the run cannot be read, or files cannot be written.
    """
    settings: dict[str, Any] = {"split": split, "kind": kind, "dtype": dtype, "batch_size": batch_size}
    settings |= {"max_pixels": max_pixels, "workers": workers, "strict": strict, "token_merging": token_merging}
    settings["overrides"] = overrides
    index, left_out = _embedded(run, images, out, **settings)
    for entry in left_out:
        logger.warning("%s It is not in the index.", printable(entry.reason))
    return index


def _embedded(
    run: str | Path,
    images: str | Path | None,
    out: str | Path,
    *,
    split: str | None,
    max_pixels: int | None,
    workers: int | None,
    strict: bool,
    token_merging: str | None,
    overrides: Sequence[str],
    **settings: Any,
) -> Built:
    """Make an index; see `embed`. The settings are those of the builder."""
    if (images is None) == (split is None):
        raise ConfigError("Give either IMAGES or --split, which takes the images of the run's data.")
    if overrides and split is None:
        raise ConfigError(f"{overrides[0]} was given with IMAGES, which replace the run's data. Leave it out.")
    opened = Run.open(run)
    known: list[BrokenImage] = []
    if images is None:
        data = load_run(opened, overrides).datamodule
        if isinstance(data, ListedData) and not strict:
            known = data.leave_out_unreadable(str(split))
        found = collect_split(data, str(split))
    else:
        found = collect(images)
    embedder = Embedder(opened, max_pixels, workers, strict, token_merging)
    place = os.path.realpath(opened.path)
    builder = Builder(place=Path(out), model=embedder.model, run=place, collection=found, **settings)
    check_names(found.paths, "embedded")
    with goes_on(), watched(embedder.reader.workers):
        index, left_out = builder.build(embedder.reader, embedder, partial(_shown, "embedding"))
    return Built(index, [*known, *left_out])


class Embedder:
    """Computes embeddings of images with a finished run."""

    def __init__(
        self,
        run: Run,
        max_pixels: int | None = None,
        workers: int | None = None,
        strict: bool = True,
        token_merging: str | TokenMerging | None = None,
    ) -> None:
        """Load the run.

        Args:
            run: The run.
            max_pixels: Largest number of pixels of an image; None for that of the training.
            workers: Processes that read images; None for the number of the run's data.
            strict: Whether the first image that cannot be read is an error.
            token_merging: Settings, or tokens that each block merges away (``8``), or ``off``; None for the run's
                own.

        Raises:
            BaseMismatchError: If the backbone differs from the adapted one.
            FileError: If the run cannot be read.
        """
        self._task, self._trainer = load_task(run)
        merging = merge_as_asked(self._task, token_merging)
        notes = self._task.bank.notes()
        preprocessing = Preprocessing.from_dict(notes["preprocessing"])
        reading = Reading.from_notes(notes)
        self.model = Model(
            adapter=str(header_of(run)["digest"]),
            preprocessing=preprocessing.to_dict(),
            reading={key: value for key, value in reading.notes().items() if key != "max_pixels"},
            similarity=similarity_of(self._task).to_dict(),
            token_merging=merging[0] if merging else {},
        )
        if max_pixels is not None:
            reading = replace(reading, max_pixels=max_pixels)
        device = self._trainer.strategy.root_device
        self.reader = FileReader(
            prepare=preprocessing.transform(),
            reading=reading,
            least=preprocessing.least,
            workers=workers_of(run) if workers is None else workers,
            mark="digest",
            device=device,
            strict=strict,
        )
        self._task.to(device).eval()

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the embeddings (B, d) of prepared images (B, 3, H, W), on the CPU.

        Args:
            images: The images.
        """
        with torch.inference_mode(), self._trainer.precision_plugin.forward_context():
            return embed_images(self._task, images.to(self._task.device, non_blocking=True)).cpu()

    def all(self, collection: Collection, batch_size: int = 64) -> Tensor:
        """Compute the embeddings (N, d) of a collection.

        Args:
            collection: The images.
            batch_size: Images at a time.

        Raises:
            DataError: If one cannot be read.
        """
        starts = range(0, len(collection), batch_size)
        batches = self.reader.batches([collection.paths[start : start + batch_size] for start in starts])
        with watched(self.reader.workers):
            found = [self(batch.images) for _, batch in zip(_shown("embedding", starts), batches, strict=True)]
        return torch.cat(found)


def _shown(what: str, steps: Sequence[int]) -> Iterable[Any]:
    return track(steps, what, console=console, transient=True, disable=not console.is_terminal)
