"""Token merging with every method on every family: right, or refused with the reason."""

from __future__ import annotations

import pytest
import torch

import vispeft
from tests.conformance.cells import CELLS, Cell, params
from vispeft.errors import BackboneError, ConfigError

BY_PLACE = {
    *("convpass", "convpass_attn", "mona", "rein", "conformer_adapter", "lst", "lst_sparse", "mtlora", "ditask"),
    *("mmrl", "mmrl_base", "dyt"),
}
"""Methods that read tokens by their places, or pass rows of their own beside them."""
QUICK = ("lora", "vpt", "vqt", "adaptformer", "convpass")


def left(cell: Cell) -> bool:
    """Whether a cell is left to the slow tests."""
    return cell.method not in QUICK or cell.backbone != "vit"


@pytest.mark.parametrize("cell", params(CELLS, slow=left))
def test_merged_or_refused(cell: Cell) -> None:
    model, images = cell.model().double(), cell.images().double()
    bank = cell.attach(model)
    task = (bank.tasks() or [None])[0]
    with torch.no_grad(), bank.using(task=task):
        before = model.forward_features(images)
    if not cell.backbone.startswith("vit"):
        with pytest.raises(BackboneError, match="Token merging was asked for in a"):
            bank.merge_tokens(1)
    elif cell.method in BY_PLACE:
        with pytest.raises(ConfigError, match=r"merges tokens, and adapter 'default' \("):
            bank.merge_tokens(1)
    else:
        _merges(cell, model, bank, task)
    with torch.no_grad(), bank.using(task=task):
        assert torch.equal(model.forward_features(images), before)


def _merges(cell: Cell, model: torch.nn.Module, bank: vispeft.AdapterBank, task: str | None) -> None:
    """Merge one token per block: shapes stay, checkpointing changes no gradient, and then switch it off."""
    images = cell.images().double()
    with torch.no_grad(), bank.using(task=task):
        shape = model.forward_features(images).shape
    bank.merge_tokens(1)
    model.train()
    results = []
    for checkpoints in (False, True):
        model.set_grad_checkpointing(checkpoints)
        model.zero_grad()
        torch.manual_seed(4)
        with bank.using(task=task):
            out = model(images)
            assert model.forward_features(images).shape == shape
            out.square().sum().backward()
        results.append([out.detach(), *(p.grad for _, p in bank.trainable_parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*results, strict=True))
    model.eval()
    model.set_grad_checkpointing(False)
    bank.merge_tokens(0)
