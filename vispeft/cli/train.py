"""``tools/train.py``: train an adapter from a config and fill a run directory."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from vispeft.cli import runs
from vispeft.cli.common import console, make_parser, one_line, versions
from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluation import Measured, measure, metrics_table, output_names
from vispeft.data.base import ImageData
from vispeft.errors import ConfigError, TrainingError
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.callbacks import progress_bar
from vispeft.viz import learning_curves

__all__ = ["main", "train"]

EXAMPLE = """example:
  python tools/train.py configs/classification/digits_ssf.yaml
  python tools/train.py configs/classification/digits_ssf.yaml --model.lr 5e-3 --trainer.max_epochs 10
  python tools/train.py configs/classification/digits_ssf.yaml --method lora --model.method.rank 4 --out runs/mine

Every key of the config can be overridden by its path; --print_config shows them all with their values. The run
directory then holds adapter/, config.yaml, metrics.json, checkpoints/, logs/ (TensorBoard and CSV) and plots/."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("tools/train.py", "Train an adapter as a config says.", EXAMPLE)
    parser.add_argument("config", metavar="CONFIG", help="YAML file; it comes first")
    parser.add_argument("--method", metavar="NAME", help="method instead of the config's: a name, or a YAML file")
    parser.add_argument("--out", metavar="DIR", help="run directory; default runs/<config name>/<n>")
    parser.add_argument("--print_config", action="store_true", help="print the whole config and leave")
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        raise ConfigError(f"{argv[0]} stands where the config belongs. {one_line(parser.format_usage())}")
    given, overrides = parser.parse_known_args(list(argv))
    if given.method is not None:
        overrides = ["--model.method", given.method, *overrides]
    if given.print_config:
        overrides = [*overrides, "--print_config"]
    command = shlex.join(["python", "tools/train.py", *argv])
    train(Path(given.config), overrides, out=given.out, command=command)


def train(config: Path, overrides: Sequence[str] = (), *, out: str | Path | None = None, command: str = "") -> Path:
    """Train as a config says.

    Everything that can be wrong with config, data, backbone and method is found before the run directory is made.

    Args:
        config: The YAML file.
        overrides: Such as ``["--model.lr", "1e-3"]``.
        out: The run directory; None takes the next number under ``runs/<config name>``.
        command: What was typed, for ``metrics.json``.

    Returns:
        The run directory.

    Raises:
        VispeftError: If something is wrong with what was given, or training cannot go on.
    """
    began = time.perf_counter()
    cli = ConfigCLI(config, overrides)
    task, data, settings = cli.model, cli.datamodule, cli.trainer_settings
    _check(settings)
    if isinstance(data, ImageData):
        data.fit_to(task.preprocessing)
        data.setup()
    task.check_data(data)
    place = runs.claim(out, config)
    try:
        trainer = _trainer(place, task, settings)
    except Exception:
        if not any(place.iterdir()):
            place.rmdir()
        raise
    runs.write_text(place / runs.CONFIG, cli.resolved())
    console.print(task.bank.report())
    console.print(f"Run directory: {place}", soft_wrap=True)
    fitting = time.perf_counter()
    trainer.fit(task, datamodule=data)
    seconds = {"training": time.perf_counter() - fitting}
    metrics = _finish(place, cli, trainer, seconds, began)
    runs.write_json(place / runs.METRICS, {"command": command, **metrics})
    console.print(f"Best of {metrics['epochs']} epochs on validation: epoch {metrics['best_epoch']}")
    console.print(metrics_table({split: metrics[split] for split in ("validation", "test")}))
    return place


def _check(settings: dict[str, Any]) -> None:
    if settings.get("logger") not in (None, True) and not isinstance(settings["logger"], (list, Logger)):
        raise ConfigError("trainer.logger is off, and a run directory always keeps its logs. Leave it out.")
    if settings.get("fast_dev_run"):
        raise ConfigError(
            "trainer.fast_dev_run makes no run directory. For a quick look use --trainer.max_epochs 1 "
            "--trainer.limit_train_batches 2."
        )
    if settings.get("enable_checkpointing") is False:
        raise ConfigError("trainer.enable_checkpointing is off, and the best epoch is chosen among checkpoints.")
    epochs, steps = settings.get("max_epochs"), settings.get("max_steps", -1)
    if epochs == 0 or steps == 0:
        raise ConfigError(f"trainer.max_epochs is {epochs} and trainer.max_steps {steps}; at least 1 is needed.")
    if epochs in (None, -1) and steps == -1:
        raise ConfigError("trainer.max_epochs sets no end, and the learning rate needs one. Give a number.")


def _trainer(place: Path, task: AdapterTask, settings: dict[str, Any]) -> Trainer:
    """Make the trainer that fits, with the files of a run directory."""
    callbacks = list(settings.get("callbacks") or [])
    callbacks.append(
        ModelCheckpoint(
            dirpath=place / runs.CHECKPOINTS,
            filename="best-epoch{epoch:03d}",
            monitor=task.monitor,
            mode=task.monitor_mode,
            auto_insert_metric_name=False,
            save_last=True,
        )
    )
    if not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(progress_bar(terminal=sys.stdout.isatty()))
    given = settings.get("logger")
    extra = given if isinstance(given, list) else [given] if isinstance(given, Logger) else []
    logs = place / runs.LOGS
    loggers = [CSVLogger(logs, name="csv", version=""), TensorBoardLogger(logs, name="tensorboard", version="")]
    own = {
        "callbacks": callbacks,
        "logger": [*loggers, *extra],
        "default_root_dir": place,
        "enable_model_summary": False,
    }
    return Trainer(**{**settings, **own})


def _finish(place: Path, cli: ConfigCLI, trainer: Trainer, seconds: dict[str, float], began: float) -> dict[str, Any]:
    """Take the best epoch, measure it, and write adapter and plots; ``metrics.json`` comes last, by the caller."""
    task, data = cli.model, cli.datamodule
    checkpoints = trainer.checkpoint_callback
    assert isinstance(checkpoints, ModelCheckpoint)
    if not checkpoints.best_model_path:
        raise TrainingError(
            f"No epoch was measured by {task.monitor}, so there is no best one. Is there a validation split, and is "
            "trainer.limit_val_batches above 0?"
        )
    best = task.restore(checkpoints.best_model_path)
    measured = measure(cli.trainer, task, data)
    names = output_names(data, task.num_classes)
    preprocessing = getattr(data, "preprocessing", task.preprocessing)
    by_split = measured.metrics.items()
    figures = {f"{split}/{name}": value for split, metrics in by_split for name, value in metrics.items()}
    task.bank.annotate(class_names=names, preprocessing=preprocessing.to_dict(), metrics=figures, output=task.output())
    task.bank.save(place / runs.ADAPTER)
    _plot(place, task, measured, names, best)
    return {
        **measured.metrics,
        **measured.details,
        "best_epoch": best + 1,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seed": cli.config["seed_everything"],
        "parameters": task.bank.report().to_dict(),
        "adapter_bytes": {path.name: path.stat().st_size for path in sorted((place / runs.ADAPTER).iterdir())},
        "seconds": {**seconds, **measured.seconds, "total": time.perf_counter() - began},
        "device": str(trainer.strategy.root_device),
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
        "versions": versions(),
    }


def _plot(place: Path, task: AdapterTask, measured: Measured, names: tuple[str, ...], best: int) -> None:
    plots = place / runs.PLOTS
    log = place / runs.LOGS / "csv" / "metrics.csv"
    learning_curves(log, plots / "learning_curves.png", best, ("loss", task.monitor.partition("/")[2]))
    measured.draw(task, names, plots)
