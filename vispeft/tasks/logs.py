"""The log of a run as a table: one file, whichever number of processes wrote it."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter

from vispeft.storage.disk import write_atomically

__all__ = ["START", "RunLog"]

logger = logging.getLogger(__name__)

START = -1
"""Number of the epoch before the first one, which counts as 0 and is shown as 1."""


class RunLog(CSVLogger):
    """Lightning's ``metrics.csv``, which a resumed run continues instead of restarting."""

    def __init__(self, folder: str | Path) -> None:
        """Set the folder of the table.

        Args:
            folder: Folder of the run's logs; the table is ``csv/metrics.csv`` in it.
        """
        super().__init__(folder, name="csv", version="")
        self.at_start = False
        """Whether values are those before the first step, whose epoch is then written as -1: epochs count from 0."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write values as a row of the table.

        Args:
            metrics: Values by name.
            step: Number of steps so far.
        """
        super().log_metrics({**metrics, "epoch": START} if self.at_start else metrics, step)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the table."""
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _Writer(self.log_dir)
        return self._experiment

    @property
    def rows(self) -> int:
        """Number of rows written so far."""
        return int(self.experiment.rows)

    def rewind(self, rows: int) -> None:
        """Remove the rows written after a checkpoint.

        Args:
            rows: Number of rows at the checkpoint.
        """
        self.experiment.rewind(rows)


class _Writer(ExperimentWriter):
    """Append rows; a table that needs another column is replaced atomically."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        before = self._read()
        self.rows = len(before)
        self.metrics_keys = sorted({key for row in before for key in row})

    def _check_log_dir_exists(self) -> None:
        """Keep earlier files; Lightning's own method deletes them."""

    def save(self) -> None:
        self.rows += len(self.metrics)
        super().save()

    def rewind(self, rows: int) -> None:
        before = self._read()
        if len(before) < rows:
            logger.warning("%s has %d rows; %d were written.", self.metrics_file_path, len(before), rows)
        kept = before[:rows]
        self.rows, self.metrics = len(kept), []
        self.metrics_keys = sorted({key for row in kept for key in row})
        self._write(kept, self.metrics_keys)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(self._read(), fieldnames)

    def _read(self) -> list[dict[str, str]]:
        """Read the table; a row has the values that were logged in it."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]

    def _write(self, rows: Sequence[Mapping[str, str]], fieldnames: Sequence[str]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically({Path(self.metrics_file_path): text.getvalue().encode()})
