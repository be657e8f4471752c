"""Backbones and images of the golden files, the same on every machine and with every version of every library.

Each number comes from a hash of the tensor's name and is an exact fraction, so that no random generator and no kernel
has a part in it: an adapter's file knows its backbone by the bits of its weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vispeft
from vispeft.tasks import Segmentation

_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (2, 2),
    "window_size": 4,
    "drop_path_rate": 0.0,
}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _VIT),
    "vit_smallest": ("vit_tiny_patch16_224", {**_VIT, "embed_dim": 8, "depth": 1, "num_heads": 2}),
    "vit_registers": ("vit_small_patch14_reg4_dinov2", {**_VIT, "reg_tokens": 2}),
    "dinov3": ("vit_small_patch16_dinov3", _VIT),
    "swin": ("swin_tiny_patch4_window7_224", _SWIN),
    "swin_features": ("swin_tiny_patch4_window7_224", {**_SWIN, "features_only": True, "out_indices": (0, 1)}),
    "swinv2": ("swinv2_tiny_window8_256", _SWIN),
}
"""Names and arguments of timm; ``swin_features`` has the weights of ``swin``."""

RUN_BACKBONE = ("vit_tiny_patch16_224", {**_VIT, "img_size": 8, "patch_size": 4})
"""What the golden run trains on: digits have 8 x 8 pixels, so that no image is resized on the way."""

WEIGHTS = "backbone.safetensors"
"""Where the golden run looks for its weights, seen from the folder it is started in."""


@dataclass(frozen=True)
class Golden:
    """What an adapter was written on."""

    backbone: str
    """One of `BACKBONES`."""
    classes: int = 3
    """Outputs of its classifier."""
    maps: bool = False
    """Whether the maps of all blocks were stored beside the outputs."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What was noted of it."""


NOTES = {
    "class_names": ["oak", "öre", "字"],
    "preprocessing": {
        "mean": [0.5, 0.25, 0.125],
        "std": [1.0, 0.5, 0.25],
        "size": [16, 16],
        "interpolation": "bilinear",
    },
    "metrics": {"validation/accuracy": 0.75, "test/f1": 0.625, "per class": [0.5, 0.75, 1.0]},
    "output": {"target": "class", "temperature": 1.5},
}
ADAPTERS = {
    "ssf_vit": Golden("vit", maps=True),
    "ssf_swin": Golden("swin", maps=True),
    "lora_vit": Golden("vit", notes=NOTES),
    "lora_swinv2": Golden("swinv2"),
    "pissa_vit": Golden("vit"),
    "dora_vit": Golden("vit"),
    "lora_fa_registers": Golden("vit_registers"),
    "lora_1bit_swin": Golden("swin", maps=True),
    "adaptformer_1bit_vit": Golden("vit"),
    "convpass_4bit_registers": Golden("vit_registers", maps=True),
    "adapter_vit": Golden("vit"),
    "vpt_vit": Golden("vit", maps=True),
    "vpt_shallow_dinov3": Golden("dinov3"),
    "vpt_swin": Golden("swin", maps=True),
    "vqt_vit": Golden("vit"),
    "vqt_weighted_swin": Golden("swin"),
    "lst_vit": Golden("vit"),
    "lst_swin": Golden("swin"),
    "prefix_registers": Golden("vit_registers", maps=True),
    "prefix_mlp_dinov3": Golden("dinov3"),
    "mam_vit": Golden("vit"),
    "fact_vit": Golden("vit"),
    "fact_tk_swinv2": Golden("swinv2"),
    "compacter_vit": Golden("vit"),
    "compacter_8bit_swin": Golden("swin"),
    "repadapter_dinov3": Golden("dinov3", classes=0, maps=True),
    "hydra_vit": Golden("vit"),
    "hydra_2bit_vit": Golden("vit"),
    "bitfit_vit": Golden("vit"),
    "norm_tuning_swin": Golden("swin"),
    "linear_probe_vit": Golden("vit"),
    "full_vit": Golden("vit_smallest"),
    "lora_features": Golden("swin_features"),
}
"""One adapter each, by the name of its folder."""

STACK = ("stack_first", "stack_second")
"""Two adapters on ``vit``, saved one by one; the outputs are those of both together."""
DECODED = "segmentation_vit"
"""An adapter of the task `Segmentation`, with a decoder beside it, on ``vit``."""


def numbers(name: str, count: int) -> np.ndarray:
    """Give numbers between -1 and 1 that belong to a name; evenly spread, in double precision, and exact."""
    words = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * count), "<u2")
    return (2 * words.astype(np.float64) - 65535) / 65536


def noise(name: str, shape: Sequence[int], spread: float = 1.0, centre: float = 0.0) -> Tensor:
    """Give a tensor of `numbers` in single precision."""
    values = centre + spread * numbers(name, math.prod(shape))
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


def fill(model: nn.Module) -> nn.Module:
    """Give every stored tensor of a timm model its value."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        whole = name.replace("layers_", "layers.")  # features_only spells it so
        if name.endswith("bias"):
            value = noise(whole, tensor.shape, 0.2)
        elif tensor.ndim == 1:
            value = noise(whole, tensor.shape, 0.2, 1.0)
        else:
            value = noise(whole, tensor.shape, math.sqrt(3 * tensor.shape[0] / tensor.numel()))
        tensor.copy_(value)
    return model


def make(backbone: str, classes: int = 3) -> nn.Module:
    """Make a backbone, ready to be measured."""
    name, arguments = BACKBONES[backbone]
    if not arguments.get("features_only"):
        arguments = {**arguments, "num_classes": classes}
    return fill(vispeft.create_model(name, pretrained=False, **arguments)).eval()


def images(backbone: str) -> Tensor:
    """Make two images of noise of the size a backbone takes."""
    side = BACKBONES[backbone][1]["img_size"]
    return noise("images", (2, 3, side, side), 2.0)


@torch.no_grad()
def outputs(model: nn.Module, backbone: str, maps: bool = False) -> list[Tensor]:
    """Run a model: its scores or features, or its maps where it was made for these; then the maps of all blocks."""
    batch = images(backbone)
    found = model(batch)
    found = list(found) if isinstance(found, (list, tuple)) else [found]
    return [*found, *(model.forward_intermediates(batch, intermediates_only=True) if maps else [])]


def segmentation(folder: Path) -> Segmentation:
    """Make the task whose adapter has a decoder, by way of a file in a folder."""
    name, arguments = BACKBONES["vit"]
    save_file(make("vit", 0).state_dict(), folder / WEIGHTS)
    return Segmentation(
        backbone=name,
        backbone_args=arguments,
        weights=str(folder / WEIGHTS),
        method=vispeft.LoRA(rank=2),
        num_classes=4,
        decoder="linear",
        taps=[0, 1],
    )


def make_run_backbone() -> nn.Module:
    """Make the backbone of the run."""
    name, arguments = RUN_BACKBONE
    return fill(vispeft.create_model(name, pretrained=False, num_classes=10, **arguments))
