"""Whole networks of reference part B: outputs, gradients, codes, files and merges of the authors' public code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vispeft
from tests.parity.test_parity import FILES, below, read, source_of
from vispeft.interop import load_official, to_official

NETWORKS = [path for path in FILES if "_vit" in path.stem and "output" in read(path)[1]]
OUTPUT, GRADIENT, MERGED = 2e-5, 1e-4, 5e-5  # README-B, "Suggested pass marks"


def network(meta: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    weights = below(tensors, "backbone.")
    classes = {} if "head.weight" in weights else {"num_classes": 0}
    model = VisionTransformer(**{**meta["timm_vit_config"], **classes}).eval()
    model.load_state_dict(weights)
    return model


def adapted(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module, Any]:
    meta, tensors = read(path)
    model = network(meta, tensors)
    if "head.weight" in below(tensors, "backbone."):
        assert (model(tensors["input"]) - tensors["backbone_output"]).abs().max() <= OUTPUT
    bank = load_official(model, source_of(path), below(tensors, "adapter."), meta)
    return meta, tensors, model, bank


@pytest.mark.parametrize("path", NETWORKS, ids=[path.stem for path in NETWORKS])
def test_outputs_and_gradients(path: Path) -> None:
    _, tensors, model, bank = adapted(path)
    out = model(tensors["input"])
    assert (out - tensors["output"]).abs().max() <= OUTPUT
    loss = (out * tensors["loss_weight"]).sum()
    loss.backward()
    found = to_official(bank, source_of(path), grad=True)
    wanted = {**below(tensors, "grad."), **below(tensors, "grad_head.")}
    assert set(below(tensors, "adapter.")) <= set(wanted)
    for name, gradient in wanted.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error <= GRADIENT, f"{name}: {error:.1e}"
    values = to_official(bank, source_of(path))
    for name, tensor in below(tensors, "adapter.").items():
        assert torch.equal(values[name], tensor), name


@pytest.mark.parametrize("path", NETWORKS, ids=[path.stem for path in NETWORKS])
def test_a_saved_adapter_gives_the_same_outputs(path: Path, tmp_path: Path) -> None:
    meta, tensors, model, bank = adapted(path)
    bank.save(tmp_path / "a")
    again = network(meta, tensors)
    loaded = vispeft.load(again, tmp_path / "a")
    assert torch.equal(again(tensors["input"]), model(tensors["input"]))
    loaded.save(tmp_path / "b")
    for name in ("adapter.safetensors", "head.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    if "reloaded_output" in tensors:
        assert (again(tensors["input"]) - tensors["reloaded_output"]).abs().max() <= OUTPUT


CODED = [path for path in NETWORKS if any(key.startswith("code_index.") for key in read(path)[1])]


@pytest.mark.parametrize("path", CODED, ids=[path.stem for path in CODED])
def test_packed_bytes_are_the_authors(path: Path, tmp_path: Path) -> None:
    meta, tensors, _, bank = adapted(path)
    bank.save(tmp_path)
    stored = {**load_file(tmp_path / "adapter.safetensors"), **load_file(tmp_path / "head.safetensors")}
    official = bytes(tensors["official_bin_bytes"].tolist())
    ours = {theirs: own for own, theirs in _names(bank, source_of(path)).items()}
    content = b"".join(bytes(stored[ours[f"{module}.weight"]].tolist()) for module in meta["bin_order"])
    if "grad_head.head.weight" in tensors:  # a float head follows, weight then bias
        head = [bank.state_dict()[f"head/{name}"] for name in ("weight", "bias")]
        content += b"".join(t.numpy().tobytes() for t in head)
    assert content == official


def _names(bank: Any, source: str) -> dict[str, str]:
    from vispeft.interop.official import find_source, official_names

    return official_names(find_source(source), bank, bank.active[0])


MERGING = [path for path in NETWORKS if "merged_output" in read(path)[1]]


@pytest.mark.parametrize("path", MERGING, ids=[path.stem for path in MERGING])
def test_merged_weights_are_the_authors(path: Path) -> None:
    _, tensors, model, bank = adapted(path)
    bank.merge()
    weights = model.state_dict()
    for name, wanted in below(tensors, "merged.").items():
        assert (weights[name] - wanted).abs().max() <= MERGED, name
    assert (model(tensors["input"]) - tensors["merged_output"]).abs().max() <= MERGED
