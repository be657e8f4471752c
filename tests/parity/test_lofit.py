"""LoFiT against the values of its public code: both stages, the ranking of heads, and the picture of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vispeft
from tests.parity.beyond import DTYPES, Case, differs
from tests.parity.test_adapter_plus import planned
from tests.parity.test_parity import below
from vispeft.errors import ConfigError
from vispeft.methods.lofit import head_norms, top_heads
from vispeft.viz import head_map

TOLERANCE = {"float64": 1e-10, "float32": 2e-5}
"""README-E: relative to the largest entry of each tensor, outputs and gradients."""
HEADS = 3


def stacked(tensors: dict[str, Tensor], block: int, kind: str) -> Tensor:
    """Stack the authors' tensors of the heads of a block, (heads, width of a head)."""
    return torch.stack([tensors[f"blocks.{block}.attn.attn_{kind}.{head}"] for head in range(HEADS)])


def adapted(method: vispeft.Method, dtype: torch.dtype, **values: str):
    case = Case.of("lofit_vit")
    model = case.model(dtype)
    bank = vispeft.attach(model, method, verify=False)
    given = below(case.tensors, "adapter.")
    with torch.no_grad():
        for key, unit in bank.units().items():
            block = int(key.split(".")[1])
            for name, kind in values.items():
                own = stacked(given, block, kind)
                getattr(unit, name).copy_(own[list(unit.moved)] if name == "offsets" else own)
    return case, model, bank


@pytest.mark.parametrize("precision", DTYPES)
def test_scales_and_offsets_together(precision: str) -> None:
    case, model, bank = adapted(vispeft.LoFiT(stage="both"), DTYPES[precision], scales="A", offsets="v")
    out = model(case.tensors["input.images"].to(DTYPES[precision]))
    assert differs(out, case.tensors["out.logits"]) <= TOLERANCE[precision]
    (out * case.tensors["input.w"].to(out.dtype)).sum().backward()
    wanted = below(case.tensors, "grad.adapter.")
    for block, unit in enumerate(bank.units().values()):
        assert differs(unit.scales.grad, stacked(wanted, block, "A")) <= TOLERANCE[precision]
        assert differs(unit.offsets.grad, stacked(wanted, block, "v")) <= TOLERANCE[precision]
    images = case.tensors["input.images"].to(DTYPES[precision])
    bank.merge()
    assert differs(model(images), case.tensors["out.logits"]) <= TOLERANCE[precision]


@pytest.mark.parametrize("precision", DTYPES)
def test_the_stage_that_ranks_heads(precision: str, tmp_path) -> None:
    case, model, bank = adapted(vispeft.LoFiT(l1=5e-3), DTYPES[precision], scales="A")
    images = case.tensors["input.images"].to(DTYPES[precision])
    out = model(images)
    assert differs(out, case.tensors["out.stageA.logits"]) <= TOLERANCE[precision]
    term = bank.loss_terms((images, None), out)
    loss = (out * case.tensors["input.w"].to(out.dtype)).sum() + term
    assert differs(loss, case.tensors["out.stageA.loss"]) <= TOLERANCE[precision]
    loss.backward()
    wanted = below(case.tensors, "grad.stageA.")
    for block, unit in enumerate(bank.units().values()):
        assert differs(unit.scales.grad, stacked(wanted, block, "A")) <= TOLERANCE[precision]
    norms = head_norms(bank)
    assert differs(torch.stack(list(norms.values())), case.tensors["out.head_norms"]) <= TOLERANCE["float32"]
    assert [list(pair) for pair in top_heads(bank, 4)] == case.tensors["mid.top_heads"].tolist()
    assert head_map(norms, tmp_path / "heads.png").stat().st_size > 1000


@pytest.mark.parametrize("precision", DTYPES)
def test_offsets_of_the_best_heads(precision: str) -> None:
    heads = Case.of("lofit_vit").tensors["mid.top_heads"].tolist()
    case, model, bank = adapted(vispeft.LoFiT(stage="offsets", heads=heads), DTYPES[precision], offsets="v")
    out = model(case.tensors["input.images"].to(DTYPES[precision]))
    assert differs(out, case.tensors["out.stageV.logits"]) <= TOLERANCE[precision]
    assert bank.loss_terms((None, None), out) is None
    (out * case.tensors["input.w"].to(out.dtype)).sum().backward()
    wanted = below(case.tensors, "grad.stageV.")
    for key, unit in bank.units().items():
        for row, head in enumerate(unit.moved):
            gradient = wanted.pop(f"blocks.{key.split('.')[1]}.attn.attn_v.{head}")
            assert differs(unit.offsets.grad[row], gradient) <= TOLERANCE[precision]
    assert not wanted


def test_counts_and_refusals() -> None:
    assert planned("vit_base_patch16_224", vispeft.LoFiT()) == 9216
    heads = ((0, 0), (3, 1), (3, 2), (7, 11), (11, 5))
    assert planned("vit_base_patch16_224", vispeft.LoFiT(stage="offsets", heads=heads)) == 320
    for wrong in (
        {"heads": ((0, 0),)},
        {"stage": "offsets", "heads": ()},
        {"stage": "offsets", "heads": ((0, 0), (0, 0))},
    ):
        with pytest.raises(ConfigError, match="stage='offsets' alone"):
            vispeft.LoFiT(**wrong)
    with pytest.raises(ConfigError, match="l1"):
        vispeft.LoFiT(l1=-1.0)
    with pytest.raises(ConfigError, match="head 12 of block 0"):
        planned("vit_base_patch16_224", vispeft.LoFiT(stage="offsets", heads=((0, 12),)))
    _, _, bank = adapted(vispeft.LoFiT(), torch.float32, scales="A")
    with pytest.raises(ConfigError, match="there are 9"):
        top_heads(bank, 10)
    _, _, bank = adapted(vispeft.LoFiT(stage="offsets"), torch.float32, offsets="v")
    with pytest.raises(ConfigError, match="no scales"):
        top_heads(bank, 1)
