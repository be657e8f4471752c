"""Tensor names in the public VQT code (andytu28/VQT at 9bca87e, BSD-3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vispeft.core.method import Method
from vispeft.core.plan import Plan
from vispeft.core.sites import View
from vispeft.errors import FileError
from vispeft.interop.official import Source, register_source
from vispeft.methods.vqt import VQT

_NAMES = {"queries": "query_prompt_embeddings", "weights": "combine_params"}


def _names(plan: Plan) -> dict[str, str]:
    return {f"{item.key}.{tensor}": _NAMES[tensor] for item in plan for tensor in item.shapes()}


def _method(hyper: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    if "query_prompt_embeddings" not in tensors:
        found = ", ".join(sorted(tensors)) or "nothing"
        raise FileError(f"VQT's tensors hold 'query_prompt_embeddings'; found {found}.")
    config = hyper.get("config") or {}
    # Settings that the tensors do not show get the public code's defaults.
    aggregate = "weighted" if "combine_params" in tensors else config.get("aggregate", "concat")
    return VQT(
        num_queries=tensors["query_prompt_embeddings"].shape[1],
        aggregate=aggregate,
        normalize=config.get("normalize_feats", True),
    )


register_source(Source("vqt", _method, _names, head="head"))
