"""Adding a finished run to a zoo: half precision where the figures hold, a card, digests, and the index last."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vispeft.building.config_files import dump_config, read_config
from vispeft.cli.evaluate import load_run, load_task, without_baselines, without_method_files
from vispeft.cli.evaluation import evaluate
from vispeft.cli.runs import Run, write_json, write_text
from vispeft.cli.zoo_card import card
from vispeft.cli.zoo_facts import data_facts, main_figures, reproduces, task_kind
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.storage.codecs import RAW
from vispeft.storage.files import dtype_name, read_encoded, write_adapter
from vispeft.zoo.adapters import backbone_names
from vispeft.zoo.folder import zoo_folder
from vispeft.zoo.index import CARD, CONFIG, METRICS, ZooEntry, check_name, describe_file, read_index
from vispeft.zoo.install import held_zoo, put_in_place, staged

__all__ = ["Extras", "add_run", "measured"]

logger = logging.getLogger(__name__)

_KEPT = (
    *("command", "validation", "best_epoch", "epochs", "steps", "seed", "parameters", "seconds", "device", "threads"),
    *("precision", "versions", "main_figures", "measured_on"),
)
"""Entries of a run's ``metrics.json`` that go into the zoo; curves and matrices of single images do not."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a run does not say about itself."""

    license: str = "not stated"
    """Licence of the adapter."""
    note: str = ""
    """Why the adapter is in the zoo, where its figures do not say it."""
    baseline: str | None = None
    """Run of the linear probe on the same data."""
    seeds: Sequence[str] = ()
    """Runs of the same config with other seeds."""
    half: bool = True
    """Whether tensors are stored in half precision where the figures hold."""


def add_run(path: str, name: str, zoo: Path, extras: Extras) -> ZooEntry:
    """Add the adapter of a finished run to a zoo.

    Its figures are measured again from the files as they are stored, where the data can be had.

    Args:
        path: The run.
        name: Name of the adapter in the zoo.
        zoo: Folder of the zoo; made if missing.
        extras: What the run does not say.

    Returns:
        Its entry in the index.

    Raises:
        ConfigError: If it is no name for an adapter, or another adapter or a backbone has it.
        FileError: If the run is not finished, or something cannot be written.
    """
    check_name(name)
    if name in backbone_names():
        raise ConfigError(f"zoo:{name} is a backbone; backbones and adapters share their names. Choose another --name.")
    if name in read_index(zoo_folder()) and zoo.resolve() != zoo_folder().resolve():
        raise ConfigError(f"zoo:{name} ships with the package, and hides others of its name. Choose another --name.")
    run = Run.open(path)
    facts = _facts(run, name, extras)
    with held_zoo(zoo), staged(zoo, name) as folder:
        _stage(run, folder, facts, half=extras.half)
        entry = _entry(folder, name, facts)
        known = read_index(zoo).get(name)
        if known is not None and not known.same_content(entry):
            raise ConfigError(
                f"zoo:{name} is in {zoo} already, with other content. Choose another --name, or remove it first: "
                f"vispeft zoo remove {name}"
            )
        put_in_place(zoo, folder, entry)
    return entry


def _facts(run: Run, name: str, extras: Extras) -> dict[str, Any]:
    """Collect what the card says, from the run and from what was given."""
    tree = read_config(run.config)
    settings, data = tree["model"]["init_args"], data_facts(tree["data"])
    figures = main_figures(run.metrics, run.figures("test"))
    others = [Run.open(path) for path in extras.seeds]
    baseline = None if extras.baseline is None else _same(Run.open(extras.baseline), figures)
    return {
        "name": name,
        "task": task_kind(tree["model"]["class_path"]),
        "data": data.says,
        "data_license": data.license,
        "needs": data.needs,
        "backbone": settings["backbone"],
        "figures": figures,
        "baseline": baseline,
        "seeds": {str(int(other.number("seed"))): _same(other, figures) for other in others},
        "license": extras.license,
        "note": extras.note,
    }


