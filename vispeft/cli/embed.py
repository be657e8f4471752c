"""``vispeft embed``: embed images with a finished run, and make an index of them."""

from __future__ import annotations

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
from vispeft.cli.evaluate import header_of, load_run, load_task
from vispeft.cli.predict import check_readable
from vispeft.cli.runs import Run
from vispeft.data.images import Reading, read_image
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.threads import in_threads
from vispeft.errors import ConfigError, counted
from vispeft.retrieval import KINDS, Builder, Collection, Index, Model, collect, collect_split
from vispeft.tasks.embedding import embed_images, similarity_of

__all__ = ["Embedder", "embed", "main"]

EXAMPLE = """example:
  vispeft embed runs/digits_ssf/1 my_images --out index
  vispeft embed runs/digits_ssf/1 my_images.txt --out index --dtype float16
  vispeft embed runs/folder/1 --split test --out index
  vispeft search index my_query.jpg

IMAGES is a folder (its subfolders are labels), a list with a path and a label per line, a JSON file from path to label,
or one image. A run of metric learning gives the outputs of its head; any other run gives the pooled features of its
adapted backbone. A command that was stopped goes on behind its last batch when it is given again."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("embed", "Embed images with a finished run, and make an index of them.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("images", metavar="IMAGES", nargs="?", help="folder, list, or one image")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="a split of the run's data instead")
    parser.add_argument("--out", metavar="INDEX", required=True, help="directory of the index")
    parser.add_argument("--index", choices=KINDS, default="exact", help="ivf and hnsw need the extra search")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="type of stored embeddings")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time; default 64")
    parser.add_argument("--max_pixels", type=int, help="largest number of pixels of an image; default: as trained")
    given = vars(parser.parse_args(list(argv)))
    images, split, kind = given.pop("images"), given.pop("split"), given.pop("index")
    index = embed(given.pop("run"), images, given.pop("out"), split=split, kind=kind, **given)
    width = index.embeddings.shape[1]
    console.print(f"{counted(len(index.collection), 'image')}, {width} dimensions: {index.place}", soft_wrap=True)


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

    Raises:
        ConfigError: If settings cannot work, or the directory holds something else.
        DataError: If images cannot be read, or their embeddings are not finite.
        FileError: If the run cannot be read, or files cannot be written.
    """
    if (images is None) == (split is None):
        raise ConfigError("Give either IMAGES or --split, which takes the images of the run's data.")
    opened = Run.open(run)
    found = collect(images) if images is not None else collect_split(load_run(opened).datamodule, str(split))
    embedder = Embedder(opened, max_pixels)
    builder = Builder(
        place=Path(out),
        model=embedder.model,
        run=os.path.realpath(opened.path),
        collection=found,
        batch_size=batch_size,
        dtype=dtype,
        kind=kind,
    )
    check_readable(found.paths, embedder.reading, "embedded")
    return builder.build(embedder, partial(_shown, "embedding"))


class Embedder:
    """Computes embeddings of image files with a finished run."""

    def __init__(self, run: Run, max_pixels: int | None = None) -> None:
        """Load the run.

        Args:
            run: The run.
            max_pixels: Largest number of pixels of an image; None for that of the training.

        Raises:
            BaseMismatchError: If the backbone differs from the adapted one.
            FileError: If the run cannot be read.
        """
        self._task, self._trainer = load_task(run)
        notes = self._task.bank.notes()
        preprocessing = Preprocessing.from_dict(notes["preprocessing"])
        self.reading = Reading.from_notes(notes)
        self.model = Model(
            adapter=str(header_of(run)["digest"]),
            preprocessing=preprocessing.to_dict(),
            reading={key: value for key, value in self.reading.notes().items() if key != "max_pixels"},
            similarity=similarity_of(self._task).to_dict(),
        )
        if max_pixels is not None:
            self.reading = replace(self.reading, max_pixels=max_pixels)
        self._transform = preprocessing.transform()
        self._task.to(self._trainer.strategy.root_device).eval()

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """Compute the embeddings (B, d) of files, on the CPU.

        Args:
            paths: The files.

        Raises:
            DataError: If one cannot be read.
        """
        images = torch.stack([*in_threads(self._image, paths)])
        with torch.inference_mode(), self._trainer.precision_plugin.forward_context():
            return embed_images(self._task, images.to(self._task.device)).cpu()

    def _image(self, path: Path) -> Tensor:
        """Read an image, normalised (3, H, W)."""
        found: Tensor = self._transform(read_image(path, reading=self.reading))
        return found

    def all(self, collection: Collection, batch_size: int = 64) -> Tensor:
        """Compute the embeddings (N, d) of a collection.

        Args:
            collection: The images.
            batch_size: Images at a time.
        """
        starts = _shown("embedding", range(0, len(collection), batch_size))
        return torch.cat([self(collection.paths[start : start + batch_size]) for start in starts])


def _shown(what: str, steps: Sequence[int]) -> Iterable[Any]:
    return track(steps, what, console=console, transient=True, disable=not console.is_terminal)
