"""Configs: YAML files read by Lightning's CLI, with overrides from the command line.

Keys are checked first (`vispeft.cli.config_keys`); types and values are then checked by Lightning's parser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from vispeft.adapters.compiling import Compile
from vispeft.building.classes import import_class
from vispeft.building.config_files import Node, dump_config, parse_text, read_config
from vispeft.building.parsing import MODE, parser_errors
from vispeft.cli.config_keys import Override, as_list, check_config, check_override, check_tree, split_overrides
from vispeft.cli.evaluation import evaluation_trainer
from vispeft.cli.trainer_settings import TrainerSettings
from vispeft.core.method import Method
from vispeft.core.origin import Memory
from vispeft.core.token_merging import TokenMerging
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.checkpoints import Cadence
from vispeft.tasks.supervised import check_target
from vispeft.tasks.token_merging import merge_tokens

__all__ = ["ConfigCLI", "build_data", "build_task"]

SIZES = ("num_classes", "targets")
"""Arguments of tasks that the data decide; see `AdapterTask.sized_by`."""


class ConfigCLI(LightningCLI):
    """Lightning's CLI without subcommands: reads a config, then creates data, task and trainer.

    The number of classes, or the targets by task, are passed from the data to the task, and the config's single seed
    also fixes the order of the data.
    """

    def __init__(
        self, config: Path, overrides: Sequence[str], *, tree: Node | None = None, create: bool = True
    ) -> None:
        """Read a config and create all its objects.

        Its trainer only evaluates; the settings for the training trainer are in `trainer_settings`.

        Args:
            config: The YAML file.
            overrides: Arguments such as ``--model.lr 1e-3`` or ``--print_config``.
            tree: Its values, where they are known or changed already; changed in place.
            create: Whether to create the objects; otherwise `create` does.

        Raises:
            FileError: If the file is missing or not YAML.
            ConfigError: If a key is unknown, or a value has the wrong type or is out of range.
        """
        self.trainer_settings: dict[str, Any] = {}
        self._source = str(config)
        tree = read_config(config) if tree is None else tree
        tokens = check_config(tree, split_overrides(overrides), str(config))
        _set_up_parser()
        with parser_errors(str(config)):
            super().__init__(
                AdapterTask,
                LightningDataModule,
                save_config_callback=None,
                trainer_class=TrainerSettings,
                trainer_defaults={"max_epochs": 20, "log_every_n_steps": 1, "devices": 1},
                seed_everything_default=0,
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "parser_mode": MODE},
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=["--config", dump_config(tree), *tokens],
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        if create:
            self.create()

    def create(self) -> None:
        """Create the data, then the task, then a trainer that only evaluates.

        Loggers, which may ask a server, are made by a training alone, and by its first process.

        Raises:
            VispeftError: If one of them refuses its settings.
        """
        kept, self.config["trainer"]["logger"] = self.config["trainer"]["logger"], None
        try:
            with parser_errors(self._source):
                super().instantiate_classes()
        finally:
            self.config["trainer"]["logger"] = kept

    def instantiate_classes(self) -> None:
        """Leave it to `create`, which Lightning does not know."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link arguments to the part of the config that determines them."""
        for name in SIZES:
            told = partial(self._sized_by, name=name)
            parser.link_arguments("data", f"model.init_args.{name}", told, apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.add_argument("--init", type=str | None, default=None, help="adapter to start from: zoo:NAME or a folder")
        parser.add_class_arguments(Cadence, "checkpoints")
        told = "compute the outputs of a frozen backbone once: true, or the folder where they are kept"
        parser.add_argument("--cache_features", type=bool | str | None, default=False, help=told)
        told = "how much is kept for the backward pass, with equal gradients"
        parser.add_argument("--memory", type=Memory, default="lean", help=told)
        told = "what torch.compile compiles: each block in place, the model as a whole, or nothing"
        parser.add_argument("--compile", type=Compile, default="off", help=told)
        parser.add_class_arguments(TokenMerging, "token_merging")

    def _sized_by(self, data: Any, name: str) -> Any:
        """Return an argument of the task that the data decide, after checking that both are of the same kind.

        Args:
            data: The data module.
            name: The argument; a task without it ignores the link.
        """
        task: type[AdapterTask] = import_class(self.config["model"]["class_path"])
        check_target(task, data)
        return task.sized_by(data).get(name)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments instead of the process's."""
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Store the trainer's settings and create one that only evaluates."""
        self.trainer_settings = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        return evaluation_trainer(**self.trainer_settings)

    @property
    def trackers(self) -> list[Node]:
        """Class and arguments of each logger of the config."""
        return as_list(self.config["trainer"].as_dict()["logger"])

    def prepare_model(self) -> None:
        """Let the model keep as much for the backward pass, and merge as many tokens, as the config says.

        Raises:
            VispeftError: If the task, the backbone or the adapter cannot merge tokens.
        """
        self.model.bank.memory = self.config["memory"]
        merge_tokens(self.model, self.config_init["token_merging"])

    def resolved(self) -> str:
        """Return the whole config as YAML with defaults, which reads back unchanged."""
        return dump_config(self._written_out(self.config))

    def completed(self, tree: Node) -> Node:
        """Complete the config of an earlier run, with defaults for settings that are newer than the run.

        Args:
            tree: Its config.

        Returns:
            Every key with its value.
        """
        check_config(tree, [], "the run's config")
        return self._written_out(self.parser.parse_args(["--config", dump_config(tree)]))

    def _written_out(self, config: Any) -> Node:
        """Convert parsed values to plain ones, equal for equivalent configs."""
        with parser_errors("the config with its defaults"):
            tree = cast(Node, parse_text(self.parser.dump(config, skip_unset=False), "The config"))
        settings = tree["model"]["init_args"]
        for name, form in import_class(tree["model"]["class_path"]).part_forms.items():
            if name in settings:  # a default is a bare name, a config's is checked and expanded
                settings[name] = form(settings[name])
        return tree


def build_data(node: str | Mapping[str, Any], overrides: Sequence[Override], source: str) -> LightningDataModule:
    """Create the data module of a config, without its model.

    Args:
        node: The section ``data``.
        overrides: The result of `split_overrides`; all keys start with ``data.``.
        source: Origin of the config, for messages.

    Returns:
        The data module.

    Raises:
        UnknownNameError: If a key or a class is unknown.
        ConfigError: If a value has the wrong type or is out of range.
    """
    tree: Node = {"data": node}
    check_tree(tree, source)
    checked = (check_override(tree, key, value) for key, value in overrides)
    tokens = [token for token in checked if token is not None]
    return cast(LightningDataModule, _build("data", LightningDataModule, tree, tokens, source))


def build_task(node: Mapping[str, Any], sizes: int | Callable[[type[AdapterTask]], Node], source: str) -> AdapterTask:
    """Create the task of a config, without its data.

    Args:
        node: The section ``model``.
        sizes: Number of outputs that the config's data need; or a function from the task's class to the arguments that
            its data decide.
        source: Origin of the config, for messages.

    Returns:
        The task.

    Raises:
        UnknownNameError: If a key or a class is unknown.
        ConfigError: If a value has the wrong type or is out of range.
    """
    tree: Node = {"model": node}
    check_tree(tree, source)
    decided = {"num_classes": sizes} if isinstance(sizes, int) else sizes(import_class(tree["model"]["class_path"]))
    tree["model"]["init_args"].update(decided)
    return cast(AdapterTask, _build("model", AdapterTask, tree, [], source))


def _set_up_parser() -> None:
    """Tell jsonargparse how values become objects."""
    # A method is a dataclass, for which no subclass would be accepted otherwise. And no plain value is made an object;
    # those that ask for it are refused before (`vispeft.building.arguments`), so this is a second wall.
    set_parsing_settings(subclasses_enabled=[Method], instantiate_subclass_spec_in_any=False)


def _build(section: str, base: type, tree: Node, tokens: Sequence[str], source: str) -> Any:
    """Create the object of one section."""
    _set_up_parser()
    parser = ArgumentParser(exit_on_error=False, parser_mode=MODE)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(base, section, required=True)
    with parser_errors(source):
        config = parser.parse_args([f"--config={dump_config(tree)}", *tokens])
        return parser.instantiate(config)[section]
