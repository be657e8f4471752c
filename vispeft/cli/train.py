"""``vispeft train``: train an adapter from a config and fill a run directory."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from vispeft.adapters.compiling import Compile
from vispeft.building.config_files import Node, read_config
from vispeft.cli import runs
from vispeft.cli.common import console, make_parser, one_line
from vispeft.cli.config import ConfigCLI
from vispeft.cli.config_changes import differing, is_free, told, without_free
from vispeft.cli.config_keys import as_list, split_overrides
from vispeft.cli.early import TrainCLI
from vispeft.cli.evaluation import accelerator_here, kept_settings
from vispeft.cli.finish import finish_run
from vispeft.cli.folds import train_folds
from vispeft.cli.own_code import load_code
from vispeft.cli.processes import OWN, STRATEGIES, following, leave_group, make_strategy, started, watch_parent
from vispeft.cli.settings import check_names, check_room, check_text, rehearse_stopping, rehearse_test
from vispeft.cli.start import start_from
from vispeft.cli.stopping import disk_is_full, own_code, tell_how_to_go_on
from vispeft.cli.trackers import make_trackers, tracked
from vispeft.data.base import ImageData
from vispeft.data.listed import ListedData
from vispeft.errors import ConfigError, FileError, TrainingError
from vispeft.resources import find_config
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.callbacks import EpochPictures, progress_bar
from vispeft.tasks.checkpoints import (
    Found,
    RunCheckpoints,
    SealedCheckpointIO,
    config_digest,
    find_checkpoint,
    read_checkpoint,
)
from vispeft.tasks.feature_cache import cache_features
from vispeft.tasks.logs import RunLog
from vispeft.tasks.processes import SameEverywhere, check_processes
from vispeft.tasks.sharding import shards

__all__ = ["finish", "main", "resume", "train"]

MORE = "trainer.max_epochs"
"""The key that may change once a run is finished."""

EXAMPLE = """example:
  vispeft train classification/digits_ssf
  vispeft train classification/digits_ssf --model.lr 5e-3 --trainer.max_epochs 10
  vispeft train classification/digits_ssf --method lora --model.method.rank 4 --out runs/mine
  vispeft train --resume runs/digits_ssf/1
  vispeft train --resume runs/digits_ssf/1 --trainer.max_epochs 40
  vispeft train --finish runs/digits_ssf/1
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
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        if not any(token.partition("=")[0] in ("--resume", "--finish") for token in argv):
            raise ConfigError(f"{argv[0]} stands where the config belongs. {one_line(parser.format_usage())}")
        argv = ["", *argv]  # the run has its own config
    given, overrides = parser.parse_known_args(argv)
    for name in given.code:
        load_code(name)
    own_code[:] = given.code
    for key, value in (("init", given.init), ("model.method", given.method)):
        if value is not None:
            overrides = [f"--{key}", value, *overrides]
    if given.print_config:
        overrides = [*overrides, "--print_config"]
    command = shlex.join(["vispeft", "train", *(token for token in argv if token)])
    config = find_config(given.config) if given.config else None
    if given.finish is not None:
        extra = [name for name in ("resume", "out", "method", "init", "folds") if getattr(given, name) is not None]
        others = [key for key, _ in split_overrides(overrides) if not key.startswith("trainer.logger")]
        if given.config or extra or others:
            raise ConfigError(
                "--finish takes the run alone, whose config is in its directory, and --trainer.logger. Leave the rest "
                "out."
            )
        finish(given.finish, overrides)
        return
    if given.folds is not None:
        if given.resume is not None:
            raise ConfigError("--resume was given with --folds, which goes on by itself: give the same command again.")
        if TrainCLI(cast(Path, config), overrides).team.processes > 1:
            raise ConfigError("--folds trains in one process. Set trainer.devices to 1, or train each fold by itself.")
        train_folds(cast(Path, config), overrides, given.folds, _train_or_resume, out=given.out, command=command)
        return
    if given.resume is None:
        train(cast(Path, config), overrides, out=given.out, command=command)
        return
    if given.out is not None:
        raise ConfigError("--out was given with --resume; a run goes on in its own directory. Leave --out out.")
    resume(given.resume, config, overrides, elastic=given.elastic, command=command)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("train", "Train an adapter from a config.", EXAMPLE)
    parser.add_argument(
        "config", metavar="CONFIG", help="name of a packaged config, or a YAML file; first, or left out with --resume"
    )
    parser.add_argument("--method", metavar="NAME", help="method instead of the config's: a name, or a YAML file")
    parser.add_argument("--init", metavar="ADAPTER", help="adapter to start from: zoo:NAME, or a directory")
    parser.add_argument("--out", metavar="DIR", help="run directory; default runs/<config name>/<n>")
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with a run that was stopped, or for more epochs with a finished one"
    )
    parser.add_argument("--elastic", action="store_true", help="with --resume: go on with another number of processes")
    parser.add_argument("--finish", metavar="RUN", help="make an adapter of the best epoch of a run that was stopped")
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

    Config, data, backbone and method are fully checked before the run directory is created, and a run that is refused
    before its first step leaves none.

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
    cli = TrainCLI(config, overrides)
    out = cli.team.place(out)
    check_text(cli.resolved(), out)
    if not cli.team.first:
        _follow(Path(str(out)), cli, None)
    runs.check_claim(out, config)
    _prepare(cli)
    check_names(cli.model.output_names(cli.datamodule))
    check_room(Path(out) if out is not None else Path("runs"), cli.model)
    made = out is None or not os.path.lexists(out)
    place = runs.claim(out, config)
    checkpoints: RunCheckpoints | None = None
    with contextlib.ExitStack() as behind_the_lock, runs.held(place):
        runs.check_empty(place)
        try:
            trainer = _trainer(place, cli, None)
            checkpoints = cast(RunCheckpoints, trainer.checkpoint_callback)
            with tell_how_to_go_on(place):
                runs.begin(place, cli.resolved(), command)
                _carry_out(place, cli, trainer, None, began)
        except Exception as error:
            if not disk_is_full(error) and (checkpoints is None or not checkpoints.began):
                runs.withdraw(place)
                if made:
                    behind_the_lock.callback(runs.remove_empty, place)
            raise
    return place


