"""``vispeft evaluate``: measure a finished run again, from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import Trainer, seed_everything

from vispeft.adapters.fitting import FILE_FIELDS, method_of
from vispeft.building.config_files import Node, read_config
from vispeft.building.parsing import parser_errors
from vispeft.cli.common import console, make_parser
from vispeft.cli.config import ConfigCLI, build_task
from vispeft.cli.config_keys import check_tree, split_overrides
from vispeft.cli.evaluation import (
    evaluate,
    evaluation_trainer,
    kept_settings,
    metrics_table,
    row_name,
    tell_if_partial,
)
from vispeft.cli.reading import add_workers, end_with
from vispeft.cli.runs import Run
from vispeft.cli.token_merging import add_token_merging, merge_as_asked
from vispeft.cli.zero_shot import add_classes, classified, config_without_adapter, is_run
from vispeft.cli.zoo_places import check_named
from vispeft.cli.zoo_trust import try_loading
from vispeft.core.token_merging import TokenMerging
from vispeft.data.by_name import ClassOrder, names_of
from vispeft.data.listed import ListedData
from vispeft.data.masks import MaskCoding
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.storage.class_embeddings import ClassEmbeddings
from vispeft.storage.files import JSON_FILE
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.token_merging import merge_tokens

__all__ = [
    "class_names",
    "header_of",
    "load_run",
    "load_task",
    "main",
    "safe_settings",
    "trained_task",
    "without_baselines",
    "without_method_files",
]

EXAMPLE = """example:
  vispeft evaluate runs/digits_ssf/1
  vispeft evaluate runs/digits_ssf/1 --split validation --data.batch_size 256
  vispeft evaluate runs/clip_lora/1 --classes classes.safetensors
  vispeft evaluate my_clip.yaml --classes classes.safetensors

Keys under data and trainer can be overridden; the model is the one that was trained. Images that cannot be read are
left out of the figures and listed at the end, and the exit status is 1; --strict stops instead. --data.check=fast looks
at the headers of files alone before each image is read, where images are not known from the training.

