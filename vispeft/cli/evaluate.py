"""``vispeft evaluate``: measure a finished run again, from its files."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lightning.pytorch import Trainer, seed_everything

from vispeft.building.config_files import read_config
from vispeft.building.parsing import parser_errors
from vispeft.cli.common import console, make_parser
from vispeft.cli.config import ConfigCLI, build_task
from vispeft.cli.config_keys import check_tree, split_overrides
from vispeft.cli.evaluation import evaluate, evaluation_trainer, kept_settings, metrics_table
from vispeft.cli.runs import Run
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.storage.files import JSON_FILE
from vispeft.tasks.base import AdapterTask

__all__ = ["class_names", "load_run", "load_task", "main"]

EXAMPLE = """example:
  vispeft evaluate runs/digits_ssf/1
  vispeft evaluate runs/digits_ssf/1 --split validation --data.batch_size 256

Keys under data and trainer can be overridden; the model is the one that was trained."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("evaluate", "Measure a finished run again, from its files.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run directory; it comes first")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="default test")
    given, overrides = parser.parse_known_args(list(argv))
    run = Run.open(given.run)
    cli = load_run(run, overrides)
    measured = evaluate(cli.trainer, cli.model, cli.datamodule, given.split)
    rows = {"measured now": measured, "metrics.json": run.metrics.get(given.split, {})}
    console.print(f"{given.run}, {given.split} split", soft_wrap=True)
    console.print(metrics_table(cli.model.shown(rows)))


def load_run(run: Run, overrides: Sequence[str] = ()) -> ConfigCLI:
    """Create task, data and trainer of a finished run, with the trained adapter on the backbone.

    Args:
        run: The run.
        overrides: Changes to the sections data and trainer.

    Returns:
        The config's objects; its trainer only evaluates.

    Raises:
        ConfigError: If an override would change the model.
        DataError: If the data have other classes than the run, or the same in another order.
        BaseMismatchError: If the backbone differs from the adapted one.
    """
    for key, _ in split_overrides(overrides):
        if key.split(".")[0] not in ("data", "trainer"):
            raise ConfigError(f"--{key}: a finished run takes overrides under data and trainer only.")
    tree = read_config(run.config)
    tree["trainer"] = kept_settings(tree.get("trainer"))
    cli = ConfigCLI(run.config, overrides, tree=tree)
    _check_names(run, cli.model.output_names(cli.datamodule), cli.model.ordered)
    cli.model.load_adapter(run.adapter)
    cli.model.eval()
    return cli


def _check_names(run: Run, names: Sequence[str], ordered: bool) -> None:
    """Compare the classes of data with those of a run, by name, and by order where it has a meaning."""
    trained = class_names(run)
    if list(names) == trained or (not ordered and sorted(names) == sorted(trained)):
        return
    if sorted(names) == sorted(trained):
        raise DataError(
            f"The data have the classes in another order than {run.path}: {', '.join(names[:6])} here, and "
            f"{', '.join(trained[:6])} there. Figures would be those of other classes. Name them in the run's order, "
            "such as by data.class_names, and number the labels likewise."
        )
    strange = [name for name in names if name not in trained] or ["none"]
    lacking = [name for name in trained if name not in names] or ["none"]
    raise DataError(
        f"The data have other classes than {run.path} was trained for: {', '.join(strange[:6])} here alone, and "
        f"{', '.join(lacking[:6])} there alone. Measure the run on data with its own {len(trained)} classes; `vispeft "
        "predict` takes any images."
    )


def class_names(run: Run) -> list[str]:
    """Read the names of the outputs of a run's adapter.

    Args:
        run: The run.

    Raises:
        FileError: If the adapter's description cannot be read, or names no classes.
    """
    path = run.adapter / JSON_FILE
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["class_names"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} cannot be read: {error}.") from error
    if not isinstance(names, list) or not names:
        raise FileError(f"{path} names no classes, so its outputs cannot be read. Was the adapter written by a run?")
    return [str(name) for name in names]


def load_task(run: Run) -> tuple[AdapterTask, Trainer]:
    """Create the task of a finished run, with the trained adapter on the backbone; its data need not exist.

    Args:
        run: The run.

    Returns:
        The task, and a trainer like the run's that only evaluates.

    Raises:
        BaseMismatchError: If the backbone differs from the adapted one.
    """
    tree = read_config(run.config)
    tree["trainer"] = kept_settings(tree.get("trainer"))
    # The data need not be known: those of a run may be of a class of the user's own.
    tree = {key: value for key, value in tree.items() if key in ("model", "seed_everything", "trainer")}
    check_tree(tree, str(run.config))
    if "model" not in tree:
        raise ConfigError(f"{run.config} has no section model, which says which task was trained.")
    class_names(run)
    header = json.loads((run.adapter / JSON_FILE).read_text(encoding="utf-8"))
    # The seed determines the weights of a randomly initialised backbone.
    seed_everything(tree.get("seed_everything", 0), verbose=False)
    task = build_task(tree["model"], lambda cls: cls.sized_by_file(header), str(run.config))
    task.load_adapter(run.adapter)
    with parser_errors(str(run.config)):
        return task.eval(), evaluation_trainer(**tree["trainer"])