def resume(
    run: str | Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    elastic: bool = False,
    command: str = "",
) -> Path:
    """Resume a run that was stopped at any point, with the same result as an uninterrupted run.

    A finished run is gone on with where ``--trainer.max_epochs`` asks for more epochs than it has.

    Args:
        run: Its directory.
        config: The config it was started with; None takes it from the directory.
        overrides: The overrides it was started with, or none; keys that do not affect the result may differ.
        elastic: Go on with another number of processes too: they share the batches of the run. Once a checkpoint is
            theirs, their number is the one to go on with.
        command: The command line; used only if the run had not started yet.

    Returns:
        The run directory.

    Raises:
        ConfigError: If a setting would change the result.
        InUseError: If another process trains in the directory.
        VispeftError: If the run cannot continue.
    """
    began = time.perf_counter()
    place = Path(run)
    if not runs.begun(place):
        if config is None:
            raise FileError(f"{place} was stopped before its config was written. Begin it again: CONFIG --out {place}.")
        return train(config, overrides, out=place, command=command)
    changed = [key for key, _ in split_overrides(overrides) if not is_free(key)]
    if runs.finished(place) and config is None and not changed:
        return _say_finished(place)  # before its data are looked at, which may be gone by now
    cli = TrainCLI(config or place / runs.CONFIG, overrides)
    if not cli.team.first:
        _follow(place, cli, _found(place, cli), elastic)
    cli.needed = [*overrides, *(["--elastic"] if elastic else [])]  # the run's config is that of its begin
    with runs.held(place), tell_how_to_go_on(place, cli.needed):
        more = _asks_for_more(place, cli, MORE in changed, again=config is not None)
        if runs.finished(place) and not more:
            return _say_finished(place)
        found = _found(place, cli)
        if found is not None:
            check_processes(found.state["processes"], cli.team.processes, elastic)
        _prepare(cli, found)
        if more:
            # In this order: killed in between, the run counts as finished, and the same command goes on.
            runs.begin(place, cli.resolved(), runs.command_of(place))
            runs.mark_unfinished(place)
        _carry_out(place, cli, _trainer(place, cli, found, elastic), found, began)
    return place


