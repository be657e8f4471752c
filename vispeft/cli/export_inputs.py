"""``vispeft export --adapters as-inputs``: one ONNX file of a backbone, and a file of inputs for each adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vispeft.cli.common import console, versions
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.cli.token_merging import without_token_merging
from vispeft.errors import BaseMismatchError, ConfigError, ExportError
from vispeft.interop.adapter_inputs import (
    AdapterInputs,
    BackboneWithInputs,
    InputLayout,
    adapter_inputs,
    largest_difference,
    read_inputs,
    write_inputs,
)
from vispeft.interop.export import INPUT, TOLERANCE, check_onnx, export_onnx, onnx_layout, onnx_session
from vispeft.interop.staging import check_free
from vispeft.tasks.base import AdapterTask

__all__ = ["Room", "add_inputs", "export_runs"]


@dataclass(frozen=True)
class Room:
    """The room for adapters that are exported later."""

    rank: int | None = None
    """Rank of the low-rank inputs; None for the largest of the runs."""
    classes: int | None = None
    """Outputs of the classifier; None for the most of the runs."""


@dataclass(frozen=True)
class _Loaded:
    """One run as inputs of a graph."""

    run: Run
    adapter: AdapterInputs
    fingerprint: dict[str, Any]
    notes: dict[str, Any]
    scores: list[Tensor]
    """Its scores for the noise images that check the file."""

    def file(self, out: Path, parts: int = 2) -> Path:
        """Return the file of its inputs beside the backbone's, named by the last parts of the run's path."""
        named = [part for part in self.run.path.resolve().parts if part != "/"]
        return out.with_name(f"{out.stem}.{'-'.join(named[-parts:])}.safetensors")


def _files(loaded: Sequence[_Loaded], out: Path) -> list[Path]:
    """Return a file for each run, named by as many parts of its path as tell the runs apart."""
    if len({one.run.path.resolve() for one in loaded}) < len(loaded):
        raise ConfigError("A run was named twice; name each once.")
    parts, most = 2, max(len(one.run.path.resolve().parts) for one in loaded)
    while len({one.file(out, parts) for one in loaded}) < len(loaded) and parts < most:
        parts += 1
    return [one.file(out, parts) for one in loaded]


def export_runs(runs: Sequence[Run], out: Path, room: Room) -> list[Path]:
    """Write the backbone that runs share as one ONNX file, and the inputs of each run's adapter beside it.

    Every adapter is run through the file, and compared with its model.

    Args:
        runs: Finished runs on one backbone.
        out: The file, ending in ``.onnx``.
        room: The room for further adapters.

    Returns:
        The files.

    Raises:
        ConfigError: If a file exists, the extra is not installed, or an adapter has no linear classifier.
        SiteError: If a method is neither low-rank terms nor scales and shifts.
        BaseMismatchError: If the runs have different backbones.
        ExportError: If the file computes something else; the files are left out then.
    """
    check_onnx()
    check_free(out)
    first, task = _load(runs[0])
    images = _noise(first.notes)
    loaded = [_scored(first, task, images)]
    for run in runs[1:]:
        other, other_task = _load(run)
        _check_same(loaded[0], other)
        loaded.append(_scored(other, other_task, images))
    files = _files(loaded, out)
    check_free(*files)
    layout = AdapterInputs.layout([one.adapter for one in loaded], room.rank, room.classes)
    notes = {
        "adapter_inputs": layout.to_dict(),
        "backbone": task.backbone,
        "fingerprint": first.fingerprint,
        "preprocessing": first.notes["preprocessing"],
        "versions": versions(),
    }
    written = [
        export_onnx(BackboneWithInputs(task.model, layout), images[0], out, notes=notes, adapter=layout.neutral())
    ]
    try:
        for one, file in zip(loaded, files, strict=True):
            written.append(write_inputs(file, one.adapter, layout, one.notes))
        _check(out, files, loaded, images, layout)
    except BaseException:
        for path in (*written, out.with_name(f"{out.name}.data")):
            path.unlink(missing_ok=True)
        raise
    return written


def add_inputs(runs: Sequence[Run], backbone: Path, out: Path) -> list[Path]:
    """Write the inputs of further adapters for a backbone that is exported already.

    Args:
        runs: Finished runs on the same backbone.
        backbone: The ONNX file.
        out: The file; of several runs, the name before the run's.

    Returns:
        The files.

    Raises:
        FileError: If the ONNX file has no adapters as inputs.
        BaseMismatchError: If a run has another backbone.
        ConfigError: If an adapter does not fit, or a file exists.
    """
    notes = onnx_layout(backbone)
    layout = InputLayout.from_dict(notes["adapter_inputs"])
    written = []
    for run in runs:
        loaded, _ = _load(run)
        if loaded.fingerprint != notes["fingerprint"]:
            raise BaseMismatchError(
                f"{run.path} was trained on another backbone than that in {backbone} ({notes['backbone']}). Export its "
                "own."
            )
        file = out if len(runs) == 1 else loaded.file(out)
        written.append(write_inputs(file, loaded.adapter, layout, loaded.notes))
    return written


def _load(run: Run) -> tuple[_Loaded, AdapterTask]:
    task, _ = load_task(run)
    if task.deployed() is not task.model or not task.classifies:
        raise ConfigError(
            f"{run.path} is a run of {type(task).__name__}, whose outputs are not those of one linear classifier. As "
            "inputs go runs of Classification, MultiLabel and Regression; export this one in a file of its own."
        )
    without_token_merging(task, "exported")
    task.model.float().eval()
    notes = task.bank.notes()
    kept = {key: notes.get(key) for key in ("preprocessing", "output")}
    fingerprint = json.loads(json.dumps(task.bank.fingerprint()))
    return _Loaded(run, adapter_inputs(task.bank), fingerprint, kept, []), task


def _scored(loaded: _Loaded, task: AdapterTask, images: Sequence[Tensor]) -> _Loaded:
    """Compute the scores that the file is compared with."""
    with torch.inference_mode():
        loaded.scores.extend(task.model(batch) for batch in images)
    return loaded


def _check_same(first: _Loaded, other: _Loaded) -> None:
    if first.fingerprint != other.fingerprint:
        raise BaseMismatchError(
            f"{first.run.path} and {other.run.path} were trained on different backbones, and one file holds one. "
            "Export them apart."
        )
    sizes = [one.notes["preprocessing"]["input_size"] for one in (first, other)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{first.run.path} takes images of {sizes[0]}, and {other.run.path} of {sizes[1]}; one file takes one size."
        )


def _noise(notes: dict[str, Any]) -> list[Tensor]:
    """Make the images that a file is traced and compared with: two batches of different lengths."""
    generator = torch.Generator().manual_seed(0)
    size = notes["preprocessing"]["input_size"]
    return [torch.randn(count, *size, generator=generator) for count in (2, 3)]


def _check(
    out: Path, files: Sequence[Path], loaded: Sequence[_Loaded], images: Sequence[Tensor], layout: InputLayout
) -> None:
    """Run each adapter through the file, and compare its scores with those of its model."""
    session = onnx_session(out)
    for file, one in zip(files, loaded, strict=True):
        arrays, notes = read_inputs(file, layout)
        found = [torch.from_numpy(session.run(None, {INPUT: batch.numpy(), **arrays})[0]) for batch in images]
        error = largest_difference([scores[:, : notes["classes"]] for scores in found], one.scores)
        if not error <= TOLERANCE:
            raise ExportError(
                f"The scores of {one.run.path} through the exported backbone differ from the run's by {error:.1e} of "
                f"the largest one; {TOLERANCE:.0e} is rounding. No file was left."
            )
        console.print(f"{file}: largest difference {error:.1e} of the largest score", soft_wrap=True)
