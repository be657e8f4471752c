"""A table of predictions, and pictures beside it, written piece by piece."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from rich.progress import track

from vispeft.cli.common import console
from vispeft.data.images import PLAIN, Reading
from vispeft.data.reading import BrokenImage, FileReader, ReadBatch, watched
from vispeft.errors import ConfigError, FileError, counted
from vispeft.storage.disk import read_regular, write_atomically
from vispeft.storage.leftovers import remove_partial
from vispeft.storage.pieces import Pieces
from vispeft.storage.tables import as_csv, needs_quotes
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.predictions import Prediction, Predictor

__all__ = ["LEFT_OUT", "UNFINISHED", "Table", "Work", "listing_digest"]

UNFINISHED, LEFT_OUT = "unfinished", "left_out.csv"
"""Folder of the rows until the last one is there, and the table of images that could not be read."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of cells that spreadsheets compute (OWASP, CSV Injection)."""
NAMED = 5
"""Largest number of images without finite outputs that are named."""


def listing_digest(paths: Sequence[Path]) -> str:
    """Compute a sha256 of the paths of images and their order.

    Args:
        paths: The images.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path}\0".encode())
    return digest.hexdigest()


@dataclass
class _Piece:
    """Rows of some images that follow each other."""

    rows: list[list[str]] = field(default_factory=list)
    """Rows of the table."""
    images: list[str] = field(default_factory=list)
    """Mark of each image when it was read."""
    left_out: list[BrokenImage] = field(default_factory=list)
    """Images that could not be read."""
    not_finite: list[str] = field(default_factory=list)
    """Images whose outputs are not finite."""

    def add(self, path: Path, prediction: Prediction) -> None:
        """Add the row of an image."""
        self.rows.append([_no_formula(str(path)), *prediction.row])
        if not prediction.finite:
            self.not_finite.append(str(path))


def _no_formula(text: str) -> str:
    """Return a path, or a sentence that begins with one, so that no spreadsheet takes it for a formula."""
    return f".{os.sep}{text}" if text.startswith(FORMULA) else text


class Work:
    """Predicts image files with a trainer's precision and device."""

    def __init__(
        self,
        task: AdapterTask,
        predictor: Predictor,
        trainer: Trainer,
        reading: Reading = PLAIN,
        *,
        workers: int = 0,
        strict: bool = True,
    ) -> None:
        """Move the task to its device.

        Args:
            task: A trained task.
            predictor: The task's predictor.
            trainer: A trainer for evaluation.
            reading: How pixels become RGB.
            workers: Processes that read images; 0 reads in this one.
            strict: Whether the first image that cannot be read is an error.
        """
        device = trainer.strategy.root_device
        task.to(device).eval()
        prepare = getattr(predictor, "prepare", None)
        self._predict = predictor if prepare is None else predictor.predict_prepared  # type: ignore[attr-defined]
        self._context = trainer.precision_plugin.forward_context
        self.at_once = predictor.at_once
        self.reader = FileReader(
            prepare=prepare,
            reading=reading,
            least=getattr(predictor, "least", None),
            workers=workers,
            device=device,
            strict=strict,
        )

    def __call__(self, batch: ReadBatch) -> list[Prediction]:
        """Predict the images of a batch that could be read.

        Args:
            batch: The batch.
        """
        if not batch.kept:
            return []
        with torch.inference_mode(), self._context():
            found: list[Prediction] = self._predict(batch.images)
        return found


