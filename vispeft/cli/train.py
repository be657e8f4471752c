"""``vispeft train``: train an adapter from a config and fill a run directory."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from vispeft.building.config_files import read_config
from vispeft.cli import runs
from vispeft.cli.common import console, make_parser, one_line, versions
from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluation import Measured, class_table, measure, metrics_table, output_names
from vispeft.cli.folds import train_folds
from vispeft.cli.own_code import load_code
from vispeft.cli.start import start_from
from vispeft.data.base import ImageData
from vispeft.errors import ConfigError, FileError, TrainingError
from vispeft.resources import config_names, find_config
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.callbacks import EpochPictures, progress_bar
from vispeft.tasks.checkpoints import Found, RunCheckpoints, SealedCheckpointIO, find_checkpoint, read_checkpoint
from vispeft.tasks.feature_cache import cache_features
from vispeft.tasks.logs import RunLog
from vispeft.viz import learning_curves

__all__ = ["main", "resume", "train"]

FREE = re.compile(
    r"trainer\.(accelerator|devices|enable_progress_bar|profiler)(\..*)?|data\.init_args\.num_workers|checkpoints\..*"
)
"""Keys that may change when a run is resumed, as none affects the result."""

EXAMPLE = """example:
  vispeft train classification/digits_ssf
  vispeft train classification/digits_ssf --model.lr 5e-3 --trainer.max_epochs 10
  vispeft train classification/digits_ssf --method lora --model.method.rank 4 --out runs/mine
  vispeft train --resume runs/digits_ssf/1
  vispeft train classification/digits_ssf --init runs/digits_ssf/1
  vispeft train my_config.yaml --code my_classes.py

Every key of the config can be overridden by its path; --print_config shows them all with their values. The run
directory then holds adapter/, config.yaml, metrics.json, checkpoints/, logs/ (TensorBoard and CSV) and plots/.

CONFIG is a YAML file, or one that comes with the package: --list names those. A config of mmsegmentation (a .py file)
is run by mmengine's Runner; vispeft train CONFIG --help says with which options."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    argv = list(argv)
    parser = _parser()
    if argv and not argv[0].startswith("-") and find_config(argv[0]).suffix == ".py":
        from vispeft.cli.mmseg import main as train_segmentor  # needs an extra

        train_segmentor(argv)
        return
    if argv == ["--list"]:
        print("\n".join(config_names()))
        return
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        if not any(token.partition("=")[0] == "--resume" for token in argv):
            raise ConfigError(f"{argv[0]} stands where the config belongs. {one_line(parser.format_usage())}")
        argv = ["", *argv]  # the run has its own config
    given, overrides = parser.parse_known_args(argv)
    for name in given.code:
        load_code(name)
    for key, value in (("init", given.init), ("model.method", given.method)):
        if value is not None:
            overrides = [f"--{key}", value, *overrides]
    if given.print_config:
        overrides = [*overrides, "--print_config"]
    command = shlex.join(["vispeft", "train", *(token for token in argv if token)])
    config = find_config(given.config) if given.config else None
    if given.folds is not None:
        if given.resume is not None:
            raise ConfigError("--resume was given with --folds, which goes on by itself: give the same command again.")
        train_folds(cast(Path, config), overrides, given.folds, _train_or_resume, out=given.out, command=command)
        return
    if given.resume is None:
        train(cast(Path, config), overrides, out=given.out, command=command)
        return
    if given.out is not None:
        raise ConfigError("--out was given with --resume; a run goes on in its own directory. Leave --out out.")
    resume(given.resume, config, overrides, command=command)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("train", "Train an adapter from a config.", EXAMPLE)
    parser.add_argument(
        "config", metavar="CONFIG", help="name of a packaged config, or a YAML file; first, or left out with --resume"
    )
    parser.add_argument("--method", metavar="NAME", help="method instead of the config's: a name, or a YAML file")
    parser.add_argument("--init", metavar="ADAPTER", help="adapter to start from: zoo:NAME, or a directory")
    parser.add_argument("--out", metavar="DIR", help="run directory; default runs/<config name>/<n>")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped")
    parser.add_argument("--folds", type=int, metavar="N", help="cross-validation: train once for each of N folds")
    parser.add_argument(
        "--code",
        metavar="MODULE",
        action="append",
        default=[],
        help="a Python file or module of your own; it is run, and the config may name its classes",
    )
    parser.add_argument("--print_config", action="store_true", help="print the whole config and leave")
    parser.add_argument("--list", action="store_true", help="name the packaged configs and leave; alone")
    return parser


