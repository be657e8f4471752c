"""Export for deployment: `torch.export` programs and ONNX files, and their comparison with the original model.

A model maps one batch of images to one tensor, or to several by name. ONNX needs the extra `export`, which is imported
where it is used.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional

from vispeft.adapters.bank import AdapterBank
from vispeft.errors import ConfigError, ExportError, FileError
from vispeft.interop.staging import staged
from vispeft.storage.header import strict_values

__all__ = [
    "INPUT",
    "OUTPUT",
    "TOLERANCE",
    "Difference",
    "check",
    "check_onnx",
    "export_onnx",
    "export_program",
    "onnx_layout",
    "onnx_session",
]

logger = logging.getLogger(__name__)

INPUT, OUTPUT = "images", "scores"
"""Names of an ONNX model's input, and of its output where it has one; several have the model's own names."""
TOLERANCE = 1e-4
"""Largest difference of float32 outputs, over the largest output, that counts as rounding. Runtimes fuse and reorder
sums; a wrong operator, or a shape traced as a constant, changes the leading digits."""
_AXES = {0: "batch", 2: "height", 3: "width"}
_WINDOWED = (SwinTransformerBlock, SwinTransformerV2Block)
"""Blocks whose padding and shift of windows depend on the size of the maps in Python code, so that a trace is valid for
one size only."""


@dataclass(frozen=True)
class Difference:
    """The difference between the outputs of an export and of the original model."""

    absolute: float
    """Largest difference of any output."""
    largest: float
    """Largest absolute output of the model."""

    @property
    def relative(self) -> float:
        """The absolute difference over the largest output; infinite if a value is not finite."""
        share = self.absolute / max(self.largest, 1e-30)
        return share if math.isfinite(share) else math.inf


class _WholePatches(nn.Module):
    """A model that refuses images whose sides are no multiples of a patch.

    ONNX drops the conditions under which a trace is valid. This reshape, which the file keeps, fails where they do not
    hold.
    """

    def __init__(self, model: nn.Module, patch: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.patch = model, patch

    def forward(self, images: Tensor) -> Any:
        (down, right), (count, channels, height, width) = self.patch, images.shape
        cells = images.reshape(count, channels, height // down, down, width // right, right)
        return self.model(cells.reshape(count, channels, height, width))


def _for_any_size(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """Prepare a trace for ONNX that takes exactly the sizes the model takes.

    Args:
        model: The model; ``pads_to`` of it, or timm's ``dynamic_img_pad``, says that it pads to whole patches.
        example: Images (B, 3, H, W).

    Returns:
        The module to trace, and images of a size at which its padding, if it has any, happens.
    """
    patches = next((module for module in model.modules() if isinstance(module, PatchEmbed)), None)
    side = getattr(model, "pads_to", None)
    if side is None and patches is None:
        return model, example
    patch = tuple(patches.patch_size) if side is None else (side, side)  # type: ignore[union-attr]
    if side is None and not patches.dynamic_img_pad:  # type: ignore[union-attr]
        return _WholePatches(model, patch).eval(), example
    below, beside = (int(length % part == 0) for length, part in zip(example.shape[-2:], patch, strict=True))
    return model, functional.pad(example, (0, beside, 0, below))


def export_program(
    model: nn.Module,
    example: Tensor,
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    adapter: Mapping[str, Tensor] | None = None,
) -> ExportedProgram:
    """Trace a model with `torch.export`.

    Of a model with adapters the program holds the present route for good: the adapters that act, for the task that is
    chosen, and the classifier that answers. A log message names them.

    Args:
        model: Maps images to one tensor, or to several by name; in evaluation mode.
        example: Images (B, 3, H, W) of the sizes that stay fixed.
        dynamic_batch: Whether the program accepts any number of images.
        dynamic_size: Whether it accepts images of any height and width that the model accepts.
        adapter: Example of the model's second argument, tensors by name of fixed shapes; None where it has none.

    Returns:
        The program.

    Raises:
        ConfigError: If the model is in training mode.
        ExportError: If the model's computation depends on a dynamic size, or cannot be traced.
    """
    if any(module.training for module in model.modules()):
        raise ConfigError("The model is in training mode, and would be exported so. Call model.eval() first.")
    if dynamic_size and any(isinstance(module, _WINDOWED) for module in model.modules()):
        raise ExportError(
            "Swin's windows, their padding and their shift depend on the size of the images, and a trace is valid for "
            "one size. Leave the size fixed, and export one file for each size."
        )
    if dynamic_batch and len(example) < 2:
        example = example.expand(2, -1, -1, -1).contiguous()  # a batch of 1 is traced as the constant 1
    for module in model.modules():
        bank = AdapterBank.of(module)
        if bank is not None:
            task = "" if bank.task is None else f", for the task {bank.task!r}"
            logger.info("The export holds the adapters that act now: %s%s.", ", ".join(bank.active) or "none", task)
    free: dict[int, Any] = {0: Dim("batch", min=1)} if dynamic_batch else {}
    if dynamic_size:
        free |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}  # the model sets the bounds: mostly multiples of the patch size
    try:
        with torch.no_grad():
            given = (example,) if adapter is None else (example, dict(adapter))
            shapes = (free,) if adapter is None else (free, dict.fromkeys(adapter))
            program = torch.export.export(model, given, dynamic_shapes=shapes)
    # Dynamo's errors, those of symbolic shapes and timm's assertions have no narrower common base class.
    except Exception as error:
        wanted = ", ".join(_AXES[axis] for axis in free) or "nothing"
        raise ExportError(
            f"{type(model).__name__} could not be traced with images of shape {tuple(example.shape)} and {wanted} "
            f"free: {_first_line(error)}. A backbone takes images of any size if it is made with flexible_size."
        ) from error
    if not _output_names(program):
        raise ExportError(
            f"{type(model).__name__} gives {len(program.graph_signature.user_outputs)} tensors without names; wrap it "
            "in a module that gives one, or several in a dictionary."
        )
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it would write local paths into every file
    return program


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    notes: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Tensor] | None = None,
) -> Path:
    """Export a model to an ONNX file with input ``images``; no partial file is left on an error.

    The output is called ``scores``, or several have the names that the model gives them.

    Weights of more than 2 GiB, the format's limit, go into a second file ``<name>.data``.

    Args:
        model: Maps images to one tensor, or to several by name; in evaluation mode.
        example: Images (B, 3, H, W) of the sizes that stay fixed.
        path: The file.
        dynamic_batch: Whether the file accepts any number of images.
        dynamic_size: Whether it accepts images of any height and width that the model accepts; it refuses others.
        notes: Values by name, written as JSON into the file's ``metadata_props``.
        adapter: Example of the model's second argument, tensors by name, which are further inputs of these names.

    Returns:
        The file.

    Raises:
        ConfigError: If the extra is not installed, the model is in training mode, or the file exists.
        ExportError: If the model cannot be traced, or uses an operator that ONNX lacks.
        FileError: If the file cannot be written.
    """
    _extra("onnx", "onnxscript")
    with staged(Path(path)) as place:
        traced, images = _for_any_size(model, example) if dynamic_size else (model, example)
        program = export_program(
            traced, images, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size, adapter=adapter
        )
        names = {axis: name for axis, name in _AXES.items() if (dynamic_batch if axis == 0 else dynamic_size)}
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[INPUT, *(adapter or ())],
                output_names=_output_names(program),
                dynamic_shapes=(names,) if adapter is None else (names, dict.fromkeys(adapter)),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{type(model).__name__} has no ONNX form: {_first_line(error)}.") from error
        assert exported is not None
        exported.model.metadata_props.update(
            {key: json.dumps(strict_values(value)) for key, value in (notes or {}).items()}
        )
        exported.save(place)
    return Path(path)


def check_onnx() -> None:
    """Check that everything is installed by which an ONNX file is written and compared with the model.

    Raises:
        ConfigError: If the extra is not.
    """
    _extra("onnx", "onnxscript", "onnxruntime")


def check(model: nn.Module, exported: ExportedProgram | str | Path, batches: Iterable[Tensor]) -> Difference:
    """Compare an export with the original model.

    Args:
        model: The model, in evaluation mode on the CPU.
        exported: A program, or a file: ``.onnx``, which is run by onnxruntime on the CPU, or ``.pt2``.
        batches: Images (B, 3, H, W), also of other batch and image sizes than the traced ones.

    Returns:
        The largest difference over all batches.

    Raises:
        ConfigError: If the extra is not installed and the file is ONNX.
        ExportError: If the export does not run on one of the batches.
        FileError: If the file cannot be read.
    """
    run = _runner(exported)
    absolute = largest = 0.0
    for images in batches:
        with torch.no_grad():
            wanted = _named(model(images))
            try:
                found = run(images)
            except Exception as error:  # onnxruntime's errors have no common base class
                raise ExportError(
                    f"The export does not run on images of shape {tuple(images.shape)}: {_first_line(error)}. Leave "
                    "the sizes fixed that the model's computation depends on."
                ) from error
        shapes, own = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (found, wanted))
        if shapes != own:
            raise ExportError(
                f"For images of shape {tuple(images.shape)} the export gives {shapes}, and the model {own}."
            )
        differs = max(float((found[name].double() - t.double()).abs().max()) for name, t in wanted.items())
        absolute = max(absolute, differs if math.isfinite(differs) else math.inf)
        largest = max(largest, *(float(t.abs().max()) for t in wanted.values()))
    return Difference(absolute, largest)


def _named(outputs: Any) -> dict[str, Tensor]:
    """Return the outputs of a model by name."""
    return dict(outputs) if isinstance(outputs, Mapping) else {OUTPUT: outputs}


def _output_names(program: ExportedProgram) -> list[str]:
    """Return the names of a program's outputs; none if it has several without names."""
    count = len(program.graph_signature.user_outputs)
    outputs = program.call_spec.out_spec.unflatten(range(count)) if program.call_spec.out_spec else None
    if isinstance(outputs, Mapping):
        return list(outputs)
    return [OUTPUT] if isinstance(outputs, int) else []