With --classes, a file of class embeddings (vispeft encode-classes) classifies instead of the trained classifier, and
the data may have other classes than the run. A config in place of a run measures its backbone without an adapter:
zero-shot classification. All keys of a config can be overridden."""


KEPT = ("model", "seed_everything", "trainer", "token_merging")
"""Sections of a run's config that say what its model is."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.

    Raises:
        SystemExit: With status 1, if images could not be read.
    """
    parser = make_parser("evaluate", "Measure a finished run again, from its files.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run directory; it comes first; with --classes also a config")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="default test")
    add_workers(parser)
    add_token_merging(parser)
    add_classes(parser)
    given, overrides = parser.parse_known_args(list(argv))
    workers = [] if given.workers is None else [f"--data.num_workers={given.workers}"]
    classes = None if given.classes is None else ClassEmbeddings.load(given.classes)
    if classes is None or is_run(given.run):
        run = Run.open(given.run)
        cli, before = load_run(run, [*overrides, *workers], classes), {"metrics.json": run.figures(given.split)}
        cli.model.recall(given.run, run.metrics)
    else:
        cli, before = config_without_adapter(given.run, [*overrides, *workers]), {}
        merge_tokens(cli.model, cli.config_init["token_merging"])
    if classes is not None:
        # In the order of the data, whose classes need not be those that a run was trained on.
        names = names_of(cli.datamodule, int(cast(Any, cli.datamodule).num_classes))
        classified(cli.model, classes.ordered(names))
    merge_as_asked(cli.model, given.token_merging)
    data = cli.datamodule
    left_out = data.leave_out_unreadable(given.split) if isinstance(data, ListedData) and not given.strict else []
    measured = evaluate(cli.trainer, cli.model, cli.datamodule, given.split)
    tell_if_partial(cli.trainer, given.split)
    rows = {"measured now" if classes is None else "by class embeddings": measured, **before}
    console.print(f"{given.run}, {row_name(cli.datamodule, given.split)} split", soft_wrap=True)
    console.print(metrics_table(cli.model.shown(rows)))
    end_with(left_out)


def load_run(run: Run, overrides: Sequence[str] = (), classes: ClassEmbeddings | None = None) -> ConfigCLI:
    """Create task, data and trainer of a finished run, with the trained adapter on the backbone.

    Args:
        run: The run.
        overrides: Changes to the sections data and trainer.
        classes: Class embeddings that will classify; the data may then have any of their classes. None for the run's
            own classifier.

    Returns:
        The config's objects; its trainer only evaluates.

    Raises:
        ConfigError: If an override would change the model.
        DataError: If the data have classes that the run does not know, or lie where only a pulled adapter says.
        BaseMismatchError: If the backbone differs from the adapted one.
    """
    for key, _ in split_overrides(overrides):
        if key.split(".")[0] not in ("data", "trainer"):
            raise ConfigError(f"--{key}: a finished run takes overrides under data and trainer only.")
    if run.foreign:
        try_loading(run.path)
    tree = safe_settings(run, without_baselines(read_config(run.config)))
    if run.foreign:
        check_named(tree, overrides)
    tree = without_method_files(tree, run)
    cli = RunCLI(run, overrides, tree, classes)
    cli.model.load_adapter(run.adapter)
    merge_tokens(cli.model, cli.config_init["token_merging"])
    cli.model.eval()
    return cli


def safe_settings(run: Run, tree: Node) -> Node:
    """Keep the trainer's settings that affect an evaluation; of a run of others, nothing that starts processes.

    Args:
        run: The run.
        tree: Its config; changed in place.
    """
    settings = kept_settings(tree.get("trainer"))
    tree["trainer"] = {key: value for key, value in settings.items() if not run.foreign or key in _FOREIGN}
    data = tree.get("data")
    known = data.get("init_args") if isinstance(data, dict) else None
    if run.foreign and isinstance(known, dict) and "num_workers" in known:
        known["num_workers"] = 0  # an override may say otherwise
    return tree


_FOREIGN = ("precision", "limit_val_batches", "limit_test_batches")
"""Trainer settings that are taken from a run of others."""


def without_baselines(tree: Node) -> Node:
    """Leave out the runs that training was compared with: they may be gone, and ``metrics.json`` has their figures."""
    model = tree.get("model")
    settings = model.get("init_args") if isinstance(model, dict) else None
    if isinstance(settings, dict):
        settings.pop("baselines", None)
    return tree


def without_method_files(tree: Node, run: Run) -> Node:
    """Leave out files that the method started from: they may be gone, and the adapter has what was read there.

    Args:
        tree: The config; changed in place.
        run: The run.

    Raises:
        FileError: If the description of its adapter cannot be read.
    """
    model = tree.get("model")
    settings = model.get("init_args") if isinstance(model, dict) else None
    method = settings.get("method") if isinstance(settings, dict) else None
    fields = method.get("init_args") if isinstance(method, dict) else None
    if isinstance(fields, dict) and any(fields.get(field) is not None for field in FILE_FIELDS):
        found = method_of(header_of(run)).without_start()
        cast(dict[str, Any], method)["init_args"] = found.to_dict()["fields"]
    return tree


class RunCLI(ConfigCLI):
    """The config of a finished run, whose data get the classes of the run by name."""

    def __init__(self, run: Run, overrides: Sequence[str], tree: Node, classes: ClassEmbeddings | None = None) -> None:
        """Create all objects of the config; see `ConfigCLI`.

        Args:
            run: The run.
            overrides: Changes to the sections data and trainer.
            tree: The values of its config; changed in place.
            classes: Class embeddings in place of the run's classes; None for these.
        """
        self._run, self._classes = run, classes
        super().__init__(run.config, overrides, tree=tree)

    def _sized_by(self, data: Any, name: str) -> Any:
        """Return what sizes the run's task, after matching classes or tasks of the data with those of the run."""
        found = super()._sized_by(data, name)
        if found is None:
            return None
        if name == "targets":
            return match_tasks(self._run, data, found)
        if self._classes is not None and name == "num_classes":
            self._classes.ordered(names_of(data, found))  # refuses classes without an embedding
            return len(class_names(self._run))
        match_names(self._run, data, found)
        return int(data.num_classes)


