"""``vispeft train CONFIG.py``: train a segmentor of mmsegmentation with mmengine's Runner."""

from __future__ import annotations

import contextlib
import importlib
import io
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn

import torch

from vispeft.cli import runs
from vispeft.cli.common import make_parser, versions
from vispeft.cli.mmseg_processes import LAUNCHERS, Launched
from vispeft.errors import ConfigError, DataError, FileError, brief
from vispeft.resources import find_config
from vispeft.storage.disk import read_regular

__all__ = ["main", "train"]

EXAMPLE = """example:
  vispeft train mmseg/earth_swin_segformer
  vispeft train mmseg/earth_swin_segformer --out runs/mine --cfg-options train_cfg.max_iters=200
  vispeft train mmseg/earth_swin_segformer --resume runs/mine
  torchrun --nproc-per-node 4 -m vispeft train mmseg/earth_swin_segformer --launcher pytorch --out runs/mine

mmsegmentation's own tools/train.py takes the same configs. The run directory then holds adapter/ (and adapter_best/),
mmengine's checkpoints and logs, and metrics.json."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.

    Raises:
        ConfigError: If mmsegmentation is not installed, or the arguments contradict each other.
    """
    importlib.import_module("vispeft.mmseg")  # raises with an install hint; mmengine is imported only after it
    from mmengine.config import DictAction

    parser = make_parser("train", "Train a segmentor of mmsegmentation with mmengine's Runner.", EXAMPLE)
    parser.add_argument("config", metavar="CONFIG", help="mmengine config: a .py file, or the name of a packaged one")
    parser.add_argument("--out", "--work-dir", metavar="DIR", help="run directory; default runs/<config name>/<n>")
    parser.add_argument("--resume", metavar="RUN", help="go on from the newest checkpoint of a run")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="none", help="what has started the processes of a training: torchrun"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="values instead of the config's"
    )
    given = parser.parse_args(argv)
    if given.out is not None and given.resume is not None:
        raise ConfigError("--out was given with --resume; a run goes on in its own directory. Leave --out out.")
    if given.launcher != "none" and given.out is None and given.resume is None:
        raise ConfigError(f"--launcher {given.launcher} starts several processes. Name one directory for all: --out.")
    command, where = shlex.join(["vispeft", "train", *argv]), {"out": given.out, "resume": given.resume}
    train(find_config(given.config), given.cfg_options, **where, command=command, launcher=given.launcher)


def train(
    config: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    command: str = "",
    launcher: str = "none",
) -> Path:
    """Train from a config.

    Args:
        config: The ``.py`` file.
        overrides: Values by dotted key that replace the config's.
        out: The run directory; None takes the next number under ``runs/<config name>``.
        resume: Directory of a run to resume from its newest checkpoint.
        command: The command line, for ``metrics.json``.
        launcher: What has started the processes that train together, by mmengine's name: ``none`` for one process.
            Only the first one writes the run directory and returns.

    Returns:
        The run directory.

    Raises:
        ConfigError: If mmsegmentation is not installed, or the config's parts contradict each other.
        FileError: If the config, or the run to resume, is missing or cannot be read, or another process trains in it.
        DataError: If the data are not at the config's paths.
    """
    importlib.import_module("vispeft.mmseg")  # raises with an install hint; mmengine is imported only after it

    began = time.perf_counter()
    tree = read(config, overrides)
    launched = Launched(launcher, tree)
    if launched.rank:
        _follow(launched, tree, resume)
    try:
        return _train(tree, config, launched, out, resume, command, began)
    except BaseException:
        launched.tell(None)
        raise


def _follow(launched: Launched, tree: Any, resume: str | Path | None) -> NoReturn:
    """Train in a process that is not the first, and end it."""
    from mmengine.runner import Runner

    place = launched.listen()
    checkpoint = None if resume is None else _newest_checkpoint(Path(place))
    _set_place(tree, Path(place), checkpoint)
    Runner.from_cfg(tree).train()
    launched.leave()
    raise SystemExit(0)


def _set_place(tree: Any, place: Path, checkpoint: Path | None) -> None:
    tree.work_dir, tree.resume = str(place), checkpoint is not None
    tree.load_from = tree.get("load_from") if checkpoint is None else str(checkpoint)


