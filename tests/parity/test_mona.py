"""Mona against the values of its public code: the module alone, and a Swin with two adapters in each block."""

from __future__ import annotations

import pytest
import torch

import vispeft
from tests.parity.beyond import DTYPES, GRADIENT, OUTPUT, Case, compare, differs, file
from tests.parity.test_adapter_plus import planned
from tests.parity.test_parity import below
from vispeft.interop.beyond import MONA
from vispeft.methods.mona import MonaUnit


@pytest.mark.parametrize("precision", DTYPES)
def test_module(precision: str) -> None:
    dtype = DTYPES[precision]
    meta, tensors = file("mona_module")
    unit = MonaUnit(vispeft.Mona(), tensors["input.x"].shape[-1], "mlp").to(dtype).eval()
    with torch.no_grad():
        for name, parameter in unit.named_parameters():
            parameter.copy_(tensors[f"adapter.{MONA[name]}"])
    x = tensors["input.x"].to(dtype, copy=True).requires_grad_()
    image = x.unflatten(1, meta["config"]["hw"])
    out = (image + unit.branch(image, None, 0)).flatten(1, 2)
    assert differs(out, tensors["out.y"]) <= OUTPUT[precision]
    (out * tensors["input.w"].to(dtype)).sum().backward()
    assert differs(x.grad, tensors["grad.input.x"]) <= GRADIENT[precision]
    assert len(below(tensors, "grad.adapter.")) == len(list(unit.parameters()))
    for name, parameter in unit.named_parameters():
        assert differs(parameter.grad, tensors[f"grad.adapter.{MONA[name]}"]) <= GRADIENT[precision], name


@pytest.mark.parametrize("precision", DTYPES)
def test_swin(precision: str) -> None:
    case = Case.of("mona_swin")
    model, bank = case.adapted("mona", DTYPES[precision])
    images = case.tensors["input.images"].to(DTYPES[precision])
    blocks = {
        f"layers{stage}.block{index}": block
        for stage, layer in enumerate(model.layers)
        for index, block in enumerate(layer.blocks)
    }
    found = {}
    for name, block in blocks.items():
        block.register_forward_hook(lambda _m, _a, out, name=name: found.update({name: out.flatten(1, 2)}))
    out = model(images)
    wanted = below(case.tensors, "mid.")
    assert wanted
    for name, tokens in wanted.items():
        assert differs(found[name], tokens) <= OUTPUT[precision], name
    compare(bank, "mona", out, case, precision)


def test_prefix_tokens_are_images_of_one_pixel() -> None:
    unit = MonaUnit(vispeft.Mona(bottleneck=4), 6, "mlp").eval()
    with torch.no_grad():
        unit.reset(torch.Generator().manual_seed(0))
        tokens = torch.randn(2, 2 + 12, 6)
        out = unit.branch(tokens, (3, 4), 2)
        alone = unit.branch(tokens[:, :2].reshape(4, 1, 1, 6), None, 0).reshape(2, 2, 6)
        image = unit.branch(tokens[:, 2:].unflatten(1, (3, 4)), None, 0).flatten(1, 2)
    torch.testing.assert_close(out, torch.cat([alone, image], 1))


def test_counts() -> None:
    models = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224")
    assert [planned(name, vispeft.Mona()) for name in models] == [2684928, 1408128, 3667456]