def _train_or_resume(config: Path, overrides: Sequence[str], place: Path, command: str) -> Path:
    if os.path.exists(place):
        return resume(place, config, overrides, command=command)
    return train(config, overrides, out=place, command=command)


def train(config: Path, overrides: Sequence[str] = (), *, out: str | Path | None = None, command: str = "") -> Path:
    """Train from a config.

    Config, data, backbone and method are fully checked before the run directory is created.

    Args:
        config: The YAML file.
        overrides: Arguments such as ``["--model.lr", "1e-3"]``.
        out: The run directory; None takes the next number under ``runs/<config name>``.
        command: The command line, for ``metrics.json``.

    Returns:
        The run directory.

    Raises:
        VispeftError: If the arguments are invalid, or training cannot continue.
    """
    began = time.perf_counter()
    cli = _prepared(ConfigCLI(config, overrides))
    place = runs.claim(out, config)
    try:
        trainer = _trainer(place, cli, None)
    except Exception:
        if not any(place.iterdir()):
            place.rmdir()
        raise
    runs.begin(place, cli.resolved(), command)
    return _carry_out(place, cli, trainer, None, began)


def resume(run: str | Path, config: Path | None = None, overrides: Sequence[str] = (), *, command: str = "") -> Path:
    """Resume a run that was stopped at any point, with the same result as an uninterrupted run.

    Args:
        run: Its directory.
        config: The config it was started with; None takes it from the directory.
        overrides: The overrides it was started with, or none; keys that do not affect the result may differ.
        command: The command line; used only if the run had not started yet.

    Returns:
        The run directory.

    Raises:
        ConfigError: If a setting would change the result.
        VispeftError: If the run cannot continue.
    """
    began = time.perf_counter()
    place = Path(run)
    if not runs.begun(place):
        if config is None:
            raise FileError(f"{place} was stopped before its config was written. Begin it again: CONFIG --out {place}.")
        return train(config, overrides, out=place, command=command)
    cli = ConfigCLI(config or place / runs.CONFIG, overrides)
    _check_same(place, cli)
    if (place / runs.METRICS).is_file():
        said = f"{place} is finished; there is nothing to go on with. Its figures are in {runs.METRICS}."
        console.print(said, soft_wrap=True)
        return place
    _prepared(cli)
    found = find_checkpoint(place / runs.CHECKPOINTS)
    if found is None:
        console.print(f"{place} has no checkpoint, so training begins anew.", soft_wrap=True)
        shutil.rmtree(place / runs.LOGS, ignore_errors=True)
    else:
        console.print(f"Going on from {found.path}.", soft_wrap=True)
    return _carry_out(place, cli, _trainer(place, cli, found), found, began)


def _prepared(cli: ConfigCLI) -> ConfigCLI:
    """Run all checks possible before training, and initialise the adapter."""
    task, data = cli.model, cli.datamodule
    _check(cli.trainer_settings)
    _check_processes(cli.trainer)
    _check_last(cli.trainer_settings, data)
    if isinstance(data, ImageData):
        data.fit_to(task.preprocessing)
        data.setup()
    task.check_data(data)
    if cli.config["init"] is not None:
        console.print(start_from(task, cli.config["init"], output_names(data, task.num_classes)), soft_wrap=True)
    kept = cli.config["cache_features"]
    if kept not in (False, None):
        cache_features(task, data, cli.trainer, None if kept is True else kept)
    return cli


def _carry_out(place: Path, cli: ConfigCLI, trainer: Trainer, found: Found | None, began: float) -> Path:
    """Train, or resume training, and finish."""
    task, checkpoints = cli.model, cast(RunCheckpoints, trainer.checkpoint_callback)
    console.print(task.bank.report())
    console.print(f"Run directory: {place}", soft_wrap=True)
    earlier = 0.0 if found is None else found.state["seconds"]
    if found is not None and found.finished:
        _check_measured(cli.datamodule, found)
        checkpoints.take_over(found.state)
    else:
        try:
            trainer.fit(task, datamodule=cli.datamodule, ckpt_path=None if found is None else str(found.path))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise FileError(f"The disk of {place} is full. Free some space, then go on by --resume {place}.") from error
    metrics = _finish(place, cli, trainer, {"training": checkpoints.seconds}, began - earlier)
    runs.write_json(place / runs.METRICS, {"command": runs.command_of(place), **metrics})
    chosen = "Best" if getattr(cli.datamodule, "validation_chooses", True) else "Last"
    console.print(f"{chosen} of {metrics['epochs']} epochs: epoch {metrics['best_epoch']}")
    console.print(metrics_table({split: metrics[split] for split in ("validation", "test")}))
    if (by_class := class_table(metrics)) is not None:
        console.print(by_class)
    return place


