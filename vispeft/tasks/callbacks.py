"""Callbacks: hooks of the methods, a stop at the first non-finite value, plots, and progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from torch import Tensor
from torch.optim import Optimizer

from vispeft.errors import TrainingError, brief
from vispeft.tasks.failures import StepStart, keep_failure
from vispeft.tasks.state import random_state, set_random_state

__all__ = ["EpochPictures", "FiniteGuard", "MethodHooks", "NarrowProgress", "PlainProgress", "progress_bar"]

logger = logging.getLogger(__name__)


class MethodHooks(Callback):
    """Call the hooks of methods around a step: initialisation from data, and changes of gradients."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let methods look at the classes of the data.

        Raises:
            ConfigError: If they do not fit.
        """
        task, data = cast(Any, pl_module), cast(Any, trainer).datamodule
        if task.by_class and hasattr(data, "class_names"):
            for name in task.bank.names:
                task.bank.plan(name).method.check_classes(task.output_names(data))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let methods initialise from the training data, unless the adapter is already trained or loaded."""
        task = cast(Any, pl_module)
        if task.started:
            return
        random = random_state()
        try:
            task.bank.start_from(TrainingBatches(trainer))
        finally:
            set_random_state(random)  # the steps draw the same numbers whether or not a method read the data
        if trainer.world_size > 1:
            # Their buffers too, such as entries that a process chose by its share of the data.
            states = [task.bank.state_dict(name).values() for name in task.bank.names]
            for tensor in [*(p.data for _, p in task.trainable_parameters()), *(t for state in states for t in state)]:
                tensor.copy_(trainer.strategy.broadcast(tensor))
        task.started = True  # at last, so that a start that failed is made anew by the next training

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let methods change gradients, after accumulation and before clipping."""
        cast(Any, pl_module).bank.change_gradients()


class TrainingBatches:
    """The batches of a training epoch on the training device, as the steps receive them."""

    def __init__(self, trainer: Trainer) -> None:
        """Store the trainer.

        Args:
            trainer: A trainer about to train.
        """
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        """Start a new epoch with a separate loader, as the sampler of the steps' loader counts epochs."""
        trainer = self._trainer
        data = cast(Any, trainer).datamodule
        loader = trainer.train_dataloader if data is None else data.train_dataloader()
        for index, batch in enumerate(cast(Any, loader)):
            if index >= trainer.num_training_batches:
                return
            yield trainer.strategy.batch_to_device(batch)


