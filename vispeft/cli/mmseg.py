"""``vispeft train CONFIG.py``: train a segmentor of mmsegmentation with mmengine's Runner."""

from __future__ import annotations

import contextlib
import importlib
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vispeft.cli import runs
from vispeft.cli.common import make_parser, versions
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.resources import find_config

__all__ = ["main", "train"]

EXAMPLE = """example:
  vispeft train mmseg/earth_swin_segformer
  vispeft train mmseg/earth_swin_segformer --out runs/mine --cfg-options train_cfg.max_iters=200
  vispeft train mmseg/earth_swin_segformer --resume runs/mine

mmsegmentation's own tools/train.py takes the same configs, for several GPUs for example. The run directory then holds
adapter/ (and adapter_best/), mmengine's checkpoints and logs, and metrics.json."""


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
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="values instead of the config's"
    )
    given = parser.parse_args(argv)
    if given.out is not None and given.resume is not None:
        raise ConfigError("--out was given with --resume; a run goes on in its own directory. Leave --out out.")
    command = shlex.join(["vispeft", "train", *argv])
    train(find_config(given.config), given.cfg_options, out=given.out, resume=given.resume, command=command)


def train(
    config: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    command: str = "",
) -> Path:
    """Train from a config.

    Args:
        config: The ``.py`` file.
        overrides: Values by dotted key that replace the config's.
        out: The run directory; None takes the next number under ``runs/<config name>``.
        resume: Directory of a run to resume from its newest checkpoint.
        command: The command line, for ``metrics.json``.

    Returns:
        The run directory.

    Raises:
        ConfigError: If mmsegmentation is not installed, or the config's parts contradict each other.
        FileError: If the config, or the run to resume, is missing or cannot be read.
        DataError: If the data are not at the config's paths.
    """
    importlib.import_module("vispeft.mmseg")  # raises with an install hint; mmengine is imported only after it
    from mmengine.runner import Runner

    began = time.perf_counter()
    tree = read(config, overrides)
    place = runs.claim(out, config) if resume is None else _begun(Path(resume))
    tree.work_dir, tree.resume = str(place), resume is not None
    tree.load_from = None if tree.resume else tree.get("load_from")
    try:
        with _removed_unless_begun(place, keep=tree.resume) as begun:
            runner = Runner.from_cfg(tree)
            begun.append(runner)
            runner.train()
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
    runs.write_json(place / runs.METRICS, _summary(runner, command, time.perf_counter() - began))
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


def _begun(place: Path) -> Path:
    from mmengine.runner import find_latest_checkpoint

    if not place.is_dir() or find_latest_checkpoint(str(place)) is None:
        raise FileError(f"{place} was to be resumed, and there is no checkpoint. Name a run directory that has one.")
    return place


def _summary(runner: Any, command: str, seconds: float) -> dict[str, Any]:
    """Collect the results of the run that mmengine provides."""
    import mmcv
    import mmengine
    import mmseg

    from vispeft.mmseg.files import backbones

    scalars = runner.message_hub.log_scalars.items()
    banks = {name: backbone.bank for name, backbone in backbones(runner.model).items()}
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
