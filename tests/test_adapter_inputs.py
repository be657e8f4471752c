"""Adapters as inputs of one ONNX session: each equals its torch model; what has no such form is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vispeft
from vispeft.errors import ConfigError, FileError, SiteError
from vispeft.interop.adapter_inputs import AdapterInputs, BackboneWithInputs, adapter_inputs, read_inputs, write_inputs

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ADAPTERS = {
    "rank2": (vispeft.LoRA(rank=2, roles=("attn.qkv",)), 3),
    "slices": (vispeft.LoRA(rank=1, alpha=5, roles=("attn.q", "attn.v")), 5),
    "all": (vispeft.LoRA(rank=3, roles=LINEARS), 2),
    "fact": (vispeft.FacT(rank=2, dropout=0.0), 3),
    "ssf": (vispeft.SSF(), 4),
}


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    made = vispeft.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, **settings).eval()
    for name, (method, classes) in ADAPTERS.items():
        bank = vispeft.attach(made, method, name=name, verify=False)
        made.reset_classifier(classes)
        with torch.no_grad():
            for tensor in bank.named_tensors(name).values():
                tensor.add_(0.2 * torch.randn_like(tensor))
    return made


def scores(model: Any, name: str, batch: Tensor) -> Tensor:
    with torch.no_grad(), vispeft.AdapterBank.of(model).using(name):
        return model(batch)


def test_one_graph_serves_all(model: Any) -> None:
    bank = vispeft.AdapterBank.of(model)
    found = {name: adapter_inputs(bank, name) for name in ADAPTERS}
    layout = AdapterInputs.layout(list(found.values()))
    assert (layout.rank, layout.classes) == (max(adapter.rank for adapter in found.values()), 5)
    graph = BackboneWithInputs(model, layout)
    assert bank.names == list(ADAPTERS)  # the model is left as it is
    for name, adapter in found.items():
        out = graph(images(), adapter.padded(layout))
        wanted = scores(model, name, images())
        torch.testing.assert_close(out[:, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-5)
        assert not out[:, wanted.shape[1] :].any()
    with torch.no_grad(), bank.disabled():
        base = model.forward_head(model.forward_features(images()), pre_logits=True)
    neutral = layout.neutral()
    neutral["classifier.weight"][:, :5] = torch.eye(5)
    torch.testing.assert_close(graph(images(), neutral), base[:, :5], rtol=1e-5, atol=1e-6)


def test_files_of_inputs(model: Any, tmp_path: Path) -> None:
    adapter = adapter_inputs(vispeft.AdapterBank.of(model), "rank2")
    layout = AdapterInputs.layout([adapter], rank=4, classes=6)
    path = write_inputs(tmp_path / "rank2.safetensors", adapter, layout, {"preprocessing": {"size": [32, 32]}})
    arrays, notes = read_inputs(path, layout)
    assert {name: array.shape for name, array in arrays.items()} == layout.shapes()
    assert notes["classes"] == 3
    assert notes["preprocessing"] == {"size": [32, 32]}
    with pytest.raises(FileError, match=r"first blocks\.0\.attn\.qkv\.lora_a, \(4, 24\) in the file and \(3, 24\)"):
        read_inputs(path, AdapterInputs.layout([adapter], rank=3, classes=6))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FileError, match="cannot be read as the inputs of an adapter"):
        read_inputs(path)


def test_what_does_not_fit(model: Any) -> None:
    bank = vispeft.AdapterBank.of(model)
    small, large = adapter_inputs(bank, "rank2"), adapter_inputs(bank, "all")
    with pytest.raises(ConfigError, match="rank 2, and the inputs of the exported backbone have room for 1"):
        AdapterInputs.layout([small], rank=1)
    with pytest.raises(ConfigError, match="classes 3, and the inputs of the exported backbone have room for 2"):
        AdapterInputs.layout([small], classes=2)
    with pytest.raises(ConfigError, match=r"acts at blocks\.0\.attn\.proj, where the exported backbone has no inputs"):
        large.padded(AdapterInputs.layout([small], rank=3))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (vispeft.VPT(num_tokens=2), "kind 'tokens'"),
        (vispeft.AdaptFormer(bottleneck=2), "kind 'parallel'"),
        (vispeft.LoRA(rank=2, dora=True), "kind 'weight'"),
        (vispeft.BitFit(), "kind 'selection'"),
    ],
)
def test_methods_without_such_a_form(method: vispeft.Method, message: str) -> None:
    settings: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    made = vispeft.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, **settings)
    bank = vispeft.attach(made, method, verify=False)
    with pytest.raises(SiteError, match=message):
        adapter_inputs(bank)


@pytest.mark.slow
def test_one_session_serves_all(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from vispeft.interop.export import export_onnx, onnx_session

    bank = vispeft.AdapterBank.of(model)
    found = {name: adapter_inputs(bank, name) for name in ADAPTERS}
    layout = AdapterInputs.layout(list(found.values()))
    path = export_onnx(BackboneWithInputs(model, layout), images(), tmp_path / "base.onnx", adapter=layout.neutral())
    session = onnx_session(path)
    assert [given.name for given in session.get_inputs()] == ["images", *layout.shapes()]
    for name, adapter in found.items():
        file = write_inputs(tmp_path / f"{name}.safetensors", adapter, layout, {})
        for batch in (images(1), images(3)):
            (out,) = session.run(None, {"images": batch.numpy(), **read_inputs(file, layout)[0]})
            wanted = scores(model, name, batch)
            error = (torch.from_numpy(out)[:, : wanted.shape[1]] - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-4