def _same(run: Run, figures: Mapping[str, float]) -> dict[str, float]:
    """Return the same figures of another run."""
    found = run.figures("test")
    lacking = [name for name in figures if found.get(name) is None]
    if lacking:
        raise FileError(f"{run.path} has no figure {lacking[0]} on the test images, and is compared by it.")
    return {name: float(found[name] or 0) for name in figures}


def _stage(run: Run, folder: Path, facts: dict[str, Any], half: bool) -> None:
    """Write all files of an adapter, in half precision if its figures hold."""
    tree = without_method_files(without_baselines(read_config(run.config)), run)
    write_text(folder / CONFIG, f"# {run.metrics['command']}\n{dump_config(tree)}")
    stated = dict(facts["figures"])
    for halved in (True, False) if half else (False,):
        _write_adapter(run.adapter, folder, halved)
        facts["measured_here"] = False
        _write_metrics(run, folder, facts)
        try:
            found = measured(Run.open(folder))
        except DataError as error:
            load_task(Run.open(folder))  # whatever is wrong with the files themselves shows here
            if halved:
                continue  # nobody knows what half precision would change
            logger.info("The figures are those of the run, since the data cannot be had here: %s", error)
            return
        facts["figures"], facts["measured_here"] = {key: found[key] for key in stated}, True
        _write_metrics(run, folder, facts)
        if not halved or reproduces(stated, facts["figures"]):
            return
        logger.info("In half precision the figures are others (%s); full precision is kept.", facts["figures"])
        facts["figures"] = stated


def measured(run: Run, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Measure an adapter on the test images of its data.

    Args:
        run: The run, or an adapter of a zoo opened as one.
        overrides: Changes to the sections data and trainer.

    Returns:
        Its figures by name, without those that were not measured.

    Raises:
        DataError: If the data cannot be had.
    """
    try:
        cli = load_run(run, overrides)
        figures = evaluate(cli.trainer, cli.model, cli.datamodule, "test")
    except DataError:
        raise
    except FileError as error:  # of data whose files are missing, or of the adapter: `load_task` tells
        raise DataError(str(error)) from error
    return {name: float(value) for name, value in figures.items() if value is not None}


def _write_adapter(source: Path, folder: Path, halved: bool) -> None:
    """Copy an adapter, its tensors of 32 bits with 16 where `halved` is set."""
    header, units, head = read_encoded(source)
    coded = {key for key, entry in header["tensors"].items() if entry["codec"] != RAW}
    if halved:
        units, head = (
            {key: tensor if key in coded else _half(tensor) for key, tensor in part.items()} for part in (units, head)
        )
    for key, entry in header["tensors"].items():
        if key in units and key not in coded:
            entry["dtype"] = dtype_name(units[key].dtype)
    kept = {key: value for key, value in header.items() if key not in ("schema", "files", "digest")}
    write_adapter(folder, kept, units, head)


def _half(tensor: Tensor) -> Tensor:
    """Return a tensor in half precision, or as it is where that holds other values or is no number."""
    if tensor.dtype != torch.float32:
        return tensor
    halved = tensor.half()
    return halved if bool(torch.isfinite(halved).all()) else tensor


def _write_metrics(run: Run, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the figures of an adapter, those on the test images as they were measured last."""
    kept = {key: run.metrics[key] for key in _KEPT if key in run.metrics}
    test = {**run.figures("test"), **facts["figures"]}
    write_json(folder / METRICS, {**kept, "test": test, "zoo": dict(facts)})


def _entry(folder: Path, name: str, facts: Mapping[str, Any]) -> ZooEntry:
    """Write the card and describe all files."""
    write_text(folder / CARD, card(folder))
    run = Run.open(folder)
    header, _, _ = read_encoded(folder)
    return ZooEntry(
        name=name,
        task=facts["task"],
        data=facts["data"],
        needs=facts["needs"],
        backbone=facts["backbone"],
        method=header["method"]["name"],
        figures=facts["figures"],
        baseline=facts["baseline"],
        trainable=int(run.number("parameters", "trainable")),
        license=facts["license"],
        files={path.name: describe_file(path) for path in sorted(folder.iterdir())},
    )
