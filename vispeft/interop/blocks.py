"""Tensor names in public codes that put small linear layers beside or inside blocks.

AdaptFormer (ShoufaChen/AdaptFormer at 6967d67), Bi-AdaptFormer, Bi-LoRA, Convpass (JieShibo/PETL-ViT at 026e4f1, MIT),
RepAdapter (luogen1996/RepAdapter at 360992f), Hydra (extremebird/Hydra at 4138457, MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vispeft.core.method import Method
from vispeft.core.plan import Plan
from vispeft.core.sites import Site, View
from vispeft.errors import FileError
from vispeft.interop.official import Source, register_source
from vispeft.methods.adaptformer import AdaptFormer
from vispeft.methods.convpass import Convpass
from vispeft.methods.hydra import Hydra
from vispeft.methods.lora import LoRA
from vispeft.methods.repadapter import RepAdapter

Names = Mapping[str, str]


def layer_names(**layers: str) -> dict[str, str]:
    """Map the weights and biases of linear layers to the authors' names.

    Args:
        **layers: The authors' name of each of our layers.

    Returns:
        The authors' name of each of our tensors.
    """
    return {
        ours: theirs
        for layer, name in layers.items()
        for ours, theirs in ((layer, f"{name}.weight"), (f"{layer}_bias", f"{name}.bias"))
    }


def block_of(site: Site) -> str:
    """Return the path of a site's block."""
    parts = site.path.split(".")
    return ".".join(parts[: parts.index("blocks") + 2])


def placed(place: Callable[[Site, str], str], tensors: Names) -> Callable[[Plan], dict[str, str]]:
    """Build a function that maps a plan's tensors to the authors' names.

    Args:
        place: Function of a site and the unit's name; returns the authors' module path, relative to the block.
        tensors: The authors' name of each tensor in that module.
    """

    def names(plan: Plan) -> dict[str, str]:
        return {
            f"{item.key}.{tensor}": f"{block_of(item.site)}.{place(item.site, item.unit)}.{tensors[tensor]}"
            for item in plan
            for tensor in item.shapes()
        }

    return names


def hyper_of(metadata: Mapping[str, Any], source: str, *needed: str) -> dict[str, Any]:
    """Return the hyper-parameters in a file's metadata.

    Args:
        metadata: The metadata, or the hyper-parameters themselves.
        source: The public code, for the error message.
        *needed: Required keys.

    Raises:
        FileError: If a key is missing.
    """
    found = metadata.get("hyper", metadata)
    missing = [key for key in needed if key not in found]
    if missing:
        raise FileError(
            f"{source!r} needs {', '.join(missing)}, which the tensors do not show; hyper has "
            f"{', '.join(sorted(found)) or 'nothing'}. Give hyper={{{', '.join(f'{key!r}: ...' for key in needed)}}}."
        )
    return dict(found)


def ending_in(tensors: Mapping[str, Tensor], ending: str) -> Tensor:
    """Return the first tensor whose name has a given ending.

    Args:
        tensors: Tensors under the authors' names.
        ending: The ending of the name.

    Raises:
        FileError: If there is none.
    """
    found = next((tensor for name, tensor in tensors.items() if name.endswith(ending)), None)
    if found is None:
        raise FileError(f"No tensor's name ends in {ending!r}; found {', '.join(sorted(tensors)[:3]) or 'nothing'}.")
    return found


def _width(tensors: Mapping[str, Tensor], ending: str) -> int:
    return int(ending_in(tensors, ending).shape[0])


def _adaptformer(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata, "adaptformer", "scale")
    return AdaptFormer(bottleneck=_width(tensors, "down_proj.weight"), scale=hyper["scale"])


def _biadaptformer(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata, "biadaptformer", "scale", "bits")
    bottleneck = _width(tensors, "adapter_down.weight")
    return AdaptFormer(
        bottleneck=bottleneck, scale=hyper["scale"], bias=False, bits=hyper["bits"], head_bits=_head_bits(hyper)
    )


def _bilora(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata, "bilora", "scale", "bits")
    rank = _width(tensors, "lora_q.adapter_down.weight")
    return LoRA(
        rank=rank,
        alpha=rank * hyper["scale"],
        dropout=0.1,
        dropout_place="hidden",
        bits=hyper["bits"],
        head_bits=_head_bits(hyper),
    )


def _head_bits(hyper: Mapping[str, Any]) -> int:
    return 1 if hyper.get("bihead") else 32


def _convpass(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata, "convpass", "scale")
    variant = "block" if any(".adapter_mlp." in name for name in tensors) else "attn"
    return Convpass(bottleneck=_width(tensors, "adapter_down.weight"), scale=hyper["scale"], variant=variant)


def _repadapter(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata, "repadapter", "scale")
    bottleneck = _width(tensors, "conv_A.weight")
    seen = next(tensor for name, tensor in tensors.items() if name.endswith("conv_B.weight")).shape[1]
    variant = "block" if any(".adapter_mlp." in name for name in tensors) else "attn"
    return RepAdapter(bottleneck=bottleneck, groups=bottleneck // seen, scale=hyper["scale"], variant=variant)


def _hydra(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata, "hydra", "scale")
    return Hydra(rank=_width(tensors, "hydra_proj_par.down_proj.weight"), scale=hyper["scale"])


def _hydra_names(plan: Plan) -> dict[str, str]:
    modules = {"attn.proj": "attn.hydra_proj", "mlp.fc2": "mlp.hydra_mlp"}
    short = {"parallel": "par", "sequential": "seq"}
    names = {}
    for item in plan:
        for tensor in item.shapes():
            branch, layer, *bias = tensor.split("_")
            module = f"{modules[item.site.role]}_{short[branch]}.{layer}_proj"
            names[f"{item.key}.{tensor}"] = f"{block_of(item.site)}.{module}.{'bias' if bias else 'weight'}"
    return names


_BOTTLENECK = layer_names(down="down_proj", up="up_proj")
_PETL = layer_names(down="adapter_down", conv="adapter_conv", up="adapter_up")
_REP = layer_names(down="conv_A", up="conv_B")

register_source(Source("adaptformer", _adaptformer, placed(lambda _, unit: "adaptmlp", _BOTTLENECK)))
register_source(Source("biadaptformer", _biadaptformer, placed(lambda _, unit: "adapter_mlp", _PETL)))
register_source(
    Source(
        "bilora",
        _bilora,
        placed(lambda site, _: f"attn.lora_{site.part}", {"A": "adapter_down.weight", "B": "adapter_up.weight"}),
    )
)
for _name in ("convpass", "convpass_attn"):
    register_source(Source(_name, _convpass, placed(lambda _, unit: unit.replace("convpass", "adapter"), _PETL)))
for _name in ("repadapter_repattn", "repadapter_repblock"):
    register_source(
        Source(
            _name,
            _repadapter,
            placed(lambda site, _: f"adapter_{site.role.split('.')[0]}", _REP),
            trailing=("conv_A.weight", "conv_B.weight"),
        )
    )
register_source(Source("hydra", _hydra, _hydra_names))