def _follow(place: Path, cli: TrainCLI, found: Found | None, elastic: bool = False) -> NoReturn:
    """Train in a process that is not the first, which alone writes the run directory, and end the process."""
    until = cli.settings("trainer")["max_epochs"]
    if found is not None and found.finished and found.state.get("until") in (None, until):
        raise SystemExit(0)  # nothing is left to train, and the first process measures alone
    watch_parent()
    console.quiet = True
    logging.getLogger("vispeft").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    _prepare(cli, found)
    with following(cli.team.rank):
        _fit(cli, _trainer(place, cli, found, elastic), found)
    raise SystemExit(0)


def finish(run: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Finish a run that was stopped: make an adapter of its best epoch so far, measure it and draw the pictures.

    Args:
        run: Its directory.
        overrides: Changes under ``trainer.logger``, such as those of a tracker that is not there any more.

    Returns:
        The run directory.

    Raises:
        TrainingError: If no epoch was measured yet.
        InUseError: If another process trains in the directory.
        VispeftError: If the run cannot be read, measured or written.
    """
    began = time.perf_counter()
    place = Path(run)
    if not runs.begun(place):
        raise FileError(f"{place} was stopped before its config was written; there is nothing to finish.")
    if runs.finished(place):
        return _say_finished(place)
    with runs.held(place), tell_how_to_go_on(place, by="--finish"):
        cli = TrainCLI(place / runs.CONFIG, [*_one_device(read_config(place / runs.CONFIG)), *overrides])
        found = _found(place, cli)
        if found is None or found.state["best"] is None:
            raise TrainingError(
                f"No epoch of {place} has been measured and kept yet, so there is no best one to make an adapter of. "
                f"Go on by vispeft train --resume {place}"
            )
        cli.processes = found.state["processes"]  # they divided the batches, by one of which is measured
        _prepare(cli, found)
        trainer = _trainer(place, cli, found)
        cast(RunCheckpoints, trainer.checkpoint_callback).take_over(found.state, found.path.name)
        _check_measured(cli.datamodule, found)
        with tracked(place, trainer, cli):
            finish_run(place, cli, trainer, began - found.state["seconds"])
    if not found.finished:
        planned = cli.trainer_settings["max_epochs"]
        said = f"The run was stopped early. Its further epochs: vispeft train --resume {place} --{MORE} {planned}"
        console.print(said, soft_wrap=True)
    return place


def _one_device(config: Node) -> list[str]:
    """Return overrides by which a run is measured on a device that there is, whatever it was trained on."""
    accelerator = accelerator_here(kept_settings(config.get("trainer")).get("accelerator"))
    return [f"--trainer.accelerator={accelerator}", "--trainer.devices=1", "--trainer.num_nodes=1"]


def _say_finished(place: Path) -> Path:
    runs.clear_lock(place)
    said = f"{place} is finished; there is nothing to go on with. Its figures are in {runs.METRICS}."
    console.print(said, soft_wrap=True)
    return place


def _found(place: Path, cli: ConfigCLI) -> Found | None:
    """Find the checkpoint to go on from, and check that it was written with the same config."""
    found = find_checkpoint(place / runs.CHECKPOINTS)
    if found is None:
        console.print(f"{place} has no checkpoint, so training begins anew.", soft_wrap=True)
        if cli.team.first:
            shutil.rmtree(place / runs.LOGS, ignore_errors=True)
        return None
    if found.config is None:
        console.print(
            f"Warning: {found.path.name} is of an earlier version and does not say which config it was written with; "
            f"it is taken to be {runs.CONFIG}.",
            soft_wrap=True,
        )
    else:
        _check_same_config(cli, found.path, found.config, (MORE,) if found.finished else ())
    if found.best_config is not None and found.best_config != found.config:
        best = found.path.with_name(found.state["best"]["file"])
        _check_same_config(cli, best, found.best_config, (MORE,))  # of a run that went on for more epochs
    console.print(f"Going on from {found.path}.", soft_wrap=True)
    return found


def _check_same_config(cli: ConfigCLI, path: Path, config: Node, may_differ: Sequence[str]) -> None:
    other = {key: values for key, values in differing(cli, config).items() if key not in may_differ}
    if other:
        raise ConfigError(
            f"{path} was written with another config: {told(other)}. Set {runs.CONFIG} back, or begin a new run."
        )


def _asks_for_more(place: Path, cli: ConfigCLI, given: bool, again: bool) -> bool:
    """Check that a run goes on as it was begun; tell whether a finished one is asked for more epochs.

    Raises:
        ConfigError: If a key that could change the result differs.
    """
    other = differing(cli, read_config(place / runs.CONFIG))
    wanted = cli.config["trainer"]["max_epochs"]
    if (runs.finished(place) and given and list(other) in ([], [MORE])) and wanted is not None:
        done = runs.Run.open(place).number("epochs")
        if wanted > done:
            if again and _planned(place) == wanted:
                return False  # the command that began it, given once more; the training had ended by itself
            _check_not_over(place, cli, wanted, done)
            return True
        if other:
            raise ConfigError(f"{place} is finished after {done} epochs, and --{MORE} asks for {wanted}. Ask for more.")
    if other:
        hint = " A finished run takes more epochs, this one has to be finished first." if list(other) == [MORE] else ""
        raise ConfigError(
            f"{place} goes on as it was begun, and this would change the result: {told(other)}. Leave it out, or begin "
            f"a new run.{hint}"
        )
    return False


def _planned(place: Path) -> int | None:
    """Return the epochs that a training which has ended was asked for."""
    found = find_checkpoint(place / runs.CHECKPOINTS)
    return None if found is None or not found.finished else found.state.get("until")


def _check_not_over(place: Path, cli: ConfigCLI, wanted: int, done: int) -> None:
    """Refuse more epochs for a training that ended by itself and would end at once again."""
    found, steps = find_checkpoint(place / runs.CHECKPOINTS), cli.config["trainer"]["max_steps"]
    if found is None or not found.finished:
        return  # it was finished by hand, and has the rest of its epochs before it
    if found.state.get("until") == wanted:
        raise ConfigError(
            f"{place} ended by itself after {done} of {wanted} epochs: by EarlyStopping, trainer.max_steps or "
            f"trainer.max_time. Ask for more than {wanted}."
        )
    if 0 <= steps <= found.state["steps"]:
        raise ConfigError(
            f"{place} has made all {steps} steps of trainer.max_steps, so further epochs would train nothing. Begin a "
            "new run with more steps."
        )


def _prepare(cli: TrainCLI, found: Found | None = None) -> None:
    """Make the objects of a config, run all further checks possible before training, and initialise the adapter.

    The batches of a checkpoint, if one is given, are shared by the processes of the training.
    """
    if found is not None:
        parts = read_checkpoint(found.path)
        cli.batches = {key: part["batch_size"] for key, part in parts.items() if _has_batches(part)}
    cli.create()
    task, data = cli.model, cli.datamodule
    if isinstance(data, ImageData):
        data.fit_to(task.preprocessing)
        data.setup()
    _tell_repeated(data)
    task.check_data(data)
    if task.head_start is not None:
        task.head_start.check(task, data)
    if cli.config["init"] is not None:
        said = start_from(task, cli.config["init"], task.output_names(data))
        console.print(said, soft_wrap=True)
    cli.prepare_model()
    kept = cli.config["cache_features"]
    if kept not in (False, None):
        cache_features(task, data, cli.trainer, None if kept is True else kept)
    rehearse_test(task, data, cli.trainer_settings)
    rehearse_stopping(task, data, cli.trainer_settings)
    _compile(task, cli.config["compile"], cli.trainer)


def _has_batches(part: Any) -> bool:
    """Whether a part of a checkpoint is the state of data with batches."""
    return isinstance(part, dict) and isinstance(part.get("batch_size"), int)


def _tell_repeated(data: Any) -> None:
    """Say which images validation shows where the data have none for it alone."""
    other = data.listing.repeated_by("validation") if isinstance(data, ListedData) else None
    if other is not None:
        console.print(
            f"Validation shows the {other} images, since there are none for it alone. It chooses nothing: the last "
            "epoch is the result.",
            soft_wrap=True,
        )


def _compile(task: AdapterTask, mode: Compile, trainer: Trainer) -> None:
    """Compile the model, or say in one line why it runs as it is."""
    if mode == "off":
        return
    reason = task.bank.compile(mode, device=trainer.strategy.root_device)
    if reason is not None:
        console.print(f"compile: {mode} has no effect: {reason}.", soft_wrap=True)


def _carry_out(place: Path, cli: TrainCLI, trainer: Trainer, found: Found | None, began: float) -> None:
    """Train, or resume training, and finish."""
    task, checkpoints = cli.model, cast(RunCheckpoints, trainer.checkpoint_callback)
    console.print(task.report())
    console.print(f"Run directory: {place}", soft_wrap=True)
    earlier = 0.0 if found is None else found.state["seconds"]
    with tracked(place, trainer, cli):
        if found is not None and found.finished and not _has_more(place, found, trainer):
            _check_measured(cli.datamodule, found)
            checkpoints.take_over(found.state, found.path.name)
        else:
            with started(place, trainer, cli.needed):
                _fit(cli, trainer, found)
            if shards(trainer):
                _make_whole(cli)
        finish_run(place, cli, trainer, began - earlier)


def _fit(cli: TrainCLI, trainer: Trainer, found: Found | None) -> None:
    """Train; after it this process is on its own again."""
    trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=None if found is None else str(found.path))
    leave_group()


def _make_whole(cli: TrainCLI) -> None:
    """Make task and data again, since this process has trained with a part of the backbone alone.

    Raises:
        TrainingError: If the backbone is another one than that of the training.
    """
    before, quiet = cli.model.bank.fingerprint(), console.quiet
    console.quiet = True  # all of it was said before the training
    try:
        seed_everything(cli.config["seed_everything"], workers=True, verbose=False)
        _prepare(cli)  # the checkpoint that was gone on from may be gone; its batches are known
    finally:
        console.quiet = quiet
    if cli.model.bank.fingerprint() != before:
        raise TrainingError(
            "The backbone was made again to be measured as a whole, and its weights are others than those of the "
            "training: were its files changed meanwhile? The training is complete; put them back, and --resume."
        )


def _has_more(place: Path, found: Found, trainer: Trainer) -> bool:
    """Whether a finished training was asked for more epochs after it had ended."""
    return runs.is_unfinished(place) and found.state.get("until") not in (None, trainer.max_epochs)


def _check_measured(data: Any, found: Found) -> None:
    """Check that a completed training run is measured on the splits it was trained with."""
    state = read_checkpoint(found.path).get(type(data).__qualname__)
    if isinstance(data, ImageData) and state:
        data.check_same(state, order=False)


def _trainer(place: Path, cli: TrainCLI, found: Found | None, elastic: bool = False) -> Trainer:
    """Create the training trainer, which writes into a run directory."""
    task, settings = cli.model, cli.trainer_settings
    callbacks = as_list(settings.get("callbacks"))
    folder, cadence = place / runs.CHECKPOINTS, cli.config_init["checkpoints"]
    callbacks.append(EpochPictures(place / runs.PLOTS))
    kept = without_free(yaml.safe_load(cli.resolved()))
    callbacks.append(
        RunCheckpoints(folder, monitor=task.monitor, mode=task.monitor_mode, cadence=cadence, elastic=elastic)
    )
    several: dict[str, Any] = {}
    if cli.team.processes > 1:
        callbacks.append(SameEverywhere({"config": config_digest(kept)}))
        several["strategy"] = make_strategy(settings, task.skips_tensors)
    elif settings.get("strategy") in STRATEGIES:
        if settings["strategy"] in OWN:
            console.print(f"trainer.strategy: {settings['strategy']} has no effect: one process trains alone.")
        several["strategy"] = "auto"
    quiet = settings.get("enable_progress_bar") is False
    if not quiet and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(progress_bar(terminal=sys.stdout.isatty()))
    logs = place / runs.LOGS
    # TensorBoard hides values that an earlier process logged after the checkpoint.
    purge = {} if found is None else {"purge_step": found.state["logged_steps"]}
    board = TensorBoardLogger(logs, name="tensorboard", version="", **purge)
    own = {
        "callbacks": callbacks,
        "logger": [RunLog(logs), board, *(make_trackers(place, cli) if cli.team.first else [])],
        "plugins": [*as_list(settings.get("plugins")), SealedCheckpointIO(kept)],
        "default_root_dir": place,
        "enable_model_summary": False,
    }
    return Trainer(**{**settings, **own, **several})
