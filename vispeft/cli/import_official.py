"""``vispeft import-official``: convert an authors' published checkpoint to an adapter directory."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vispeft.adapters.attach import load
from vispeft.adapters.bank import AdapterBank
from vispeft.adapters.verify import probe_images
from vispeft.backbones.create import create_model
from vispeft.cli.common import console, make_parser
from vispeft.core.families import describe, unwrap
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import BaseMismatchError, ConfigError, FileError
from vispeft.interop.binary import BINARY_SOURCES, load_binary
from vispeft.interop.official import find_source, list_sources, load_official
from vispeft.storage.places import check_folder

__all__ = ["import_official", "main", "read_checkpoint"]

EXAMPLE = """example:
  vispeft import-official biadaptformer kitti-bit1-dim1.bin --model vit_base_patch16_224.orig_in21k \\
      --weights ViT-B_16.npz --hyper bits=1 bottleneck=1 scale=10 --out adapters/kitti
  vispeft import-official ssf model_best.pth.tar --model vit_base_patch16_224.augreg_in21k --out adapters/ssf

Give settings that are not in the file by --hyper name=value. The result is an adapter like any other:
  bank = vispeft.load(model, "adapters/kitti")"""

Pixels = tuple[tuple[float, ...], tuple[float, ...]]
PIXELS: dict[str, Pixels] = {
    **dict.fromkeys(BINARY_SOURCES, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
    **dict.fromkeys(
        ("convpass", "convpass_attn", "fact_tt", "fact_tk", "repadapter_repattn", "repadapter_repblock", "hydra"),
        (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ),
}
"""Mean and standard deviation in the authors' code, if they differ from timm's for the backbone."""
WRAPPERS, PREFIXES = ("state_dict", "model"), ("module.", "adapter.")
"""Keys under which training scripts store tensors, and prefixes they add to names."""
DERIVED = ("relative_position_index", "attn_mask")
"""Suffixes of tensors that older versions of timm stored, and that every model recomputes."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("import-official", "Make an adapter from an authors' checkpoint.", EXAMPLE)
    parser.add_argument("source", metavar="SOURCE", help=f"the public code: {', '.join(list_sources())}")
    parser.add_argument("file", metavar="FILE", help="safetensors, a PyTorch file, or a .bin of PETL-ViT")
    parser.add_argument("--model", metavar="NAME", required=True, help="the backbone: a timm model, or zoo:NAME")
    parser.add_argument("--weights", metavar="FILE", help="the backbone's weights, instead of downloaded ones")
    parser.add_argument(
        "--num_classes", metavar="N", type=int, help="outputs of the model, if no classifier is in FILE"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="the adapter's directory")
    parser.add_argument("--hyper", metavar="K=V", nargs="+", action="extend", default=[], help="hyper-parameters")
    given = parser.parse_args(list(argv))
    find_source(given.source)
    place, file, hyper = Path(given.out), Path(given.file), _pairs(given.hyper)
    if os.path.isdir(place) and any(place.iterdir()):
        raise ConfigError(f"--out is {given.out!r}, which is not empty, and nothing is overwritten. Choose another.")
    check_folder(place, "--out")
    if not os.path.isfile(file):
        raise FileError(f"There is no file {given.file!r} to import.")
    outputs = {} if given.num_classes is None else {"num_classes": given.num_classes}
    model = create_model(given.model, weights=given.weights, **outputs).eval()
    bank = import_official(model, given.source, file, hyper, place)
    console.print(bank.report())
    pixels = bank.notes()["preprocessing"]
    console.print(f"{place} holds the adapter, and gives the same outputs when it is loaded.", soft_wrap=True)
    console.print(
        f"Images: mean {pixels['mean']}, standard deviation {pixels['std']} (stored with it).", soft_wrap=True
    )


