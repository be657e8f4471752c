"""``vispeft export``: write a finished run as a `torch.export` program, an ONNX file, or a difference of weights."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from vispeft.adapters.merge import MergeReport
from vispeft.cli.common import console, make_parser, versions
from vispeft.cli.evaluate import load_task
from vispeft.cli.export_delta import export_delta
from vispeft.cli.export_inputs import Room, add_inputs, export_runs
from vispeft.cli.runs import Run, write_json
from vispeft.cli.token_merging import without_token_merging
from vispeft.errors import ConfigError, ExportError, counted
from vispeft.interop.export import INPUT, TOLERANCE, Difference, check, check_onnx, export_onnx, export_program
from vispeft.interop.staging import check_free, staged
from vispeft.tasks.base import AdapterTask

__all__ = ["Exported", "InputSize", "export_run", "main"]

ENDINGS = {"onnx": ".onnx", "export": ".pt2", "delta": ".safetensors"}
"""File suffixes by format."""
EXAMPLE = """examples:
  vispeft export runs/digits_ssf/1 --out digits.onnx
  vispeft export runs/digits_ssf/1 --format export --out digits.pt2
  vispeft export runs/digits_ssf/1 --out digits.onnx --batch 8
  vispeft export runs/earth_mtlora/1 --out relief.onnx --task relief
  vispeft export runs/digits_svfit/1 --format delta --out digits.delta.safetensors
  vispeft export runs/a/1 runs/b/1 --adapters as-inputs --rank 8 --classes 20 --out backbone.onnx
  vispeft export runs/c/1 --adapters as-inputs --into backbone.onnx --out c.safetensors

Merges the adapter where its method allows, writes the model, runs the file and compares it with the run. The input is a
batch of normalised images (B, 3, H, W) in float32, the output are the scores; a run of several tasks has an output for
each, by its name. Mean, standard deviation, size and class names stand in the ONNX file's metadata, or in a JSON file
beside a .pt2 file.

