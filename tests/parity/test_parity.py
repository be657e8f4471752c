"""Outputs and gradients against reference values computed with the authors' public code.

Every number comes from the files. ``VISPEFT_REFERENCE_DIR`` names another directory of the same format; a file there
that no source claims, or a file in which nothing was compared, is a failure.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import vispeft
from vispeft.hosts.reading import taken_apart
from vispeft.interop import list_sources, load_official, to_official

HERE = Path(__file__).parent / "reference"
FOLDER = Path(os.environ.get("VISPEFT_REFERENCE_DIR", HERE))
FILES = sorted(FOLDER.glob("*.safetensors"))
PRECISIONS = {torch.float64: "float64", torch.float32: "float32"}


def tolerance(precision: str) -> float:
    """Read the tolerance, relative to a tensor's largest entry, out of the README beside the files."""
    readme = next(p for p in (FOLDER / "README-A.md", HERE / "README-A.md") if p.is_file())
    sentence = re.search(r"Suggested test tolerances: ([^\n]*)", readme.read_text())
    assert sentence, f"{readme} states no tolerances"
    found = re.search(rf"{precision} ([0-9.e-]+)", sentence.group(1))
    assert found, f"{readme} states no tolerance for {precision}"
    return float(found.group(1))


def source_of(path: Path) -> str | None:
    """Find the source whose name the file's name starts with."""
    fitting = [source for source in list_sources() if path.stem.startswith(source)]
    return max(fitting, key=len) if fitting else None


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {key: decode(value) for key, value in file.metadata().items()}, tensors


def decode(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def backbone(meta: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    module, _, name = meta["timm_class"].rpartition(".")
    model = getattr(importlib.import_module(module), name)(**meta["timm_kwargs"]).eval()
    model.load_state_dict(below(tensors, "backbone."))
    return model.to(dtype)


def assert_close(name: str, found: Tensor, wanted: Tensor, precision: str) -> None:
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error <= tolerance(precision), f"{name}: relative error {error:.1e} in {precision}"


def compare(model: nn.Module, tensors: dict[str, Tensor], group: str, dtype: torch.dtype) -> int:
    """Compare features and logits with the tensors of one group (``out.``, ``out_img_pool.``)."""
    images, precision = tensors["input.images"].to(dtype), PRECISIONS[dtype]
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    found = {"features": features, "logits": model(images)}
    for queries in model.answering():
        tokens = model.forward_features(images)
        found["query_outputs"] = torch.stack(taken_apart(tokens, queries, model.num_prefix_tokens)[1])
    wanted = {key: t for key, t in below(tensors, group).items() if key in found}
    for key, value in wanted.items():
        assert_close(f"{group}{key}", found[key], value, precision)
    return len(wanted)


def part_of(stem: str) -> str:
    """Find the part whose README lists a file: A, unless another one does."""
    for part in ("E", "F"):
        readme = next((p for p in (FOLDER / f"README-{part}.md", HERE / f"README-{part}.md") if p.is_file()), None)
        table = "" if readme is None else "\n".join(re.findall(r"^\| ([^|]*)\|", readme.read_text(), re.MULTILINE))
        if stem in re.findall(r"\w+", table):
            return part
    return "A"


WITH_FEATURES = [path for path in FILES if "input.images" in read(path)[1] and part_of(path.stem) == "A"]
"""Files of part A, which hold features beside logits; those of other parts belong to other test files."""


POOLS = {"": "all", "_img_pool": "patches", "_prompt_pool": "prompts"}
"""What the groups of a file say about average pooling, and what our field calls it."""


def blocks_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Collect what leaves each block."""
    found: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, i=i: found.update({f"block{i}": out}))
        for i, block in enumerate(getattr(model, "blocks", ()))
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("dtype", list(PRECISIONS), ids=list(PRECISIONS.values()))
@pytest.mark.parametrize("path", WITH_FEATURES, ids=[path.stem for path in WITH_FEATURES])
def test_outputs_and_gradients(path: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    source = source_of(path)
    assert source is not None, f"no source claims {path.name}"
    meta, tensors = read(path)
    images, precision = tensors["input.images"].to(dtype), PRECISIONS[dtype]
    compared = 0
    if "out.base_logits" in tensors:
        base = backbone(meta, tensors, dtype)
        assert_close("base_logits", base(images), tensors["out.base_logits"], precision)
        compared += 1
    for suffix, pool in POOLS.items():
        if f"out{suffix}.logits" in tensors:
            variant = {**meta, "config": {**meta["config"], "pool": pool}} if suffix else meta
            compared += compare_variant(source, variant, tensors, suffix, dtype, tmp_path)
    assert compared > 2, f"nothing was compared in {path.name}"


def compare_variant(
    source: str, meta: dict[str, Any], tensors: dict[str, Tensor], suffix: str, dtype: torch.dtype, folder: Path
) -> int:
    """Compare one variant's outputs, tokens and gradients, then save and load it."""
    images, precision = tensors["input.images"].to(dtype), PRECISIONS[dtype]
    adapter = below(tensors, "adapter.")
    model = backbone(meta, tensors, dtype)
    bank = load_official(model, source, adapter, meta)
    compared = compare(model, tensors, f"out{suffix}.", dtype)
    tokens = below(tensors, "mid.")
    found = blocks_of(model, images) if tokens else {}
    for name, wanted in tokens.items():
        assert_close(f"mid.{name}", found[name], wanted, precision)
    (model(images) * tensors["input.w"].to(dtype)).sum().backward()
    gradients = to_official(bank, source, grad=True)
    wanted_gradients = below(tensors, f"grad{suffix}.")
    for name, wanted in wanted_gradients.items():
        assert_close(f"grad{suffix}.{name}", gradients[name], wanted, precision)
    assert set(wanted_gradients) >= set(adapter), "a trained tensor's gradient was not compared"
    values = to_official(bank, source)
    assert all(torch.equal(values[name], tensor.to(dtype)) for name, tensor in adapter.items())
    bank.save(folder / f"adapter{suffix}")
    again = backbone(meta, tensors, dtype)
    vispeft.load(again, folder / f"adapter{suffix}")
    assert torch.equal(again(images), model(images))
    return compared + len(tokens) + len(wanted_gradients)