def import_official(model: nn.Module, source: str, file: Path, hyper: Mapping[str, Any], place: Path) -> AdapterBank:
    """Attach the adapter of an authors' checkpoint, save it, and check that the saved adapter computes the same.

    Args:
        model: The backbone the checkpoint belongs to.
        source: The public code.
        file: The checkpoint.
        hyper: Settings that are not in the checkpoint.
        place: The adapter's directory.

    Returns:
        The model's bank.

    Raises:
        FileError: If the checkpoint cannot be read or does not fit; nothing is written then.
        BaseMismatchError: If it contains tensors of another backbone.
    """
    again = copy.deepcopy(model)
    if file.suffix == ".bin" and source in BINARY_SOURCES:
        bank = load_binary(model, source, file.read_bytes(), hyper)
    else:
        tensors, metadata = read_checkpoint(file)
        nested = metadata.get("hyper") if isinstance(metadata.get("hyper"), dict) else {}
        told = {**metadata, **hyper, "hyper": {**metadata, **(nested or {}), **hyper}}
        bank = load_official(model, source, without_backbone(model, tensors, file), told)
    bank.annotate(preprocessing=_preprocessing(model, source).to_dict())
    images = probe_images(unwrap(model), bank.view, batch=2)
    with torch.inference_mode():
        wanted = model(images)
    bank.save(place)
    load(again, place)
    with torch.inference_mode():
        if not torch.equal(again(images), wanted):
            raise FileError(f"{place} was written, but gives other outputs when it is loaded. It is not to be used.")
    return bank


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a checkpoint, and its metadata.

    Args:
        file: A safetensors file, or a PyTorch file of tensors; files with code are refused.

    Raises:
        FileError: If it cannot be read.
    """
    metadata: dict[str, Any] = {}
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                metadata = {key: _decoded(value) for key, value in (opened.metadata() or {}).items()}
                found: Any = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise FileError(f"{file} is no safetensors file ({error}).") from error
    else:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            told = str(error).strip().splitlines()[0]
            raise FileError(
                f"{file} cannot be read as a PyTorch file of tensors ({told}). A file that holds more than tensors has "
                "to be written again with its state dict alone."
            ) from error
    while isinstance(found, dict) and (key := next((k for k in WRAPPERS if isinstance(found.get(k), dict)), None)):
        found = found[key]
    if not isinstance(found, dict):
        raise FileError(f"{file} holds a {type(found).__name__}; a dictionary of tensors is needed.")
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise FileError(f"{file} holds no tensors; found {', '.join(map(str, list(found)[:5])) or 'nothing'}.")
    for prefix in PREFIXES:
        below = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        tensors = below or tensors
    return tensors, metadata


def without_backbone(model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Remove the tensors of the backbone, which must equal the model's.

    Args:
        model: The backbone.
        tensors: All tensors of a checkpoint.
        file: Its name, for messages.

    Raises:
        BaseMismatchError: If their values differ.
    """
    head, own = describe(model).head_path, unwrap(model).state_dict()
    kept = {name: t for name, t in tensors.items() if not name.endswith(DERIVED)}
    base = {name: t for name, t in kept.items() if name in own and not (head and name.startswith(f"{head}."))}
    other = [
        name for name, t in base.items() if t.shape != own[name].shape or not torch.equal(t.to(own[name]), own[name])
    ]
    if other:
        raise BaseMismatchError(
            f"{len(other)} of {len(base)} backbone tensors in {file} are not those of the model, first {other[0]}. The "
            "adapter belongs to the backbone it was trained on: give its name by --model, or its file by --weights."
        )
    return {name: t for name, t in kept.items() if name not in base}


def _preprocessing(model: nn.Module, source: str) -> Preprocessing:
    known = Preprocessing.of(model)
    if source not in PIXELS:
        return known
    mean, std = PIXELS[source]
    return dataclasses.replace(known, mean=mean, std=std)


def _pairs(entries: Sequence[str]) -> dict[str, Any]:
    """Parse name=value pairs, with values in YAML."""
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"--hyper {entry!r} is no name=value, such as scale=0.1.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--hyper {entry!r}: the value is no valid YAML.") from error
    return found


def _decoded(value: str) -> Any:
    """Decode a value if it is JSON."""
    try:
        return json.loads(value)
    except ValueError:
        return value
