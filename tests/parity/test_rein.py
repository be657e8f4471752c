"""Rein against the values of its public module: maps, queries and all gradients."""

from __future__ import annotations

import pytest
import torch

import vispeft
from tests.parity.beyond import DTYPES, GRADIENT, OUTPUT, Case, differs
from tests.parity.test_adapter_plus import planned
from tests.parity.test_parity import below, blocks_of
from vispeft.errors import ConfigError, SiteError
from vispeft.interop import to_official
from vispeft.methods.rein import rein_queries


@pytest.mark.parametrize("precision", DTYPES)
def test_maps_queries_and_gradients(precision: str) -> None:
    dtype, case = DTYPES[precision], Case.of("rein_vit")
    images = case.tensors["input.images"].to(dtype)
    assert differs(case.model(dtype).forward_features(images), case.tensors["out.base_tokens"]) <= OUTPUT[precision]
    model, bank = case.adapted("rein", dtype)
    for name, tokens in below(case.tensors, "mid.").items():
        assert differs(blocks_of(model, images)[name], tokens) <= OUTPUT[precision], name
    blocks = case.meta["config"]["out_indices"]
    maps = model.forward_intermediates(images, indices=blocks, intermediates_only=True)
    found = {f"map{block}": level for block, level in zip(blocks, maps, strict=True)} | {"queries": rein_queries(bank)}
    weights = below(case.tensors, "input.w.")
    assert weights.keys() == found.keys()
    for name, value in found.items():
        assert differs(value, case.tensors[f"out.{name}"]) <= OUTPUT[precision], name
    torch.stack([(value * weights[name].to(dtype)).sum() for name, value in found.items()]).sum().backward()
    gradients, wanted = to_official(bank, "rein", grad=True), below(case.tensors, "grad.adapter.")
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert differs(gradients[name], gradient) <= GRADIENT[precision], name


def test_counts() -> None:
    assert planned("vit_base_patch16_224", vispeft.Rein(query=256)) == 1741569
    assert planned("vit_large_patch14_dinov2", vispeft.Rein(query=256)) == 2990081


def test_refusals() -> None:
    swin = vispeft.create_model("swin_tiny_patch4_window7_224", pretrained=False, depths=(1, 1), num_heads=(1, 2))
    with pytest.raises(SiteError, match="no stated form"):
        vispeft.attach(swin, vispeft.Rein())
    with pytest.raises(ConfigError, match="no value"):
        vispeft.Rein(num_tokens=1)
    with pytest.raises(ConfigError, match="query=256"):
        rein_queries(vispeft.attach(swin, vispeft.LoRA(rank=1), verify=False))


def test_full_tokens_and_plain_products_change_the_patches_alone() -> None:
    torch.manual_seed(0)
    model = vispeft.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1, embed_dim=24, num_heads=2
    )
    bank = vispeft.attach(model.eval(), vispeft.Rein(num_tokens=3, rank=None, softmax=False), verify=False)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for name, tensor in bank.named_tensors().items():
            if name.endswith("scale"):
                tensor.fill_(1.0)
        moved = blocks_of(model, images)["block0"]
        with bank.disabled():
            plain = blocks_of(model, images)["block0"]
    assert torch.equal(moved[:, :1], plain[:, :1])
    assert not torch.allclose(moved[:, 1:], plain[:, 1:])
