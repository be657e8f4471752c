"""Adapters made of others: reading them from files, runs and the zoo, and writing what was made as a run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vispeft.adapters.bank import AdapterBank
from vispeft.backbones.create import create_model
from vispeft.building.classes import class_path
from vispeft.building.config_files import Node, dump_config, read_config
from vispeft.cli.common import console, versions
from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluate import load_run, load_task, safe_settings, without_baselines
from vispeft.cli.evaluation import measure, metrics_table, row_name
from vispeft.cli.runs import CONFIG, METRICS, Run, write_json, write_text
from vispeft.cli.zoo_places import check_named
from vispeft.core.method import Method
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.storage.files import DECODER, read_encoded
from vispeft.zoo.adapters import ADAPTER, find_adapter

__all__ = ["Source", "check_data_keys", "measured_run", "new_folder", "open_made", "open_sources", "write_run"]


@dataclass(frozen=True)
class Source:
    """An adapter that a command was given."""

    given: str
    """What it was given as: a directory or ``zoo:NAME``."""
    label: str
    """Its name on the model."""
    folder: Path
    """The directory of the adapter."""
    header: dict[str, Any]
    """The content of its ``adapter.json``."""
    decoder: dict[str, Tensor]
    """Tensors of a decoder that is stored with it, by their names in files."""
    run: Run | None
    """The run that it belongs to; None for an adapter alone."""

    def model(self, settings: Mapping[str, Any] | None = None) -> tuple[nn.Module, Any]:
        """Create its backbone.

        Args:
            settings: Entries of the config's section ``model.init_args`` to change: the name of the backbone, or the
                file of its weights.

        Returns:
            The backbone without adapters, and the trained task of its run; None for an adapter alone.

        Raises:
            ConfigError: If the file does not name the backbone.
            BaseMismatchError: If the run's backbone is not the adapted one.
        """
        named, changed = self.header["backbone"], dict(settings or {})
        args = {key: value for key, value in named["args"].items() if key not in ("num_classes", "pretrained")}
        if self.run is not None and not changed:
            task, _ = load_task(self.run)
            for name in task.bank.names:
                task.bank.detach(name)
            return task.model, task
        if not (changed.get("backbone") or named["name"]):
            raise ConfigError(
                f"{self.folder} does not name its backbone. Load it in Python, on a model that you have made."
            )
        weights = changed.get("weights")
        kept = named["args"].get("pretrained", True) or weights is not None
        settings = {**args, **({} if kept else {"pretrained": False}), "num_classes": 0}
        return create_model(changed.get("backbone") or named["name"], weights=weights, **settings), None


def open_sources(given: Sequence[str]) -> list[Source]:
    """Read the descriptions of adapters.

    Args:
        given: Directories of adapters or runs, or ``zoo:NAME``.

    Returns:
        One for each, with a label of its own.

    Raises:
        FileError: If there is no adapter, or a file is damaged.
        UnknownNameError: If the zoo has none of that name.
    """
    found: list[Source] = []
    for text in given:
        folder = find_adapter(text)
        header, _, head = read_encoded(folder)
        decoder = {key: tensor for key, tensor in head.items() if key.startswith(DECODER)}
        place = folder.parent if folder.name == ADAPTER and not os.path.isfile(folder / CONFIG) else folder
        run = Run.open(place) if os.path.isfile(place / CONFIG) else None
        found.append(Source(text, _label(text, [source.label for source in found]), folder, header, decoder, run))
    return found


def _label(text: str, taken: Sequence[str]) -> str:
    """Make a name of letters, digits, '-' and '_' for an adapter on the model."""
    parts = [part for part in text.removeprefix("zoo:").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    plain = "_".join(parts[-2:] if not text.startswith("zoo:") else parts)
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in plain)
    name = f"from_{name or 'adapter'}"  # a name of its own kind is no attribute of PyTorch's modules
    return name if name not in taken else f"{name}_{len(taken) + 1}"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Make a folder that appears whole or not at all.

    Args:
        out: The folder, which must not exist.

    Yields:
        A temporary folder beside it, which gets its name at the end.

    Raises:
        ConfigError: If it exists.
        FileError: If it cannot be written.
    """
    _refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.", dir=out.parent))
    except OSError as error:
        raise FileError(f"{out} cannot be written ({error.strerror}). Choose another place.") from error
    try:
        yield place
        _refuse_existing(out)
        place.chmod(0o755)
        place.rename(out)
    except OSError as error:
        raise FileError(f"{out} cannot be written ({error.strerror}). Choose another place.") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already and is not overwritten. Choose another name.")