With --format delta, the file holds what merging adds to each weight of the frozen backbone, under timm's names: the sum
in the dtype of the difference is the merged weight, bit for bit."""


@dataclass(frozen=True, kw_only=True)
class InputSize:
    """Size of the images an exported file accepts."""

    height: int
    """Size in pixels."""
    width: int
    """Size in pixels."""
    batch: int | None = None
    """Number of images per call; None for any number."""
    step: tuple[int, int] | None = None
    """Divisors of height and width if other sizes are accepted too; None if they are not."""

    @property
    def dynamic(self) -> dict[str, bool]:
        """Return the free dimensions, as arguments of the functions in `vispeft.interop.export`."""
        return {"dynamic_batch": self.batch is None, "dynamic_size": self.step is not None}

    def example(self) -> Tensor:
        """Return noise for tracing."""
        return self._noise(0, self.batch or 2, self.height, self.width)

    def others(self) -> list[Tensor]:
        """Return noise for comparison, with other batch and image sizes if these are free."""
        sizes = [(self.height, self.width)] * 2
        if self.step is not None:
            down, right = self.step
            sizes += [(self.height + down, self.width + 2 * right), (max(2 * down, self.height - down), self.width)]
        counts = [self.batch] * 4 if self.batch else [1, 3, 2, 1]
        return [self._noise(1 + i, count, *size) for i, (count, size) in enumerate(zip(counts, sizes, strict=False))]

    def axes(self) -> list[Any]:
        """Describe the input's shape, with names for free dimensions."""
        height, width = (self.height, self.width) if self.step is None else ("height", "width")
        return [self.batch or "batch", 3, height, width]

    def _noise(self, seed: int, count: int, height: int, width: int) -> Tensor:
        return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    path: Path
    """The file."""
    shape: list[Any]
    """The input's shape."""
    report: MergeReport
    """Report of the merge."""
    difference: Difference
    """Difference between the file's outputs and the run's."""

    @property
    def merged(self) -> str:
        """Say whether the adapter was merged, and if not, why."""
        return _merged(self.report)

    def table(self) -> Table:
        """Format the result as a table."""
        table = Table(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("file", str(self.path))
        table.add_row("bytes", f"{_size(self.path):,}")
        table.add_row("input", f"{INPUT}: float32 {' x '.join(map(str, self.shape))}")
        table.add_row("merged", self.merged)
        table.add_row("largest difference", f"{self.difference.absolute:.1e}")
        table.add_row("over the largest output", f"{self.difference.relative:.1e}")
        return table


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("export", "Write a finished run for deployment, and check the file.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", nargs="+", help="run directory; several with --adapters as-inputs")
    parser.add_argument(
        "--adapters",
        choices=("merged", "as-inputs"),
        default="merged",
        help="merged (default), or inputs of an ONNX file",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="as-inputs: room for terms of this rank")
    parser.add_argument("--classes", type=int, metavar="C", help="as-inputs: room for this many classes")
    parser.add_argument("--into", metavar="FILE", help="as-inputs: write inputs alone, for this exported backbone")
    parser.add_argument(
        "--format", choices=tuple(ENDINGS), default="onnx", help="onnx (default), torch.export or delta"
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="the file, ending in .onnx, .pt2 or .safetensors")
    parser.add_argument("--batch", type=int, metavar="N", help="take N images at a time; default any number")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="size of the images; default the run's")
    parser.add_argument("--task", metavar="NAME", help="one task of a run with several; default all, by name")
    parser.add_argument("--any_size", action="store_true", help="take images of any size (ViT made with flexible_size)")
    given = parser.parse_args(list(argv))
    out = Path(given.out)
    if given.adapters == "as-inputs":
        _export_as_inputs(given, out)
        return
    _check_merged(given)
    if out.suffix != ENDINGS[given.format]:
        raise ConfigError(f"--out is {str(out)!r}; with --format {given.format} it ends in {ENDINGS[given.format]}.")
    for option, value in (("batch", given.batch), ("size", min(given.size or [1]))):
        if value is not None and value < 1:
            raise ConfigError(f"--{option} is {value}; at least 1 is needed.")
    images = [f"--{name}" for name in ("batch", "size", "any_size") if getattr(given, name)]
    if given.format == "delta" and images:
        raise ConfigError(f"{images[0]} was given; a difference of weights is the same for all images. Leave it out.")
    run = Run.open(given.run[0])
    check_free(out, *_beside(out))
    if given.format == "onnx":
        check_onnx()
    task, _ = load_task(run)
    without_token_merging(task, "exported")
    if given.task is not None:
        task.choose(given.task)
    if given.format == "delta":
        info = export_delta(task, out)
        console.print(f"{out} holds what is added to {counted(len(info['added']), 'tensor')} of {info['backbone']}.")
        return
    # Padding inside the model, which a program for PyTorch does not keep.
    padded = given.format == "onnx" and hasattr(task.deployed(), "pads_to")
    step = ((1, 1) if padded else task.size_step()) if given.any_size else None
    height, width = given.size or task.bank.notes()["preprocessing"]["input_size"][-2:]
    exported = export_run(task, out, InputSize(height=height, width=width, batch=given.batch, step=step))
    console.print(exported.table())


def _check_merged(given: Namespace) -> None:
    """Refuse arguments that belong to adapters as inputs."""
    if len(given.run) > 1:
        raise ConfigError(
            f"{len(given.run)} runs were given, and a file holds one. Add --adapters as-inputs for several."
        )
    for option in ("rank", "classes", "into"):
        if getattr(given, option) is not None:
            raise ConfigError(
                f"--{option} was given, which belongs to --adapters as-inputs. Add that, or leave it out."
            )