def match_tasks(run: Run, data: Any, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Give data the tasks of a run, in its order, as far as they can choose; refuse others.

    Args:
        run: The run.
        data: A data module of several tasks.
        targets: Its targets by task.

    Returns:
        The targets of the run's tasks.

    Raises:
        DataError: If the data lack a task of the run, or have one that it does not know.
    """
    trained = class_names(run)
    if isinstance(data, ListedData):
        data.match_classes(trained)
        return dict(data.targets)  # type: ignore[attr-defined]  # of `MultiTaskData`
    ClassOrder(tuple(targets), tuple(trained), "tasks").check_all()
    return dict(targets)


def match_names(run: Run, data: Any, count: int) -> None:
    """Give the classes of data the numbers that a run has for them, by name, and say so where they differ.

    Args:
        run: The run.
        data: A data module.
        count: Number of its classes.

    Raises:
        DataError: If they have classes that the run does not know, or are data whose classes cannot be matched.
    """
    names, trained = names_of(data, count), class_names(run)
    _compare_colours(run, data)
    if list(names) == trained:
        return
    if isinstance(data, ListedData):
        for line in data.match_classes(trained).lines():
            console.print(line, soft_wrap=True)
        if data.listing.drawn:
            console.print(
                f"{' and '.join(sorted(data.listing.drawn))} are drawn at random, by classes: in another order the "
                "draw is another one, and images that the run was trained on may be in it. Give each split a list or "
                "a folder.",
                soft_wrap=True,
            )
        return
    ClassOrder(names, tuple(trained)).check()
    raise DataError(
        f"The data have the classes {', '.join(names[:6])}, and {run.path} has {', '.join(trained[:6])}. "
        f"{type(data).__name__} numbers its classes itself, so figures would be those of other classes. Give it the "
        "run's classes in the run's order."
    )


def _compare_colours(run: Run, data: Any) -> None:
    """Say where RGB masks give a class the colour that another class has in a run's own masks."""
    coding, output = getattr(data, "coding", None), header_of(run).get("output")
    trained = output.get("palette") if isinstance(output, dict) else None
    if not isinstance(coding, MaskCoding) or coding.colours is None or not isinstance(trained, list):
        return
    pairs = zip(class_names(run), trained, strict=False)
    owners = {tuple(colour): name for name, colour in pairs if isinstance(colour, list)}
    own = zip(data.class_names, coding.colours, strict=False)
    other = [f"{list(c)} is {name} here and {owners[c]} there" for name, c in own if owners.get(c, name) != name]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        console.print(
            f"Colours of the masks stand for other classes than in {run.path}: {', '.join(other[:3])}{more}. The masks "
            "are read by data.palette; is it in the order of data.class_names?",
            soft_wrap=True,
        )


def class_names(run: Run) -> list[str]:
    """Read the names of the outputs of a run's adapter.

    Args:
        run: The run.

    Raises:
        FileError: If the adapter's description cannot be read, or names no classes.
    """
    names = header_of(run).get("class_names")
    if not isinstance(names, list) or not names:
        raise FileError(
            f"{run.adapter / JSON_FILE} names no classes, so its outputs cannot be read. Was the adapter written by a "
            "run?"
        )
    return [str(name) for name in names]


def header_of(run: Run) -> dict[str, Any]:
    """Read the description of a run's adapter.

    Args:
        run: The run.

    Raises:
        FileError: If it cannot be read.
    """
    path = run.adapter / JSON_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} cannot be read: it is no table of values.")
    return found


def load_task(run: Run) -> tuple[AdapterTask, Trainer]:
    """Create the task of a finished run, with the trained adapter on the backbone; its data need not exist.

    Args:
        run: The run.

    Returns:
        The task, and a trainer like the run's that only evaluates.

    Raises:
        BaseMismatchError: If the backbone differs from the adapted one.
    """
    task, settings = trained_task(run)
    with parser_errors(str(run.config)):
        return task, evaluation_trainer(**settings)


def trained_task(run: Run) -> tuple[AdapterTask, Node]:
    """Create the task of a finished run alone; see `load_task`.

    Args:
        run: The run.

    Returns:
        The task, and the settings of a trainer that evaluates it.

    Raises:
        BaseMismatchError: If the backbone differs from the adapted one.
    """
    if run.foreign:
        try_loading(run.path)
    tree = safe_settings(run, without_method_files(without_baselines(read_config(run.config)), run))
    # The data need not be known: those of a run may be of a class of the user's own.
    tree = {key: value for key, value in tree.items() if key in KEPT}
    check_tree(tree, str(run.config))
    if "model" not in tree:
        raise ConfigError(f"{run.config} has no section model, which says which task was trained.")
    class_names(run)
    header = header_of(run)
    # The seed determines the weights of a randomly initialised backbone.
    seed_everything(tree.get("seed_everything", 0), verbose=False)
    task = build_task(tree["model"], lambda cls: cls.sized_by_file(header), str(run.config))
    task.load_adapter(run.adapter)
    merge_tokens(task, TokenMerging(**tree.get("token_merging", {})))
    return task.eval(), tree["trainer"]
