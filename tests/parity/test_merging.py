"""Merges of adapters (reference part E): what peft computes from three changes, by our functions.

Combinations of factors (``linear``, ``ties``, ``magnitude_prune`` of peft's LoRA) are not built: an average of factors
is not the average of the changes. One test measures by how much.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.beyond import DTYPES, OUTPUT, differs, file
from tests.parity.test_parity import FILES
from vispeft.compose.arithmetic import dare, keep_largest, ties, weighted_sum
from vispeft.compose.low_rank import Term, compress, concatenate, decompose

STEMS = {path.stem for path in FILES} | {"merge_ties_dare", "merge_lora_weighted", "merge_lora_weighted_ranks"}
LORA = sorted(stem for stem in STEMS if stem.startswith("merge_lora"))
CHANGES = sorted(stem for stem in STEMS if stem.startswith("merge_ties"))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", CHANGES)
def test_ties_and_dare(name: str, precision: str) -> None:
    meta, tensors = file(name)
    config, dtype, limit = meta["config"], DTYPES[precision], OUTPUT[precision]
    changes = [tensors[f"input.delta.{k}"].to(dtype) for k in range(len(config["weights"]))]
    weights = config["weights"]
    found: dict[str, Tensor] = {"out.task_arithmetic": weighted_sum(changes, weights)}
    for density in config["densities"]:
        trimmed = [keep_largest(change, density) for change in changes]
        found |= {f"mid.trimmed.{density}.{k}": value for k, value in enumerate(trimmed)}
        found[f"out.magnitude_prune.{density}"] = weighted_sum(trimmed, weights)
        for sign in config["sign_methods"]:
            found[f"out.ties.{sign}.{density}"] = ties(changes, weights, density, sign)
    density = config["dare_density"]
    for seed in config["seeds"]:
        masks = [tensors[f"input.mask.seed{seed}.{k}"] for k in range(len(changes))]
        found[f"out.dare_linear.seed{seed}"] = dare(changes, weights, density, masks)
        for sign in config["sign_methods"]:
            found[f"out.dare_ties_{sign}.seed{seed}"] = dare(changes, weights, density, masks, sign)
    assert set(found) == {key for key in tensors if key.startswith(("out.", "mid."))}
    for key, value in found.items():
        assert differs(value, tensors[key]) <= limit, key


def terms(meta: dict[str, Any], tensors: dict[str, Tensor], layer: str, dtype: torch.dtype) -> list[Term]:
    """Read the three adapters of a layer, the multiplier ``alpha / rank`` in B."""
    config = meta["config"]
    found = []
    for k, (rank, alpha) in enumerate(zip(config["ranks"], config["alphas"], strict=True)):
        a, b = (tensors[f"adapter.{layer}.lora_{side}.a{k}"].to(dtype) for side in "AB")
        found.append(Term(a, alpha / rank * b))
    return found


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", LORA)
def test_sums_of_low_rank_terms(name: str, precision: str) -> None:
    meta, tensors = file(name)
    config, dtype, limit = meta["config"], DTYPES[precision], OUTPUT[precision]
    compared = 0
    for layer in config["layers"]:
        own, weights = terms(meta, tensors, layer, dtype), config["weights"]
        for k, term in enumerate(own):
            assert differs(term.product(), tensors[f"mid.{layer}.delta.a{k}"]) <= limit
        total = concatenate(own, weights)
        for key, combination in config["combinations"].items():
            kind, rank = combination["combination_type"], combination["rank"]
            wanted = tensors[f"out.{layer}.delta.{key}"]
            if kind == "cat":
                assert total.rank == rank
                found = total.product()
            elif kind == "svd":
                found = compress(total, rank)[0].product()
                assert differs(decompose(total.product(), rank)[0].product(), wanted) <= limit
            elif kind == "ties_svd":
                elected = ties([term.product() for term in own], weights, combination["density"])
                found = decompose(elected, rank)[0].product()
            else:  # of factors: far from the sum of the changes
                assert differs(total.product(), wanted) > 0.1
                continue
            assert differs(found, wanted) <= limit, (layer, key)
            compared += 1
    assert compared >= 2 * len(config["layers"])