def _runner(exported: ExportedProgram | str | Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return a function that runs an export on images."""
    if isinstance(exported, ExportedProgram):
        run = exported.module()
        return lambda images: _named(run(images))
    path = Path(exported)
    if not path.is_file():
        raise FileError(f"There is no file {str(path)!r}.")
    if path.suffix != ".onnx":
        loaded = torch.export.load(path).module()
        return lambda images: _named(loaded(images))
    session = onnx_session(path)
    names = [output.name for output in session.get_outputs()]

    def run_file(images: Tensor) -> dict[str, Tensor]:
        found = session.run(names, {INPUT: images.numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}

    return run_file


def onnx_layout(path: Path) -> dict[str, Any]:
    """Read the notes of an ONNX file that takes adapters as inputs.

    Args:
        path: The file.

    Raises:
        ConfigError: If the extra is not installed.
        FileError: If the file cannot be read, or takes no adapters.
    """
    (onnx,) = _extra("onnx")
    try:
        found = onnx.load(str(path), load_external_data=False).metadata_props
        notes = {entry.key: json.loads(entry.value) for entry in found}
    except Exception as error:  # of protobuf, whose errors have no common base class with those of files
        raise FileError(f"{path} cannot be read as an ONNX file: {_first_line(error)}.") from error
    if "adapter_inputs" not in notes or "fingerprint" not in notes:
        raise FileError(f"{path} takes no adapters as inputs. Write it by vispeft export --adapters as-inputs.")
    return notes


def onnx_session(path: Path) -> Any:
    """Open an ONNX file by onnxruntime on the CPU.

    Args:
        path: The file.

    Raises:
        ConfigError: If the extra is not installed.
    """
    (runtime,) = _extra("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    options.intra_op_num_threads = torch.get_num_threads()  # the default is all processors, with busy waiting
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _extra(*names: str) -> list[Any]:
    """Import modules of the extra `export`.

    Raises:
        ConfigError: If a module is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ConfigError(
            f"ONNX was asked for, and {error.name or names[0]} cannot be imported ({error}). Install the extra: "
            'pip install "vispeft[export]".'
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error message; the tracer's messages are pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].partition(" For more information")[0].rstrip(".!") if lines else type(error).__name__
