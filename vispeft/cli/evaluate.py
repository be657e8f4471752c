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
from vispeft.errors import ConfigError
from vispeft.storage.files import JSON_FILE
from vispeft.tasks.base import AdapterTask

__all__ = ["load_run", "load_task", "main"]

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
    console.print(metrics_table(rows))


def load_run(run: Run, overrides: Sequence[str] = ()) -> ConfigCLI:
    """Create task, data and trainer of a finished run, with the trained adapter on the backbone.

    Args:
        run: The run.
        overrides: Changes to the sections data and trainer.

    Returns:
        The config's objects; its trainer only evaluates.

    Raises:
        ConfigError: If an override would change the model.
        BaseMismatchError: If the backbone differs from the adapted one.
    """
    for key, _ in split_overrides(overrides):
        if key.split(".")[0] not in ("data", "trainer"):
            raise ConfigError(f"--{key}: a finished run takes overrides under data and trainer only.")
    tree = read_config(run.config)
    tree["trainer"] = kept_settings(tree.get("trainer"))
    cli = ConfigCLI(run.config, overrides, tree=tree)
    cli.model.load_adapter(run.adapter)
    cli.model.eval()
    return cli


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
    names = json.loads((run.adapter / JSON_FILE).read_text(encoding="utf-8"))["class_names"]
    # The seed determines the weights of a randomly initialised backbone.
    seed_everything(tree.get("seed_everything", 0), verbose=False)
    task = build_task(tree["model"], len(names), str(run.config))
    task.load_adapter(run.adapter)
    with parser_errors(str(run.config)):
        return task.eval(), evaluation_trainer(**tree["trainer"])
