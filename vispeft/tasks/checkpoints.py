"""Checkpoints from which training resumes as if it had never been stopped.

A checkpoint is a file of Lightning's followed by a digest, so that a truncated or altered one is detected. It is
written between two steps and contains everything that training changes; the state that Lightning's own checkpoints lack
is collected in `vispeft.tasks.state`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.optim.lr_scheduler import LambdaLR

from vispeft.core.families import unwrap
from vispeft.data.base import ImageData
from vispeft.errors import ConfigError, FileError, TrainingError
from vispeft.storage.disk import read_regular, write_atomically
from vispeft.storage.fingerprint import check_fingerprint
from vispeft.tasks.checkpoint_form import check_content, check_state
from vispeft.tasks.head_start import is_start
from vispeft.tasks.logs import START, RunLog
from vispeft.tasks.processes import check_processes, collect_states
from vispeft.tasks.sharding import shards
from vispeft.tasks.state import between_steps, put_back, set_random_state, training_state
from vispeft.tasks.trackers import Tracker

__all__ = ["Cadence", "Found", "RunCheckpoints", "SealedCheckpointIO", "find_checkpoint", "read_checkpoint"]

logger = logging.getLogger(__name__)

SEAL = b"\nvispeft sha256 "
"""Separator between a checkpoint and its digest. Readers of zip files, such as torch, ignore the rest of the file."""
STATE = "vispeft"
"""Key of vispeft's part of a checkpoint."""
CONFIG = "config"
"""Key of the settings it was written with, and of their digest."""


# ------------------------------------------------------------------ files


class SealedCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, with a digest, and read them without running code."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        """Keep the settings of the run.

        Args:
            config: Plain values, which every checkpoint keeps with their digest; None to leave them out.
        """
        super().__init__()
        self._config = {} if config is None else {CONFIG: {"values": dict(config), "digest": config_digest(config)}}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Its content.
            path: The file.
            storage_options: Not used.

        Raises:
            FileError: If it cannot be written; an earlier file of that name is kept.
        """
        buffer = io.BytesIO()
        torch.save({**checkpoint, **self._config, "sealed": True}, buffer)
        content = buffer.getvalue()
        write_atomically({Path(path): content + SEAL + hashlib.sha256(content).hexdigest().encode()})

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Read and check a checkpoint.

        Args:
            path: The file.

        Raises:
            FileError: If it is missing, truncated or altered.
        """
        return read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint and check its digest; Lightning's own checkpoints, which have none, are read unchecked.

    Args:
        path: The file.

    Returns:
        Its content, on the CPU.

    Raises:
        FileError: If it is missing, truncated or altered.
    """
    try:
        content = read_regular(Path(path))
    except (OSError, ValueError) as error:  # a name with a null byte is no name
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"The checkpoint {path} could not be read ({reason}).") from error
    body, digest = content[: -len(SEAL) - 64], content[-64:]
    sealed = content[len(body) : -64] == SEAL
    if sealed and hashlib.sha256(body).hexdigest().encode() != digest:
        raise FileError(f"The checkpoint {path} was altered: its digest does not fit its content.")
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a parser may raise anything for bytes that are not a checkpoint
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileError(f"The checkpoint {path} cannot be read: {reason}") from error
    check_content(loaded, path)
    if loaded.pop("sealed", False) and not sealed:
        raise FileError(f"The checkpoint {path} is truncated: its digest is missing.")
    return loaded


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from."""

    path: Path
    """Its file."""
    state: dict[str, Any]
    """vispeft's part of it."""
    config: dict[str, Any] | None = None
    """The settings it was written with; None in those of earlier versions, and of scripts that gave none."""
    best_config: dict[str, Any] | None = None
    """Those of its best epoch."""

    @property
    def finished(self) -> bool:
        """Whether training had finished."""
        return bool(self.state["finished"])