def _train(
    tree: Any,
    config: Path,
    launched: Launched,
    out: str | Path | None,
    resume: str | Path | None,
    command: str,
    began: float,
) -> Path:
    """Train in the first process, or in the only one."""
    from mmengine.runner import Runner

    checkpoint = None if resume is None else _newest_checkpoint(Path(resume))
    place = runs.claim(out, config) if checkpoint is None else checkpoint.parent
    _set_place(tree, place, checkpoint)
    try:
        with runs.held(place):
            if not tree.resume:
                runs.check_empty(place)
            launched.tell(str(place))
            with _removed_unless_begun(place, keep=tree.resume) as begun:
                runner = Runner.from_cfg(tree)
                begun.append(runner)
                runner.train()
                launched.leave()
            runs.write_json(place / runs.METRICS, _summary(runner, command, time.perf_counter() - began))
    except FileNotFoundError as error:
        raise DataError(
            f"{config} names data or files that are not there: {error}. Correct data_root, or the file's name, in it."
        ) from error
    except KeyError as error:
        if "registry" not in str(error):
            raise
        name = str(error.args[0]).partition(" is not in")[0]
        raise ConfigError(
            f"{config} names {name!r}, which mmsegmentation does not know. Correct the name, or name the module that "
            "registers it in custom_imports."
        ) from error
    return place


def read(config: Path, overrides: Mapping[str, Any] | None = None) -> Any:
    """Read an mmengine config.

    Args:
        config: The ``.py`` file.
        overrides: Values by dotted key that replace the config's.

    Returns:
        mmengine's ``Config``.

    Raises:
        FileError: If it is missing or not a config.
    """
    from mmengine.config import Config

    try:
        tree = Config.fromfile(config)
    except (OSError, SyntaxError, NameError) as error:
        raise FileError(f"{config} cannot be read as a config of mmengine: {error}.") from error
    if overrides:
        tree.merge_from_dict(dict(overrides))
    return tree


@contextlib.contextmanager
def _removed_unless_begun(place: Path, *, keep: bool) -> Iterator[list[Any]]:
    """Remove the run directory if an error occurs before the end of the first step.

    Args:
        place: The directory, empty so far.
        keep: Whether to keep it in any case.

    Yields:
        A list, to which the caller adds the Runner once it exists.
    """
    begun: list[Any] = []
    try:
        yield begun
    except Exception:
        # Accessing `runner.iter` would build the loop, which may be the cause of the error.
        if not keep and not any(getattr(runner._train_loop, "iter", 0) for runner in begun):
            shutil.rmtree(place, ignore_errors=True)
        raise


def _newest_checkpoint(place: Path) -> Path:
    """Find the newest checkpoint of a run: a file of its own that holds data alone.

    mmengine takes anything that ``last_checkpoint`` names: the file's place before the run was moved, or an address,
    and a file that it fetches from there may run code when it is read.
    """
    try:
        named = read_regular(place / "last_checkpoint", 2**12).decode().strip()
        checkpoint = place / PurePath(named).name
        content = read_regular(checkpoint)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(
            f"{place} was to be resumed, and there is no checkpoint that its file last_checkpoint names ({reason}). "
            "Name a run directory that has one."
        ) from error
    _check_data_alone(checkpoint, content)
    return checkpoint


def _check_data_alone(checkpoint: Path, content: bytes) -> None:
    """Refuse a checkpoint that would run code when mmengine reads it or goes on from it."""
    try:
        found = torch.load(io.BytesIO(content), map_location="meta", weights_only=True)
    except Exception as error:  # the readers of zip files and of pickles share no base class of errors
        raise FileError(
            f"{checkpoint} was to be resumed, and cannot be read as data: {brief(error)} Write the name of an earlier "
            f"one into {checkpoint.parent / 'last_checkpoint'}."
        ) from error
    meta = found.get("meta") if isinstance(found, dict) else None
    if not isinstance(meta, dict) or "config" in meta:
        raise FileError(
            f"{checkpoint} was to be resumed, and is no checkpoint of mmengine: it needs the key meta with plain "
            "values, and without the key config, which mmengine would run as Python. Name another run directory."
        )


def _summary(runner: Any, command: str, seconds: float) -> dict[str, Any]:
    """Collect the results of the run that mmengine provides."""
    import mmcv
    import mmengine
    import mmseg
    from mmengine.model import is_model_wrapper

    from vispeft.mmseg.files import backbones

    scalars = runner.message_hub.log_scalars.items()
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    banks = {name: backbone.bank for name, backbone in backbones(model).items()}
    return {
        "validation": {
            name.removeprefix("val/"): float(log.current())
            for name, log in scalars
            if name.startswith("val/") and not name.endswith("time")
        },
        "steps": runner.iter,
        "seed": runner.seed,
        "parameters": {name: bank.report().to_dict() for name, bank in banks.items() if bank is not None},
        "seconds": {"total": seconds},
        "command": command,
        "versions": {**versions(), **{package.__name__: package.__version__ for package in (mmseg, mmcv, mmengine)}},
    }