class _Flag:
    """Whether values of a step were finite, on its way from the device."""

    def __init__(self, finite: Tensor, told: str, start: StepStart | None) -> None:
        """Send the flag to the host, without waiting for it.

        Args:
            finite: A boolean scalar.
            told: What was looked at, and the step.
            start: What the step started from, where that can be kept.
        """
        self.told, self.start, self._value, self._arrived = told, start, finite, None
        if finite.is_cuda:
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> bool:
        """Wait until it has arrived, and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)


def _is_far(tensor: Tensor) -> bool:
    """Return whether the host would have to wait for a value of a tensor."""
    return tensor.device.type != "cpu"


class FiniteGuard(Callback):
    """Stop training at the first non-finite loss or gradient.

    On a CPU this is before it changes any weight, and the weights are those of the previous step. On other devices the
    host would wait for each step: there the flags of a step are read in the next one, and before anything is saved or
    validated, so that checkpoints on disk are valid in any case. Outputs of validation and test that are not finite are
    counted and said.
    """

    def __init__(self) -> None:
        """Begin without a flag."""
        self._flags: list[_Flag] = []
        self._start: StepStart | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note what the step starts from, where a run directory can keep it."""
        if _run_directory(trainer) is not None:
            self._start = StepStart.now(batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss.

        Raises:
            TrainingError: If it is not finite.
        """
        self._read(trainer, pl_module)
        finite = torch.isfinite(loss.detach()).all()
        if _is_far(finite):
            self._flags.append(_Flag(finite, f"The training loss was not finite at {_step(trainer)}", self._start))
            return
        if finite:
            return
        where = _weights(trainer, pl_module)
        told = f"The training loss is {loss.item()} at {_step(trainer)}."
        kept = _kept(trainer, pl_module, self._start, told)
        raise TrainingError(f"{told} {where} {_what_to_do(trainer)}{kept}")

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the flags that were not waited for.

        Raises:
            TrainingError: If something was not finite.
        """
        while self._flags:
            flag = self._flags[0]
            if not flag.read():  # it stays, so that nothing is saved after the error either
                kept = _kept(trainer, pl_module, flag.start, f"{flag.told}, which was seen after the step.")
                raise TrainingError(
                    f"{flag.told}, which was seen after the step. {_weights(trainer, pl_module)} "
                    f"{_what_to_do(trainer, 'Weights may have been updated since.')}{kept}"
                )
            self._flags.pop(0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin without a flag."""
        self._flags.clear()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let nothing be saved after a step that was not finite."""
        self._read(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let nothing be validated after a step that was not finite."""
        self._read(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let no epoch end with a step that was not finite."""
        self._read(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count outputs that are not finite."""
        cast(Any, pl_module).outputs_seen.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many images have outputs that are not finite."""
        seen = cast(Any, pl_module).outputs_seen
        if trainer.world_size > 1:  # all processes decide alike about the best epoch
            counts = torch.tensor([seen.images, seen.broken], device=pl_module.device)
            seen.images, seen.broken = cast(Tensor, trainer.strategy.reduce(counts, reduce_op="sum")).tolist()
        if seen.broken:
            logger.warning(seen.says("test" if trainer.testing else "validation"))

    on_test_epoch_end = on_validation_epoch_end

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the gradients.

        Raises:
            TrainingError: If one is not finite.
        """
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # a float16 scaler overflows by design while it searches its scale, and skips such a step
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        # The largest entry, which is finite where all are: a norm of finite values may overflow.
        finite = torch.stack(torch._foreach_norm(gradients, torch.inf)).isfinite().all()
        if _is_far(finite):
            self._flags.append(_Flag(finite, f"Gradients were not finite at {_step(trainer)}", self._start))
            return
        if finite:
            return
        broken = _by_group(trainer, pl_module, lambda parameter: parameter.grad)
        told = f"Gradients are not finite at {_step(trainer)}: {broken}."
        kept = _kept(trainer, pl_module, self._start, told)
        raise TrainingError(f"{told} {_what_to_do(trainer)}{kept}")


def _kept(trainer: Trainer, task: LightningModule, start: StepStart | None, told: str) -> str:
    """Keep a step where a run directory can, and say how it is looked at."""
    folder = _run_directory(trainer)
    if folder is None or start is None:
        return ""
    keep_failure(folder, task, trainer, start, told)
    return f" Where it arose: vispeft replay {folder}"


def _run_directory(trainer: Trainer) -> Path | None:
    """Return the directory of a run, where checkpoints are kept in one."""
    folder = getattr(trainer.checkpoint_callback, "folder", None)
    return None if folder is None else Path(folder).parent


def _step(trainer: Trainer) -> str:
    return f"step {trainer.global_step + 1} (epoch {trainer.current_epoch + 1})"


def _weights(trainer: Trainer, module: LightningModule) -> str:
    """Say which weights are not finite, or how large the largest ones are."""
    broken = _by_group(trainer, module, lambda parameter: parameter)
    if broken:
        return f"Weights that are not finite: {broken}."
    return f"All trainable weights are finite; the largest are {_largest(trainer)}."


def _what_to_do(trainer: Trainer, updated: str = "Nothing was updated by this step.") -> str:
    written = str(getattr(trainer.checkpoint_callback, "last_model_path", "") or "")
    kept = f"The last good checkpoint is {written}." if written else "No checkpoint was written before it."
    return f"{updated} {kept} Try a lower learning rate, or trainer.gradient_clip_val 1."


def _by_group(trainer: Trainer, module: LightningModule, pick: Callable[[Any], Tensor | None]) -> str:
    """List tensors that are not finite by the name of their optimiser group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parts = []
    for label, parameters in _groups(trainer):
        values = ((names.get(id(p), "?"), pick(p)) for p in parameters)
        bad = [name for name, value in values if value is not None and not torch.isfinite(value).all()]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            parts.append(f"group {label!r}: {', '.join(bad[:3])}{more} ({len(bad)} of {len(parameters)} tensors)")
    return "; ".join(parts)


def _largest(trainer: Trainer) -> str:
    parts = [
        f"group {label!r} {max(float(p.detach().abs().max()) for p in ps):.3g}" for label, ps in _groups(trainer) if ps
    ]
    return ", ".join(parts)


def _groups(trainer: Trainer) -> list[tuple[str, list[Tensor]]]:
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [(str(group.get("name", index)), list(group["params"])) for index, group in enumerate(groups)]


class EpochPictures(Callback):
    """Let a task draw its plots after each validation."""

    def __init__(self, folder: Path) -> None:
        """Set the folder of the plots.

        Args:
            folder: The folder, created with the first plot.
        """
        self.folder = folder
        self._said = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, except after Lightning's sanity check; a training goes on without a picture that cannot be drawn."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        try:
            cast(Any, pl_module).draw_epoch(self.folder, trainer.current_epoch)
        except Exception as error:
            if not self._said:
                logger.warning("A picture could not be drawn (%s: %s)", type(error).__name__, brief(error))
            self._said = True


class PlainProgress(ProgressBar):
    """One line per epoch, for logs and other places that are not a terminal."""

    def __init__(self, show: Callable[[str], None] = logger.info) -> None:
        """Set the receiver of the lines.

        Args:
            show: Takes each line.
        """
        super().__init__()
        self._show, self._enabled, self._began = show, True, 0.0

    def disable(self) -> None:
        """Disable output; Lightning calls this in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Enable output."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the clock, for an epoch resumed in its middle."""
        self._began = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the line."""
        if not self._enabled:
            return
        monitor = _monitor(pl_module)
        names = ("train/loss", f"train/{monitor.partition('/')[2]}", "validation/loss", monitor)
        metrics = trainer.callback_metrics
        figures = [f"{name} {float(metrics[name]):.4f}" for name in names if name in metrics]
        seconds = time.perf_counter() - self._began
        self._show(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(figures)}  {seconds:.1f} s")


class NarrowProgress(RichProgressBar):
    """A progress bar with one metric, as more would not fit into 80 columns."""

    _SHORT: ClassVar[dict[str, str]] = {"mean_average_precision": "mAP"}
    """Short names of metrics, for the bar."""

    def __init__(self) -> None:
        """Create a bar that disappears when done; the metrics are in the logs."""
        super().__init__(leave=False, theme=RichProgressBarTheme(metrics_format=".3f"))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metric that selects the best epoch, or nothing before its first value."""
        monitor, metrics = _monitor(pl_module), trainer.callback_metrics
        name = monitor.partition("/")[2]
        return {self._SHORT.get(name, name): float(metrics[monitor])} if monitor in metrics else {}


def _monitor(module: LightningModule) -> str:
    """Return the name of the metric that selects the best epoch."""
    return str(getattr(module, "monitor", "validation/accuracy"))


def progress_bar(terminal: bool) -> ProgressBar:
    """Choose the progress display.

    Args:
        terminal: Whether the output is a terminal.

    Returns:
        A bar for a terminal, and plain lines otherwise.
    """
    return NarrowProgress() if terminal else PlainProgress()
