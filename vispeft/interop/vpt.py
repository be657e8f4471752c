"""Tensor names in the public VPT code (KMnP/vpt at 4410440; facts only, its licence is not ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vispeft.core.method import Method
from vispeft.core.plan import Plan
from vispeft.core.sites import View
from vispeft.errors import FileError
from vispeft.interop.official import Source, register_source
from vispeft.methods.vpt import VPT

_NAMES = {
    "prompts": "prompt_embeddings",
    "deep": "deep_prompt_embeddings",
    "proj.weight": "prompt_proj.weight",
    "proj.bias": "prompt_proj.bias",
}


def _names(plan: Plan) -> dict[str, str]:
    return {f"{item.key}.{tensor}": _theirs(tensor) for item in plan for tensor in item.shapes()}


def _theirs(tensor: str) -> str:
    """Return the authors' name of a tensor; the prompts of Swin's stages end in the stage index."""
    return _NAMES.get(tensor) or tensor.replace("deep_", "deep_prompt_embeddings_")


def _method(hyper: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    if "prompt_embeddings" not in tensors:
        raise FileError(f"VPT's tensors hold 'prompt_embeddings'; found {', '.join(sorted(tensors)) or 'nothing'}.")
    _, number, stored = tensors["prompt_embeddings"].shape
    return VPT(
        num_tokens=number,
        deep=any(name.startswith("deep_prompt_embeddings") for name in tensors),
        project=stored if "prompt_proj.weight" in tensors else None,
        # The tensors do not show which rows are pooled; the public code's default is all.
        pool=(hyper.get("config") or {}).get("pool", "all"),
    )


for _source in ("vpt_shallow", "vpt_deep"):
    register_source(Source(_source, _method, _names, head="head"))