def find_checkpoint(folder: Path) -> Found | None:
    """Find the last intact checkpoint of a run, with its best epoch.

    Args:
        folder: The checkpoints of the run.

    Returns:
        The checkpoint; None if there is no intact one. Damaged ones are logged as warnings.
    """
    for path in sorted(folder.glob("step-*.ckpt"), key=lambda path: path.stem, reverse=True):
        try:
            content = read_checkpoint(path)
            state, config = check_state(content.get(STATE), path), _config_of(content, path)
            best = None if state["best"] is None else folder / state["best"]["file"]
            best_config = None if best is None else _config_of(read_checkpoint(best), best)
        except FileError as error:
            logger.warning("%s It is left out, and the one before it is used.", error)
            continue
        return Found(path, state, config, best_config)
    return None


def config_digest(config: Mapping[str, Any]) -> str:
    """Hash the settings of a run.

    Args:
        config: Plain values by name.

    Returns:
        A sha256 in hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _config_of(content: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the settings in a checkpoint."""
    found = content.get(CONFIG)
    if found is None:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("values"), dict):
        raise FileError(f"The checkpoint {path} cannot be read: its config is no table of settings.")
    if config_digest(found["values"]) != found.get("digest"):
        raise FileError(f"The checkpoint {path} was altered: the digest of its config does not fit.")
    return dict(found["values"])


