"""Adapter+ against the values of its public code: outputs, tokens behind blocks, gradients, and stochastic depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vispeft
from tests.parity.beyond import DTYPES, OUTPUT, Case, compare, differs
from tests.parity.test_parity import below, blocks_of
from vispeft.hosts.depth import DropPathHost
from vispeft.methods import adapter_plus

CASES = ["pre", "intermediate", "parallel", "pfeiffer", "houlsby", "post_norm_nobias", "post_linear"]


@pytest.mark.parametrize("precision", DTYPES)
def test_post(precision: str) -> None:
    case = Case.of("adapter_plus_vit")
    images = case.tensors["input.images"].to(DTYPES[precision])
    base = case.model(DTYPES[precision])(images)
    assert differs(base, case.tensors["out.base_logits"]) <= OUTPUT[precision]
    model, bank = case.adapted("adapter_plus", DTYPES[precision])
    for name, tokens in below(case.tensors, "mid.").items():
        assert differs(blocks_of(model, images)[name], tokens) <= OUTPUT[precision]
    compare(bank, "adapter_plus", model(images), case, precision)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str, precision: str) -> None:
    case = Case.of("adapter_plus_vit_cases", name, "adapter_plus_vit")
    model, bank = case.adapted("adapter_plus", DTYPES[precision])
    images = case.tensors["input.images"].to(DTYPES[precision])
    compare(bank, "adapter_plus", model(images), case, precision)


@pytest.mark.parametrize("precision", DTYPES)
def test_training_with_the_stored_masks(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.of("adapter_plus_vit_cases", "train_droppath", "adapter_plus_vit")
    model, bank = case.adapted("adapter_plus", DTYPES[precision])
    masks = below(case.tensors, "mask.")
    names = {module: name for name, module in model.named_modules()}
    dropping = iter([name for name in masks if name.endswith("drop_path_a")])
    rates = case.meta["config"]["vit_drop_path"]

    def dropped(x: Tensor, name: str, rate: float) -> Tensor:
        if name not in masks:
            assert rate == 0
            return x
        assert rate == pytest.approx(rates[name])
        return x * masks[name].view(-1, 1, 1).to(x) / (1 - rate)

    def backbone(self: Any, x: Tensor) -> Tensor:
        return dropped(x, names[self], float(self.acting.depth[0].rate) if self.acting.depth else 0.0)

    def unit(x: Tensor, rate: float, training: bool) -> Tensor:
        assert training
        return dropped(x, next(dropping), rate)

    monkeypatch.setattr(DropPathHost, "forward", backbone)
    monkeypatch.setattr(adapter_plus, "drop_path", unit)
    images = case.tensors["input.images"].to(DTYPES[precision])
    compare(bank, "adapter_plus", model.train()(images), case, precision)
    assert next(dropping, None) is None


@pytest.mark.parametrize(
    ("width", "counts"), [(1, (36876, 17676, 48152)), (8, (165984, 79584, 216768)), (16, (313536, 150336, 409472))]
)
def test_counts(width: int, counts: tuple[int, ...]) -> None:
    models = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224")
    assert tuple(planned(name, vispeft.AdapterPlus(bottleneck=width)) for name in models) == counts


def planned(name: str, method: vispeft.Method) -> int:
    """Count what a method would train, without weights, and compare it with its formula."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    plan = vispeft.plan(model, method)
    assert plan.trainable == method.parameter_count(vispeft.core.families.describe(model))
    return plan.trainable
