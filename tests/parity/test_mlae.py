"""MLAE against the values of its public layer: outputs, gradients, expert masks and merged weights."""

from __future__ import annotations

import pytest
import torch

import vispeft
from tests.parity.beyond import DTYPES, OUTPUT, Case, compare, differs
from tests.parity.test_adapter_plus import planned
from tests.parity.test_parity import below
from vispeft.methods.mlae import ExpertUnit


@pytest.mark.parametrize("precision", DTYPES)
def test_evaluation_and_merge(precision: str) -> None:
    case = Case.of("mlae_vit")
    model, bank = case.adapted("mlae", DTYPES[precision])
    images = case.tensors["input.images"].to(DTYPES[precision])
    compare(bank, "mlae", model(images), case, precision)
    bank.merge()
    for name, weight in below(case.tensors, "merged.").items():
        assert differs(model.get_parameter(name), weight) <= OUTPUT[precision], name
    assert differs(model(images), case.tensors["out.merged_logits"]) <= OUTPUT[precision]


@pytest.mark.parametrize("precision", DTYPES)
def test_training_with_the_stored_masks(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.of("mlae_vit")
    model, bank = case.adapted("mlae", DTYPES[precision])
    masks = below(case.tensors, "train.mask.")
    places = {unit: key.partition("/")[0] for key, unit in bank.units().items()}
    share = case.meta["config"]["expert_dropout"]

    def drawn(unit: ExpertUnit) -> torch.Tensor:
        assert unit.training
        assert unit.method.expert_dropout == share
        return unit.coefficients * masks[places[unit]].to(unit.coefficients) / (1 - share)

    monkeypatch.setattr(ExpertUnit, "drawn", drawn)
    images = case.tensors["input.images"].to(DTYPES[precision])
    compare(bank, "mlae", model.train()(images), case, precision, "train.")


def test_whole_experts_are_dropped_and_the_others_scaled_up() -> None:
    model = vispeft.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, embed_dim=24, num_heads=2)
    bank = vispeft.attach(model, vispeft.MLAE(rank=200, alpha=2.0, expert_dropout=0.25), verify=False)
    unit = next(iter(bank.units().values()))
    assert torch.equal(unit.eval().drawn(), unit.coefficients)
    drawn = unit.train().drawn()
    kept = drawn[drawn != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 2.0 / 0.75))
    assert 110 < len(kept) < 185


def test_counts() -> None:
    models = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224")
    assert [planned(name, vispeft.MLAE()) for name in models] == [1180032, 565632, 1540864]
    only = vispeft.MLAE(roles=["attn.qkv"])
    assert [planned(name, only) for name in models] == [295008, 141408, 385216]
