"""DyT against its public code: passes in evaluation and training, with and without skipping, and all gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import Cell
from tests.parity.beyond import DTYPES, GRADIENT, OUTPUT, Case, differs
from tests.parity.test_adapter_plus import planned
from tests.parity.test_parity import below
from vispeft.adapters.bank import AdapterBank
from vispeft.errors import ConfigError
from vispeft.interop import to_official
from vispeft.methods.dyt import DyTUnit


def units_of(bank: AdapterBank) -> list[DyTUnit]:
    return [unit for unit in bank.units().values() if isinstance(unit, DyTUnit)]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("prefix", ["", "complete.", "train."])
def test_passes_and_gradients(prefix: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, case = DTYPES[precision], Case.of("dyt_vit")
    model, bank = case.adapted("dyt", dtype)
    for index, unit in enumerate(units_of(bank) if prefix == "train." else []):
        noise = case.tensors[f"train.noise.block{index}"].to(dtype)
        monkeypatch.setattr(unit.train(), "noise", lambda logits, noise=noise: noise)
    result = model.run(case.tensors["input.images"].to(dtype), whole=prefix == "complete.")
    out = model.forward_head(model.features(result))
    chosen = torch.stack([result.passed[block] for block in range(3)], dim=1)
    assert torch.equal(chosen.detach().double(), case.tensors[f"{prefix}out.token_select"].double())
    assert differs(out, case.tensors[f"{prefix}out.logits"]) <= OUTPUT[precision]
    (out * case.tensors["input.w"].to(dtype)).sum().backward()
    for unit in units_of(bank) if prefix == "complete." else []:
        assert unit.gate.grad is None
        unit.gate.grad, unit.gate_bias.grad = torch.zeros_like(unit.gate), torch.zeros_like(unit.gate_bias)
    found, wanted = to_official(bank, "dyt", grad=True), below(case.tensors, f"{prefix}grad.adapter.")
    assert wanted
    for name, tensor in found.items():
        if name in wanted and wanted[name].any():
            assert differs(tensor, wanted[name]) <= GRADIENT[precision], name
        elif not name.startswith("head"):
            assert not tensor.any(), name


def test_logits_of_the_dispatchers() -> None:
    case = Case.of("dyt_vit")
    model, bank = case.adapted("dyt", torch.float64)
    seen: list[Tensor] = []
    for unit in units_of(bank):
        unit.passes = record(unit, seen)  # type: ignore[method-assign]
    with torch.no_grad():
        model(case.tensors["input.images"].double())
    found = torch.stack(seen, dim=1)
    assert differs(found, case.tensors["out.token_logits"]) <= OUTPUT["float64"]


def record(unit: DyTUnit, seen: list[Tensor]):  # type: ignore[no-untyped-def]
    passes = unit.passes

    def noted(x: Tensor, prefix: int) -> Tensor:
        seen.append(F.linear(x[:, prefix:], unit.gate, unit.gate_bias))
        return passes(x, prefix)

    return noted


def test_counts() -> None:
    names = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224")
    for bottleneck, counts in {64: (1198860, 574860, 1565720), 8: (165996, 79596, 216792)}.items():
        method = vispeft.DyT(bottleneck=bottleneck)
        assert tuple(planned(name, method) for name in names) == counts


@pytest.mark.parametrize("backbone", ["vit_reg_ls", "swin"])
def test_skipped_tokens_are_not_computed(backbone: str) -> None:
    cell = Cell("dyt", backbone)
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    rows: list[int] = []
    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    for mlp in mlps:
        mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    wanted = model(images)  # with gradients: all tokens, multiplied
    most, rows[:] = list(rows), []
    with torch.no_grad():
        found, result = model(images), model.run(images)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    prefix = bank.view.num_prefix_tokens
    chosen = [int(passed.sum()) + 2 * prefix for passed in result.passed.values()]
    assert rows == [*chosen, *chosen]
    assert sum(chosen) < sum(most)
    for unit in units_of(bank):
        unit.gate_bias.data.fill_(-1e4)
    with torch.no_grad():
        assert model(images).isfinite().all()


def test_losses() -> None:
    cell = Cell("dyt", "vit")
    model, images, labels = cell.model().train(), cell.images(3), torch.tensor([0, 1, 4])
    bank = vispeft.attach(model, vispeft.DyT(bottleneck=4, dropout=0.0, target=0.7), verify=False)
    state = torch.get_rng_state()
    result = model.run(images)
    output = model.forward_head(model.features(result))
    term = bank.loss_terms((images, labels), output, result)
    share = torch.stack([passed.mean() for passed in result.passed.values()]).mean()
    with torch.no_grad():
        whole = model.forward_head(model.features(model.run(images, whole=True)))
    distance = (whole.softmax(1) * (whole.log_softmax(1) - output.log_softmax(1))).sum(1).mean()
    wanted = 2 * (share - 0.7) ** 2 + F.cross_entropy(whole, labels) + distance
    torch.testing.assert_close(term, wanted)
    torch.set_rng_state(state)
    assert torch.equal(model(images), output)
    term.backward()
    assert all(unit.gate.grad.any() for unit in units_of(bank))
    soft = torch.full((3, 5), 0.2)
    torch.testing.assert_close(bank.loss_terms((images, soft), output, result).isfinite(), torch.tensor(True))
    for targets in (torch.rand(3), torch.ones(3, 5), {"depth": soft}):
        with pytest.raises(ConfigError, match="complete=False"):
            bank.loss_terms((images, targets), output, result)
    with pytest.raises(ConfigError, match="share above 0"):
        vispeft.DyT(target=0.0)


def test_checkpointed_passes_give_the_same_gradients() -> None:
    grads = []
    for checkpoints in (False, True):
        cell = Cell("dyt", "vit")
        model: nn.Module = cell.model().train()
        bank = cell.attach(model)
        model.set_grad_checkpointing(checkpoints)
        torch.manual_seed(4)
        result = model.run(cell.images())
        model.forward_head(model.features(result)).sum().backward()
        grads.append([copy.copy(tensor.grad) for tensor in bank.named_tensors().values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
