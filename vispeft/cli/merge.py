"""``vispeft merge``: write a finished run as a plain timm model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vispeft.adapters.merge import TOLERANCE
from vispeft.backbones.request import resolve
from vispeft.cli.common import console, make_parser, versions
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run, write_json
from vispeft.cli.token_merging import without_token_merging
from vispeft.errors import ConfigError, MergeError
from vispeft.interop.staging import check_free, staged
from vispeft.storage.files import DECODER, JSON_FILE
from vispeft.tasks.base import AdapterTask

__all__ = ["main", "merge_run"]

BESIDE = ("decoder", "head")
"""Middle part of the name of a file beside the model: what is in it."""
EXAMPLE = """example:
  vispeft merge runs/digits_ssf/1 --out digits.safetensors

Writes digits.safetensors, a plain timm state dict, and digits.json, with the arguments to create the model:
  model = timm.create_model(info["architecture"], **info["args"])
  model.load_state_dict(safetensors.torch.load_file("digits.safetensors"))

Of a segmentation run that is the backbone; map reader and decoder go into digits.decoder.safetensors beside it, and
`vispeft export` writes all of it as one program. Of a metric learning run the classifier is the head of the embeddings;
one with a layer norm goes into digits.head.safetensors. Divide embeddings by their length."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("merge", "Write a finished run as a plain timm model.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--out", metavar="FILE", required=True, help="the state dict's file, ending in .safetensors")
    parser.add_argument("--task", metavar="NAME", help="one task of a run whose tasks have weights of their own")
    given = parser.parse_args(list(argv))
    info = merge_run(Run.open(given.run), Path(given.out), given.task)
    console.print(
        f"{given.out} holds a plain {info['architecture']}; a model made from it gives outputs within "
        f"{info['max_error']:.1e} of the adapted one's largest.",
        soft_wrap=True,
    )


def merge_run(run: Run, out: Path, output: str | None = None) -> dict[str, Any]:
    """Merge a run's adapter, write the model, and check the files.

    A decoder, or an embedding head with a norm, gets a file of its own.

    Args:
        run: The run.
        out: The state dict's file.
        output: The task, of a run with several; None for all.

    Returns:
        The content of the JSON file written with it.

    Raises:
        ConfigError: If a file of that name exists, or the name has another suffix.
        MergeError: If the method cannot be merged, or plain timm does not compute the same from the files; no file is
            left then.
        FileError: If the files cannot be written.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out is {str(out)!r}; the name should end in .safetensors.")
    described = out.with_suffix(".json")
    check_free(out, described, *(out.with_suffix(f".{kind}.safetensors") for kind in BESIDE))
    task, _ = load_task(run)
    without_token_merging(task, "merged")
    if output is not None:
        task.choose(output)
    if (reason := task.mergeable()) is not None:
        raise MergeError(f"{run.path} cannot be merged: {reason}. Name it by --task.")
    source = json.loads((run.adapter / JSON_FILE).read_text(encoding="utf-8"))
    images = _noise(task.preprocessing.size)
    own, place = task.plain_head(), task.bank.view.head_path
    with torch.inference_mode():
        adapted = task.model(images) if own is None else own(task.model(images).float())
    created = _merge(task, run)
    state = _plain(task.model.state_dict())
    if own is not None:
        state |= _plain({f"{place}.{name}": tensor for name, tensor in own.state_dict().items()})
    architecture, args = _timm_arguments(task, own)
    error = _check(architecture, args, state, images, adapted, created)
    apart = not task.classifies and own is None
    head = {name.removeprefix(DECODER): t for name, t in task.head_tensors().items()} if apart else {}
    kind = task.head_name.split()[-1]
    beside = out.with_suffix(f".{kind}.safetensors")
    info = {
        "architecture": architecture,
        "args": args,
        "head_file": beside.name if head and kind == "head" else None,
        "decoder_file": beside.name if head else None,  # its name for a head, too, in files of earlier versions
        "class_names": source["class_names"],
        "preprocessing": source["preprocessing"],
        "output": source["output"],
        "metrics": source["metrics"],
        "method": source["method"],
        "max_error": error,
        "versions": versions(),
    }
    with staged(out, described, beside) as place:
        for path, tensors in {out: state, **({beside: head} if head else {})}.items():
            place.with_name(path.name).write_bytes(to_bytes(_plain(tensors), metadata={"format": "pt"}))
        write_json(place.with_name(described.name), info)
        _check(architecture, args, load_file(place), images, adapted, created)
    return info


def _merge(task: AdapterTask, run: Run) -> Any:
    """Merge the adapter and return the names of the tensors that this created.

    Raises:
        MergeError: If the method cannot be merged; the message names the command that takes it as it is.
    """
    try:
        return task.bank.merge(keep_original=False).created
    except MergeError as error:
        every = " with all of its tasks" if len(task.bank.tasks()) > 1 else ""
        raise MergeError(f"{error} `vispeft export {run.path} --out FILE` writes the whole model{every}.") from error


def _timm_arguments(task: AdapterTask, head: nn.Linear | None) -> tuple[str, dict[str, Any]]:
    """Return the call by which timm alone creates the task's backbone, without weights.

    Args:
        task: The task.
        head: The task's own head, as the classifier; None for that of the backbone.

    Returns:
        The architecture's name and the arguments of ``timm.create_model``.
    """
    given = {key: value for key, value in task.backbone_args.items() if key != "pretrained"}
    flexible = bool(given.pop("flexible_size", False))
    request = resolve(task.backbone, flexible_size=flexible, arguments=given)
    outputs = task.num_classes if task.classifies else 0
    return request.architecture, {**request.arguments, "num_classes": outputs if head is None else head.out_features}


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _noise(size: tuple[int, int]) -> Tensor:
    return torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(0))


def _check(
    architecture: str, args: dict[str, Any], state: dict[str, Tensor], images: Tensor, adapted: Tensor, created: Any
) -> float:
    """Create a plain timm model from the files and compare it with the adapted one.

    Returns:
        The largest difference, divided by the largest output.
    """
    plain = timm.create_model(architecture, **args).eval()
    try:
        plain.load_state_dict(state)
    except RuntimeError as error:
        new = f" The merge had to create {', '.join(created)}." if created else ""
        raise MergeError(
            f"The merged weights do not fit timm's own {architecture}, so no file of them would be plain.{new} Merge "
            f"in Python with bank.merge() and keep the model object instead. ({str(error).splitlines()[-1].strip()})"
        ) from error
    with torch.inference_mode():
        difference = (plain(images) - adapted).abs().max() / adapted.abs().max()
    if not difference <= TOLERANCE[images.dtype]:
        raise MergeError(
            f"A plain {architecture} with the merged weights differs by {difference:.1e} of the largest output; "
            f"{TOLERANCE[images.dtype]:.0e} is rounding, so no file is left. Timm alone pads the windows of a Swin for "
            "any size where they are larger than the map, for one. `vispeft export` writes what was trained, and "
            "bank.merge() in Python merges the model that is there."
        )
    return float(difference)