def _check_measured(data: Any, found: Found) -> None:
    """Check that a completed training run is measured on the splits it was trained with."""
    state = read_checkpoint(found.path).get(type(data).__qualname__)
    if isinstance(data, ImageData) and state:
        data.check_same(state)


def _check_same(place: Path, cli: ConfigCLI) -> None:
    """Refuse to resume a run with another config.

    Raises:
        ConfigError: If a key that could change the result differs.
    """
    saved = dict(_flat(cli.completed(read_config(place / runs.CONFIG))))
    asked = dict(_flat(yaml.safe_load(cli.resolved())))
    other = [key for key in {**saved, **asked} if saved.get(key) != asked.get(key) and not FREE.fullmatch(key)]
    if other:
        listing = ", ".join(f"{key} was {saved.get(key)!r} and is {asked.get(key)!r}" for key in other[:4])
        raise ConfigError(
            f"{place} goes on as it was begun, and this would change the result: {listing}. Leave it out, or begin "
            "a new run."
        )


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """List the values of a config by dotted key."""
    if not isinstance(node, dict) or not node:
        yield path, node
        return
    for key, value in node.items():
        yield from _flat(value, f"{path}.{key}" if path else str(key))


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
    if settings.get("limit_val_batches") == 0:
        raise ConfigError("trainer.limit_val_batches is 0, and the best epoch is chosen on validation. Give more.")
    if epochs in (None, -1) and steps == -1:
        raise ConfigError("trainer.max_epochs sets no end, and the learning rate needs one. Give a number.")


def _check_processes(trainer: Trainer) -> None:
    processes = trainer.num_devices * trainer.num_nodes
    if processes > 1:
        raise ConfigError(
            f"trainer.devices asks for {processes} processes, and `vispeft train` trains in one: each of them would "
            "begin a run directory of its own. Set trainer.devices to 1."
        )


def _check_last(settings: dict[str, Any], data: Any) -> None:
    every = settings.get("check_val_every_n_epoch", 1)
    if every != 1 and not getattr(data, "validation_chooses", True):
        raise ConfigError(
            f"trainer.check_val_every_n_epoch is {every}, and {type(data).__name__} keeps the last epoch, which has to "
            "be one that is validated. Leave it out."
        )


def _trainer(place: Path, cli: ConfigCLI, found: Found | None) -> Trainer:
    """Create the training trainer, which writes into a run directory."""
    task, settings = cli.model, cli.trainer_settings
    callbacks = list(settings.get("callbacks") or [])
    folder, cadence = place / runs.CHECKPOINTS, cli.config_init["checkpoints"]
    callbacks.append(EpochPictures(place / runs.PLOTS))
    callbacks.append(RunCheckpoints(folder, monitor=task.monitor, mode=task.monitor_mode, cadence=cadence))
    if not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(progress_bar(terminal=sys.stdout.isatty()))
    logs = place / runs.LOGS
    # TensorBoard hides values that an earlier process logged after the checkpoint.
    purge = {} if found is None else {"purge_step": found.state["logged_steps"]}
    board = TensorBoardLogger(logs, name="tensorboard", version="", **purge)
    own = {
        "callbacks": callbacks,
        "logger": [RunLog(logs), board, *_listed(settings.get("logger"))],
        "plugins": [*_listed(settings.get("plugins")), SealedCheckpointIO()],
        "default_root_dir": place,
        "enable_model_summary": False,
    }
    return Trainer(**{**settings, **own})


def _listed(value: Any) -> list[Any]:
    """Convert a setting that may be a list, a single value or None to a list."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _finish(place: Path, cli: ConfigCLI, trainer: Trainer, seconds: dict[str, float], began: float) -> dict[str, Any]:
    """Load the best epoch, measure it, and write adapter and plots; the caller writes ``metrics.json`` last."""
    task, data = cli.model, cli.datamodule
    checkpoints = cast(RunCheckpoints, trainer.checkpoint_callback)
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
    output = {**task.output(), **getattr(data, "output_notes", dict)()}
    task.bank.annotate(class_names=names, preprocessing=preprocessing.to_dict(), metrics=figures, output=output)
    task.save_adapter(place / runs.ADAPTER)
    _plot(place, task, measured, names, best)
    return {
        **measured.metrics,
        **measured.details,
        "best_epoch": best + 1,
        "epochs": checkpoints.epochs,
        "steps": checkpoints.steps,
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