class Table:
    """A table of predictions in a folder, and the pictures beside it, written piece by piece."""

    def __init__(self, out: Path, predictor: Predictor, plan: Mapping[str, Any]) -> None:
        """Set the folder, which is made when the first row is written.

        Args:
            out: The folder.
            predictor: The task's predictor.
            plan: What the rows depend on; see `Pieces`.

        Raises:
            ConfigError: If the table exists.
            FileError: If nothing can be written there.
        """
        self.out, self.path, self._predictor = out, out / predictor.table, predictor
        self._pieces = Pieces(place=out / UNFINISHED, what="table of predictions", plan=plan, ending=".json")
        try:
            there = self.path.exists()
        except OSError as error:  # such as a name that is too long
            raise FileError(f"--out is {out}, where nothing can be written ({error.strerror}).") from error
        if there:
            self._clear()
        self._refuse_finished()

    def _clear(self) -> None:
        """Remove what a process left that was killed behind its last row."""
        if self._pieces.place.is_dir():
            self._pieces.clear_behind_a_kill()
            self._remove_folder()

    def _remove_folder(self) -> None:
        with contextlib.suppress(OSError):
            self._pieces.place.rmdir()

    def _refuse_finished(self) -> None:
        # The other table of this work may stand there, if the work was killed between both.
        for path in (self.path,) if self._pieces.begun else (self.path, self.out / LEFT_OUT):
            if path.exists():
                raise ConfigError(f"{path} exists already and is not overwritten. Choose another --out.")

    def targets(self, paths: Sequence[Path], root: Path) -> list[Path]:
        """Return the path of each image's pictures in their folders, after checking that none exists.

        Args:
            paths: The images.
            root: The folder they were found in, or the image.

        Raises:
            ConfigError: If two are equal, or one exists and is of no earlier start.
        """
        base = root if root.is_dir() else root.parent
        targets = [path.relative_to(base).with_suffix(".png") for path in paths]
        if not self._predictor.folders:
            return targets
        twice = [target for target, count in Counter(targets).items() if count > 1]
        if twice:
            raise ConfigError(
                f"Two images would be written to {twice[0]}: only their endings differ. Rename one of them."
            )
        for path in () if self._pieces.begun else (path for target in targets for path in self._pictures(target)):
            if path.exists():
                raise ConfigError(f"{path} exists already and is not overwritten. Choose another --out.")
        return targets

    def _pictures(self, target: Path) -> Iterator[Path]:
        """Yield all files that may be written for an image."""
        for folder in self._predictor.folders:
            yield self.out / folder / target
        for folder in getattr(self._predictor, "arrays", ()):
            yield (self.out / folder / target).with_suffix(".npy")

    def fill(self, work: Work, paths: Sequence[Path], targets: Sequence[Path], batch_size: int) -> list[BrokenImage]:
        """Predict what is not predicted yet, and write the table.

        Args:
            work: What reads and predicts.
            paths: The images.
            targets: Paths of their pictures.
            batch_size: Images per piece.

        Returns:
            The images that could not be read.

        Raises:
            ConfigError: If the folder holds unfinished predictions of other images, or by another run.
            DataError: If an image cannot be read, with ``strict``.
            FileError: If files cannot be written, or another process writes there.
        """
        count = min(batch_size, work.at_once or batch_size)
        size = batch_size // count * count
        starts = range(0, len(paths), size)
        with self._pieces.held(self._refuse_finished), watched(work.reader.workers):
            remove_partial(self.out, self.path.name, LEFT_OUT)
            missing = [at for at in starts if not self._is_kept(at, paths[at : at + size], work)]
            groups = {at: range(at, min(at + size, len(paths)), count) for at in missing}
            batches = work.reader.batches([paths[at : at + count] for group in groups.values() for at in group])
            for start in track(missing, "predicting", console=console, disable=not console.is_terminal):
                piece = _Piece()
                for first, batch in zip(groups[start], islice(batches, len(groups[start])), strict=True):
                    kept = [first + position for position in batch.kept]
                    for at, prediction in zip(kept, work(batch), strict=True):
                        piece.add(paths[at], prediction)
                        self._write_pictures(targets[at], prediction)
                    for at in set(range(first, first + len(batch.marks))).difference(kept):
                        self._remove_pictures(targets[at])
                    piece.images += batch.marks
                    piece.left_out += batch.left_out
                self._pieces.write(start, json.dumps(asdict(piece)).encode())
            left_out = self._finish(starts)
        self._remove_folder()  # behind its lock
        return left_out

    def _is_kept(self, start: int, files: Sequence[Path], work: Work) -> bool:
        """Whether a piece was written, of the files as they are now."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(read_regular(self._pieces.path(start)))
            # What could not be read is tried again: it may be allowed now, or be there again.
            marks = [work.reader.mark_of(str(path)) for path in files]
            return bool(found["images"] == marks and not found["left_out"])
        return False

    def _write_pictures(self, target: Path, prediction: Prediction) -> None:
        written = {self.out / folder / target: _png(picture) for folder, picture in prediction.pictures.items()}
        arrays = prediction.arrays.items()
        written |= {(self.out / folder / target).with_suffix(".npy"): _npy(array) for folder, array in arrays}
        if written:
            write_atomically(written)

    def _remove_pictures(self, target: Path) -> None:
        """Remove the pictures of an image that was broken after they were written, before a kill."""
        for path in self._pictures(target):
            path.unlink(missing_ok=True)

    def _finish(self, starts: range) -> list[BrokenImage]:
        """Join the pieces, and say what became of the images; with the table the predictions are finished."""
        left_out: list[BrokenImage] = []
        not_finite: list[str] = []
        count, quoted = 0, needs_quotes([self._predictor.columns])
        for start in starts:
            piece = self._read(start)
            quoted = quoted or needs_quotes(piece.rows)
            count += len(piece.rows)
            left_out += piece.left_out
            not_finite += piece.not_finite
        broken = [["path", "reason"], *(map(_no_formula, entry) for entry in left_out)]
        more = {self.out / LEFT_OUT: as_csv([list(row) for row in broken]).encode()} if left_out else {}
        (self.out / LEFT_OUT).unlink(missing_ok=True)  # of an earlier start that was killed between both tables
        write_atomically({**more, self.path: self._joined(starts, quoted)})
        self._pieces.clear()
        console.print(f"{counted(count, 'image')} predicted: {self.path}", soft_wrap=True)
        if not_finite:
            rest = f" and {len(not_finite) - NAMED} more" if len(not_finite) > NAMED else ""
            console.print(
                f"The outputs for {len(not_finite)} of them are not finite, and their cells are empty: "
                f"{', '.join(not_finite[:NAMED])}{rest}.",
                soft_wrap=True,
            )
        return left_out

    def _read(self, start: int) -> _Piece:
        found = json.loads(read_regular(self._pieces.path(start)))
        return _Piece(**{**found, "left_out": [BrokenImage(*entry) for entry in found["left_out"]]})

    def _joined(self, starts: range, quoted: bool) -> Iterator[bytes]:
        """Yield the table in parts, so that it is never in memory as a whole."""
        yield as_csv([["path", *self._predictor.columns]], quoted).encode()
        for start in starts:
            yield as_csv(self._read(start).rows, quoted).encode()


def _npy(array: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
