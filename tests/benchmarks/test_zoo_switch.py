"""Eight adapters held at once cost their own bytes and no others."""

import pytest
import torch
import zoo_switch

import vispeft
from tests.tiny import TINY


@pytest.mark.slow
def test_eight_adapters_cost_their_own_bytes(tmp_path):
    methods = [vispeft.SSF(), vispeft.LoRA(rank=2), vispeft.VPT(), vispeft.VQT(), vispeft.AdaptFormer(bits=1)]
    sources = []
    for number, method in enumerate(methods):
        torch.manual_seed(0)
        made = vispeft.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
        vispeft.attach(made, method, verify=False).save(tmp_path / str(number))
        sources.append(str(tmp_path / str(number)))
    torch.manual_seed(0)
    model = vispeft.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    backbone = sum(tensor.nbytes for tensor in model.state_dict().values())
    bank, rows = zoo_switch.held_at_once(model, [*sources, *sources[:3]])
    assert len(bank.names) == 8
    for row in rows:
        assert 0 < row["own_bytes"] <= row["grown_bytes"] <= row["own_bytes"] + 4096, row
    assert sum(row["grown_bytes"] for row in rows) < backbone
    assert set(zoo_switch.switches(bank, 8)) == {"set_active", "using"}
    held = zoo_switch.tensor_bytes()
    for name in bank.names:
        bank.detach(name)
    assert held - zoo_switch.tensor_bytes() >= sum(row["own_bytes"] for row in rows)  # and nothing of them stays
