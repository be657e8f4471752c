"""The adapters of Polyhistor's comparison, each against its formula written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.core.units import Unit
from vispeft.errors import ConfigError

BESIDE = {"reduction": 2, "parallel": True, "layernorm": "out", "activation": "swish"}
LINEARS = {
    "plain": vispeft.Adapter(roles=("attn", "mlp"), start="small", **BESIDE),
    "low rank": vispeft.Compacter(phm_dim=None, rank=2, **BESIDE),
    "sums of Kronecker products": vispeft.Compacter(phm_dim=2, rank=None, shared_rule=False, **BESIDE),
    "shared rule": vispeft.Compacter(phm_dim=2, rank=1, rule_start=0.5, **BESIDE),
}


def matrix(unit: Unit, layer: str) -> Tensor:
    """Write out the matrix (in, out) of a layer."""
    own = dict(unit.named_parameters())
    if layer in own and own[layer].ndim == 2:
        return own[layer].t()
    blocks = own[layer] if layer in own else own[f"{layer}_left"] @ own[f"{layer}_right"]
    if unit.lender is None and f"{layer}_rule" not in own:
        return blocks[0]
    rule = own.get(f"{layer}_rule", getattr(unit.lender, "rule", None))
    return sum(torch.kron(a, w) for a, w in zip(rule, blocks, strict=True))


@pytest.mark.parametrize("method", LINEARS.values(), ids=LINEARS.keys())
def test_parallel_adapters(method: vispeft.Method) -> None:
    """``y = LN(U swish(D x + d) + u)`` beside both branches, read from the residual stream."""
    model, images = Cell("lora", "vit", short=True).model(), Cell("lora", "vit").images()
    seen: dict[str, Tensor] = {}
    block = model.blocks[0]
    block.norm2.register_forward_hook(lambda _m, args, _o: seen.update(between=args[0]))
    bank = vispeft.attach(model, method, verify=False)
    move(bank, "default")
    entered = []
    block.register_forward_hook(lambda _m, args, out: entered.extend([args[0], out]))
    with torch.no_grad():
        model(images)
        units = {key.partition("/")[2]: unit for key, unit in bank.units().items()}
        name = method.name
        x = entered[0]
        between = x + block.attn(block.norm1(x)) + formula(units[f"{name}_attn"], x)
        assert torch.allclose(seen["between"], between, atol=1e-5)
        out = between + block.mlp(block.norm2(between)) + formula(units[name], between)
    assert torch.allclose(entered[1], out, atol=1e-5)
    assert bank.report().trainable == method.parameter_count(bank.view)


def formula(unit: Unit, x: Tensor) -> Tensor:
    own = dict(unit.named_parameters())
    hidden = F.silu(x @ matrix(unit, "down") + own["down_bias"])
    out = hidden @ matrix(unit, "up") + own["up_bias"]
    return F.layer_norm(out, out.shape[-1:], own["norm_weight"], own["norm_bias"])


@torch.no_grad()
def test_prompts_in_windows_are_tokens_whose_outputs_are_dropped() -> None:
    model, images = Cell("lora", "swin").model(), Cell("lora", "swin").images()
    bank = vispeft.attach(model, vispeft.VPTWindow(num_tokens=3), verify=False)
    move(bank, "default")
    block = model.layers[0].blocks[1]  # its windows are shifted
    assert block.attn_mask is not None
    attn, prompts = block.attn, dict(bank.named_tensors())["layers.0.blocks.1.attn/vpt_window.prompts"]
    windows = torch.randn(2 * len(block.attn_mask), 16, 8, generator=torch.Generator().manual_seed(1))
    found = attn(windows, block.attn_mask)
    tokens = torch.cat([windows, prompts.expand(len(windows), -1, -1)], dim=1)
    with bank.disabled():
        queries, keys, values = attn.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        bias = attn._get_rel_pos_bias() + block.attn_mask.repeat(2, 1, 1).unsqueeze(1)
        scores = queries @ keys.transpose(-2, -1) * attn.scale + F.pad(bias, (0, 3, 0, 3))
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        wanted = attn.proj(mixed)[:, :16]
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.isfinite(model(images)).all()


def test_position_tables_alone() -> None:
    cell = Cell("bitfit", "swin")
    method = vispeft.BitFit(roles=("rel_pos",), blocks=(0, 2))
    bank = vispeft.attach(cell.model(), method)
    assert set(bank.plan().shapes()) == {
        f"layers.{path}.attn/bitfit.relative_position_bias_table" for path in ("0.blocks.0", "1.blocks.0")
    }
    both = vispeft.plan(cell.model(), vispeft.BitFit(roles=("rel_pos", "norm1")))
    assert {name.rpartition(".")[2] for name in both.shapes()} == {"bias", "relative_position_bias_table"}
    alone = vispeft.plan(Cell("bitfit", "swinv2").model(), vispeft.BitFit(roles=("rel_pos",)))
    assert all("cpb_mlp" in name for name in alone.shapes())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="take Adapter instead"):
        vispeft.Compacter(phm_dim=None, rank=None)
    with pytest.raises(ConfigError, match="leave roles out"):
        vispeft.VPTWindow(roles=("mlp",))