# ------------------------------------------------------------------ writing them while training


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Interval of checkpoints inside an epoch; there is always one between two epochs."""

    every_n_steps: int | None = None
    """Steps between two checkpoints; None uses only `minutes`."""
    minutes: float | None = 5.0
    """Minutes between two checkpoints; None uses only `every_n_steps`."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If one is not above 0.
        """
        for name in ("every_n_steps", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"checkpoints.{name} is {value}; a number above 0 is needed, or null.")


class RunCheckpoints(Checkpoint):
    """Keep the best epoch and the last two states of a training run, and resume from a state bit for bit.

    States are saved and restored at the start of a step, when the previous step is complete, including its validation
    and its rows in the logs. Use it together with `SealedCheckpointIO` among the trainer's plugins.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        monitor: str,
        mode: str = "max",
        cadence: Cadence | None = None,
        elastic: bool = False,
    ) -> None:
        """Set the folder and the metric.

        Args:
            folder: Folder of the checkpoints.
            monitor: Metric that selects the best epoch.
            mode: Whether more or less of it is better: ``max`` or ``min``.
            cadence: Interval of checkpoints inside an epoch.
            elastic: Go on with another number of processes too. Their random numbers are then new ones, and the means
                of the training images that are logged for this epoch are those of its remaining steps.
        """
        self.folder, self.monitor, self.mode, self.elastic = Path(folder), monitor, mode, elastic
        self.cadence = cadence or Cadence()
        self.began = False
        """Whether a step has begun; before it nothing has been trained that could be lost."""
        self.best: dict[str, Any] | None = None
        """File, epoch and score of the best epoch so far."""
        self.epochs = self.steps = 0
        """Epochs and steps of the training, once it is finished."""
        self.seconds = 0.0
        """Seconds of training so far, including those before a resume."""
        self.last_model_path = ""
        self._generations: list[set[str]] = []
        self._saving = self._finished = self._validated = False
        self._pending: dict[str, Any] | None = None
        self._backbone: dict[str, Any] | None = None
        self._until: int | None = None
        self._began = self._saved = 0.0

    @property
    def best_model_path(self) -> str:
        """File of the best epoch; empty if there is none yet."""
        return "" if self.best is None else str(self.folder / self.best["file"])

    # ------------------------------------------------------------------ going on

    def take_over(self, state: dict[str, Any], file: str) -> None:
        """Load the counters and scores of the whole run from a checkpoint, and remove files that no state needs.

        Args:
            state: vispeft's part of the checkpoint.
            file: Name of its file.
        """
        self.best, self.seconds = state["best"], state["seconds"]
        self.epochs, self.steps, self._backbone = state["epochs"], state["steps"], state["backbone"]
        self._until = state.get("until")
        earlier = state.get("earlier")  # None in checkpoints of earlier versions
        self._generations = [{str(name) for name in earlier or ()}, self._files(file)]
        # A newer file that could not be read is kept until the next state is written.
        newer = any(path.name > file for path in self.folder.glob("step-*.ckpt"))
        if earlier is not None and not newer and rank_zero_only.rank == 0:
            self._prune()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the state to restore before the next step.

        Raises:
            TrainingError: If it was written by another number of processes.
            BaseMismatchError: If the backbone differs.
        """
        state = checkpoint.get(STATE)
        if state is None or trainer.state.fn != TrainerFn.FITTING:
            return
        check_processes(state["processes"], trainer.world_size, self.elastic)
        if state["torch"] != torch.__version__:
            logger.warning(
                "The run was begun with torch %s and goes on with %s; the last bits may differ from one run in one go.",
                state["torch"],
                torch.__version__,
            )
        task = cast(Any, pl_module)
        check_fingerprint(state["backbone"], unwrap(task.model), task.bank.view)
        if shards(trainer):
            task.verify()  # the last moment at which this process has the whole backbone
        self.last_model_path = str(trainer.ckpt_path)
        self.take_over(state, Path(self.last_model_path).name)
        self._pending = state
        trainer.num_sanity_val_steps = 0  # already done, and it would reset the loaded counters

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify the adapter after resuming, and start the clock."""
        self._began = self._saved = time.monotonic()
        if self._pending is None:
            return
        if not shards(trainer):
            cast(Any, pl_module).verify()
        # Meant for loaders that restart the epoch; the data module continues where it was stopped.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        if self._pending["batches"] == 0:
            # With max_steps, Lightning mistakes a run stopped between two epochs for one stopped inside an epoch.
            trainer.fit_loop._restarting = False
            trainer.fit_loop.epoch_loop.restarting = False
        if self._pending["finished"]:
            _set_rates(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore a state, or write one if it is due."""
        self.began = True
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._put_back(pending, trainer, pl_module)
        elif self._due(trainer, batch_idx):
            self._save(trainer)
        self._validated = False

    def _put_back(self, pending: dict[str, Any], trainer: Trainer, task: LightningModule) -> None:
        """Restore the state of this process."""
        states = [pending["training"], *pending.get("others", [])]
        if len(states) == trainer.world_size:  # else the processes are others, and draw other numbers
            own = states[trainer.global_rank]
            if pending["finished"]:  # its epoch is over; the one that begins has means of its own
                set_random_state(own["random"])
            else:
                put_back(own, trainer, task)
        if trainer.is_global_zero:
            for log, rows in zip(_logs(trainer), pending["rows"], strict=True):
                log.rewind(rows)

    def _due(self, trainer: Trainer, batch: int) -> bool:
        if trainer.global_step == 0:
            return False  # a run stopped before its first checkpoint restarts, with the same result
        if batch == 0:
            return True
        progress = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        # Right after a validation, and during gradient accumulation, the state has parts that are not saved.
        if self._validated or progress % trainer.accumulate_grad_batches or not _repeatable(trainer):
            return False
        steps, minutes = self.cadence.every_n_steps, self.cadence.minutes
        due = steps is not None and trainer.global_step % steps == 0
        due = due or (minutes is not None and time.monotonic() - self._saved >= 60 * minutes)
        return bool(trainer.strategy.broadcast(due))

    # ------------------------------------------------------------------ writing

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights if they are the best so far.

        Raises:
            TrainingError: If the task does not log the selecting metric.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated = not trainer.sanity_checking
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise TrainingError(
                f"The best epoch is chosen by {self.monitor}, which the task does not log; it logs "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}."
            )
        if trainer.sanity_checking:
            return
        # If validation images are trained on, their score is meaningless, and the last epoch is kept.
        seen = getattr(pl_module, "outputs_seen", None)
        value = math.nan if seen is not None and seen.broken else float(score)
        epoch = START if is_start(pl_module) else trainer.current_epoch
        if getattr(trainer.datamodule, "validation_chooses", True) and not self._better(value, epoch):
            return
        self._keep(trainer, epoch, value)

    def _keep(self, trainer: Trainer, epoch: int, score: float) -> None:
        """Write the present weights as those of the best epoch."""
        name = "start" if epoch == START else f"epoch{epoch:03d}"
        file = f"best-{name}-{_at(trainer)}"
        trainer.save_checkpoint(self.folder / file, weights_only=True)
        self.best = {"file": file, "epoch": epoch, "score": score}

    def _better(self, score: float, epoch: int) -> bool:
        if not math.isfinite(score):
            logger.warning(
                "%s is %s after epoch %d, which decides nothing: this epoch is not compared with the others.",
                self.monitor,
                score,
                epoch + 1,
            )
            return False
        if self.best is None or not math.isfinite(self.best["score"]):
            return True
        best = self.best["score"]
        return score > best if self.mode == "max" else score < best

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state, and keep the last weights where they are the result and no validation came after."""
        self._finished = True
        chooses = getattr(cast(Any, trainer).datamodule, "validation_chooses", True)
        if self.best is None and chooses:
            logger.warning("No epoch has a %s that is a number, so the last weights are kept.", self.monitor)
        if self.best is None or not (chooses or self.best["file"].endswith(_at(trainer))):
            self._keep(trainer, max(0, trainer.current_epoch - 1), math.nan)
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        now = time.monotonic()
        self.seconds, self._began, self._saved = self.seconds + now - self._began, now, now
        self.epochs, self.steps, self._until = trainer.current_epoch, trainer.global_step, trainer.max_epochs
        _flush(trainer)
        path = self.folder / f"step-{trainer.global_step:07d}.ckpt"
        self._saving = True
        try:
            trainer.save_checkpoint(path, weights_only=False)
        finally:
            self._saving = False
        self.last_model_path = str(path)
        self._generations = [*self._generations[-1:], self._files(path.name)]
        if trainer.is_global_zero:
            self._prune()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add vispeft's part to a checkpoint that this callback writes."""
        if not self._saving:
            return
        task = cast(Any, pl_module)
        if self._backbone is None:
            self._backbone = task.bank.fingerprint()
        training, *others = collect_states(training_state(trainer, pl_module), trainer)
        checkpoint[STATE] = {
            "finished": self._finished,
            "best": self.best,
            "epochs": self.epochs,
            "steps": self.steps,
            "until": self._until,
            "earlier": sorted(set().union(*self._generations[-1:])),
            "seconds": self.seconds,
            "processes": trainer.world_size,
            "torch": str(torch.__version__),
            "backbone": self._backbone,
            "logged_steps": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "rows": [log.rows for log in _logs(trainer)] if trainer.is_global_zero else [],
            "batches": 0 if self._finished else between_steps(checkpoint["loops"]["fit_loop"]),
            "training": training,
            "others": others,
        }

    def _prune(self) -> None:
        """Remove files that neither of the last two states needs, and partial files of a killed process."""
        kept = set().union(*self._generations)
        for pattern in ("step-*.ckpt", "best-*.ckpt", ".step-*", ".best-*"):
            for path in self.folder.glob(pattern):
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def _files(self, state: str) -> set[str]:
        """Return the files of a state: its own, and its best epoch."""
        return {state} if self.best is None else {state, self.best["file"]}


def _set_rates(trainer: Trainer) -> None:
    """Compute the learning rates of the next step anew, as a finished training left those of its own last step."""
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if isinstance(schedule, LambdaLR):
            pairs = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, base, share in pairs:
                group["lr"] = base * share(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _at(trainer: Trainer) -> str:
    """Return the end of the name of a file that holds the present weights."""
    return f"step{trainer.global_step:07d}.ckpt"


def _repeatable(trainer: Trainer) -> bool:
    """Whether the data can resume inside an epoch."""
    return isinstance(cast(Any, trainer).datamodule, ImageData)


def _logs(trainer: Trainer) -> list[RunLog]:
    return [log for log in trainer.loggers if isinstance(log, RunLog)]


def _flush(trainer: Trainer) -> None:
    """Let loggers write what they hold: rows that the state counts as logged must survive this process."""
    for log in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(log, Tracker):
            log.flush()
        elif hasattr(experiment := getattr(log, "experiment", None), "flush"):
            experiment.flush()