def write_run(place: Path, bank: AdapterBank, name: str, source: Source, made: Mapping[str, Any]) -> None:
    """Write an adapter, and what makes it a run where its source is one.

    Args:
        place: The folder.
        bank: The bank of the model.
        name: The adapter.
        source: The adapter whose classifier, decoder and task it has.
        made: Changes of the section ``model.init_args``, and ``command``, the command line.
    """
    decoder = {key.removeprefix(DECODER): tensor for key, tensor in source.decoder.items()}
    bank.save(place, name, decoder=decoder or None)
    if source.run is None:
        return
    tree = without_baselines(read_config(source.run.config))
    if source.run.foreign:  # as where it is evaluated itself: nothing of its training, and no processes
        kept = ("model", "data", "seed_everything", "trainer")
        tree = safe_settings(source.run, {key: value for key, value in tree.items() if key in kept})
    settings = tree["model"]["init_args"]
    settings["method"] = _method_node(bank.plan(name).method)
    settings |= {key: value for key, value in made.items() if key != "command"}
    if "weights" in made or "backbone" in made:  # a backbone whose weights were drawn has none to read
        args = settings.get("backbone_args") or {}
        settings["backbone_args"] = {key: value for key, value in args.items() if key != "pretrained"}
    write_text(place / CONFIG, f"# {made['command']}\n{dump_config(tree)}")
    trained = source.run.metrics
    kept = {key: trained[key] for key in ("seed", "main_figures", "measured_on") if key in trained}
    entries = {
        "command": made["command"],
        "validation": {},
        "test": {},
        "seed": 0,
        **kept,
        # What a card of the zoo tells: nothing was trained.
        "epochs": 0,
        "best_epoch": 0,
        "seconds": {"training": 0.0},
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "parameters": {"trainable": sum(tensor.numel() for tensor in bank.named_tensors(name).values())},
        "made_of": bank.notes(name)["made_of"],
        "versions": versions(),
    }
    write_json(place / METRICS, entries)


def _method_node(method: Method) -> Node:
    """Name a method in a config. Entries of a sparse change that its file gives are drawn before it is loaded."""
    if getattr(method, "support", None) == "given":
        method = dataclasses.replace(method, support="random")  # type: ignore[call-arg]
    return {"class_path": class_path(type(method)), "init_args": method.to_dict()["fields"]}


def check_data_keys(sources: Sequence[Source], overrides: Sequence[str]) -> None:
    """Refuse keys of the data where no adapter is that of a run, which has data.

    Args:
        sources: The adapters.
        overrides: Keys with values.

    Raises:
        ConfigError: If there are some.
    """
    if overrides and all(source.run is None for source in sources):
        raise ConfigError(f"{overrides[0]} was given, and no adapter is that of a run, which has data. Leave it out.")


def open_made(place: Path, source: Source, overrides: Sequence[str]) -> ConfigCLI:
    """Create task and data of a run that was made; of an adapter of others, with data that the user names alone.

    Args:
        place: Its folder.
        source: The adapter whose task it has, which is that of a run.
        overrides: Changes to the sections data and trainer.

    Raises:
        DataError: If the data lie where only a pulled adapter says.
    """
    run = Run.open(place)
    if source.run is not None and source.run.foreign:
        check_named(read_config(run.config), overrides)
    return load_run(run, overrides)


def measured_run(place: Path, out: Path, source: Source, overrides: Sequence[str] = ()) -> None:
    """Measure a run that was made, where its data can be had, and print the figures.

    Args:
        place: Its folder.
        out: The name that it will have, for messages.
        source: The adapter whose task it has, which is that of a run.
        overrides: Changes to the sections data and trainer.
    """
    run = Run.open(place)
    try:
        cli = open_made(place, source, overrides)
        cli.model.recall(str(place), run.metrics)
        found = measure(cli.trainer, cli.model, cli.datamodule)
    except (DataError, FileError) as error:
        console.print(f"{out} was not measured, since its data cannot be had here: {error}", soft_wrap=True)
        return
    write_json(
        place / METRICS, {**run.metrics, **found.metrics, **found.details, "parameters": cli.model.report().to_dict()}
    )
    rows = {row_name(cli.datamodule, split): found.metrics[split] for split in ("validation", "test")}
    console.print(metrics_table(cli.model.shown(rows)))
