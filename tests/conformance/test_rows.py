"""Rows of one batch through several adapters: each image gets what its adapter gives alone, on every cell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vispeft
from tests.conformance.cells import CELLS, EXCLUSIVE, Cell, move, params
from vispeft.adapters.bank import AdapterBank

QUICK = ("lora", "hydra", "repadapter", "adaptformer", "compacter", "ssf", "vpt", "vqt")
"""One method for each way of acting; the others run with ``make test-slow``."""
PARTS = (
    *("full", "bitfit", "norm_tuning", "ssf", "ssf_merging", "dora", "bat", "svfit", "svfit_few", "mask", "sparse"),
    *("sparse_lift", "pst", "snell", "snella", "vpt", "vpt_shallow", "vpt_window", "vptsp", "vqt", "vqt_weighted"),
    *("prefix", "prefix_mlp", "mam", "lst", "lst_sparse", "mtlora", "ditask"),
    *("conformer_adapter", "compacter_full", "dyt", "sparse_gps", "mmrl", "mmrl_base"),
)
"""Methods that need a part of the batch for themselves, as docs/concepts.md says."""
READ_PROJECTION = ("swinv2", "eva02", "eva_dinov3_qkvb")
"""Backbones that read the weight of a projection instead of calling it: units there need a part for themselves too."""
ROWS = ["first", "second", None, "other", "second", "first"]


def left(cell: Cell) -> bool:
    quick = {"vit": QUICK, "swin": ("lora", "adaptformer", "ssf")}
    return cell.method not in quick.get(cell.backbone, ())


def adapted(cell: Cell) -> tuple[nn.Module, AdapterBank, str | None]:
    model = cell.model()
    bank = cell.attach(model, "first")
    tasks = bank.tasks("first")
    cell.attach(model, "second")
    move(bank, "second", seed=5)
    vispeft.attach(model, vispeft.LoRA(rank=2), name="other", verify=False)
    move(bank, "other", seed=9)
    model.eval()
    return model, bank, tasks[0] if tasks else None


@pytest.mark.parametrize("cell", params(CELLS, slow=left))
@torch.no_grad()
def test_each_row_equals_its_adapter_alone(cell: Cell) -> None:
    model, bank, task = adapted(cell)
    images, wanted = cell.images(len(ROWS)), []
    for image, name in zip(images.split(1), ROWS, strict=True):
        own = task if name in ("first", "second") else None
        with bank.disabled() if name is None else bank.using(name, task=own):
            wanted.append(model(image))
    with bank.using(rows=ROWS, task=task):
        found = model(images)
        rows = bank._routing.present().rows
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-6)
    if cell.backbone not in READ_PROJECTION:
        assert rows is not None
        assert len(rows.parts) == (3 if cell.method in PARTS else 0)


ALIKE = [cell for cell in CELLS if cell.method not in EXCLUSIVE and cell.backbone in ("vit", "swin")]


@pytest.mark.parametrize("cell", params(ALIKE, slow=lambda cell: cell.method not in ("lora", "adaptformer", "ssf")))
def test_gradients_are_those_of_separate_passes(cell: Cell) -> None:
    model, bank, task = adapted(cell)
    images = cell.images(len(ROWS))
    names = [name for name in ("first", "second", "other") if name in ROWS]
    for name in names:
        own = task if name != "other" else None
        chosen = images[[place for place, row in enumerate(ROWS) if row == name]]
        with bank.using(name, task=own):
            model(chosen).square().sum().backward()
    wanted = [parameter.grad for _, parameter in bank.trainable_parameters()]
    model.zero_grad()
    with bank.using(rows=ROWS, task=task):
        scores = model(images)
    scores[[place for place, row in enumerate(ROWS) if row]].square().sum().backward()
    for (name, parameter), gradient in zip(bank.trainable_parameters(), wanted, strict=True):
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5, msg=name)