def _export_as_inputs(given: Namespace, out: Path) -> None:
    """Export a backbone that takes adapters as inputs, or the inputs of further adapters."""
    for option in ("batch", "size", "task"):
        if getattr(given, option) is not None:
            raise ConfigError(
                f"--{option} was given with --adapters as-inputs, which takes no such choice. Leave it out."
            )
    if given.format != "onnx" or given.any_size:
        raise ConfigError("--adapters as-inputs writes ONNX files for one size of images. Leave the other options out.")
    for option in ("rank", "classes"):
        if (getattr(given, option) or 1) < 1 or getattr(given, option) == 0:
            raise ConfigError(f"--{option} is {getattr(given, option)}; at least 1 is needed.")
    ending = ENDINGS["onnx"] if given.into is None else ".safetensors"
    if out.suffix != ending:
        raise ConfigError(f"--out is {str(out)!r}; {'with --into' if given.into else 'here'} it ends in {ending}.")
    runs = [Run.open(place) for place in given.run]
    if given.into is None:
        files = export_runs(runs, out, Room(given.rank, given.classes))
    elif given.rank is None and given.classes is None:
        files = add_inputs(runs, Path(given.into), out)
    else:
        raise ConfigError("--rank and --classes are those of the exported backbone with --into. Leave them out.")
    for path in files:
        console.print(str(path), soft_wrap=True)


def export_run(task: AdapterTask, out: Path, size: InputSize) -> Exported:
    """Write a task's model in the format of the file's suffix, and compare the file with the adapted model.

    The model is exported in float32, and merged if the method allows.

    Args:
        task: The task of a finished run; its model is in float32 afterwards.
        out: The file, ending in ``.onnx`` or ``.pt2``.
        size: Size of the images it should accept.

    Returns:
        The result.

    Raises:
        ConfigError: If the file exists, or the extra is not installed.
        ExportError: If the model cannot be exported, or the file computes something else; no file is left then.
        MergeError: If the adapter's values are not finite.
    """
    model = task.deployed().float().eval().requires_grad_(False)
    onnx = out.suffix == ENDINGS["onnx"]
    with staged(out, *_beside(out)) as place:
        report = _merge(task)
        try:
            notes = _notes(task, size, report)
            if onnx:
                export_onnx(model, size.example(), place, **size.dynamic, notes=notes)
            else:
                # torch's own writer of files ends the process when the disk is full
                content = io.BytesIO()
                torch.export.save(export_program(model, size.example(), **size.dynamic), content)
                place.write_bytes(content.getbuffer())
                write_json(place.with_suffix(".json"), notes)
        finally:
            if task.mergeable() is None:
                task.bank.unmerge()  # the file is compared with the model as trained
        difference = check(model, place, size.others())
        if not difference.relative <= TOLERANCE:
            raise ExportError(
                f"The outputs of the {out.suffix} file differ from the run's by {difference.relative:.1e} of the "
                f"largest output; {TOLERANCE:.0e} is rounding. No file was left. Try the other format."
            )
    return Exported(out, size.axes(), report, difference)


def _merge(task: AdapterTask) -> MergeReport:
    """Merge the layers that can be, or none where each output has weights of its own."""
    reason = task.mergeable()
    return task.bank.merge(partial=True) if reason is None else MergeReport((), (), (), {"": reason}, 0.0)


def _beside(out: Path) -> list[Path]:
    """List the files written beside an exported one; an ONNX file holds its notes itself."""
    return [] if out.suffix == ENDINGS["onnx"] else [out.with_suffix(".json")]


def _notes(task: AdapterTask, size: InputSize, report: MergeReport) -> dict[str, Any]:
    """Collect the data a user of the file needs to prepare images and interpret scores."""
    notes = task.bank.notes()
    return {
        "class_names": notes.get("class_names"),
        "preprocessing": notes.get("preprocessing"),
        "output": notes.get("output"),
        "metrics": notes.get("metrics"),
        "input": {"name": INPUT, "shape": size.axes(), "dtype": "float32", "multiple_of": size.step},
        "task": type(task).__name__,
        "backbone": task.backbone,
        "merged": _merged(report),
        "versions": versions(),
    }


def _merged(report: MergeReport) -> str:
    if not report.kept:
        return "yes"
    reasons = "; ".join(dict.fromkeys(reason.rstrip(".") for reason in report.kept.values()))
    partly = f"partly, all but {counted(len(report.kept), 'layer')}"
    return f"{partly if report.merged else 'no'}: {reasons}"


def _size(path: Path) -> int:
    """Return the size of a file and its external weights."""
    further = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (further.stat().st_size if further.exists() else 0)
