"""Losses and scores of several dense tasks (reference part C) against the authors' public code.

Their meter's quirks are not imitated: its ``rmse`` of normals is the mean, and its ``Beta maxF`` and its score of edges
pass probabilities through a second sigmoid.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.test_parity import FILES, read
from vispeft.data.dense_targets import DenseTarget
from vispeft.metrics import delta_m, dense_metric
from vispeft.tasks.dense_losses import BalancedCrossEntropy, DenseLoss, dense_loss
from vispeft.tasks.task_weights import TaskWeights

CLAIMED = [path for path in FILES if path.stem.startswith("multitask_")]
"""The files checked here."""

KINDS = {"semseg": "classes", "human_parts": "classes", "semseg_nyud": "classes", "sal": "saliency", "balanced": "edge"}
"""Kind of a task or case by the beginning of its name, where that is no kind itself."""


def contents(stem: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = next((path for path in CLAIMED if path.stem == stem), None)
    if path is None:
        pytest.skip(f"there is no {stem}.safetensors")
    return read(path)


def target_of(case: str, channels: int) -> DenseTarget:
    kind = next((kind for start, kind in KINDS.items() if case.startswith(start)), case.partition("_")[0])
    return DenseTarget(kind=kind, class_names=tuple(map(str, range(channels))) if kind == "classes" else ())


def labels_of(tensor: Tensor, target: DenseTarget) -> Tensor:
    """Bring the authors' labels, floats of shape (B, 1, h, w), into our form."""
    return tensor[:, 0].long() if target.kind == "classes" else tensor


def loss_of(case: str, target: DenseTarget) -> DenseLoss:
    return BalancedCrossEntropy(target, case) if case.startswith("balanced") else dense_loss(target, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients(dtype: torch.dtype) -> None:
    meta, tensors = contents("multitask_losses")
    cases = sorted({key.partition(".")[0] for key in tensors if key.endswith(".logits")})
    assert set(cases) == set(meta["cases"])
    losses, targets = {}, {}
    for case in cases:
        logits = tensors[f"{case}.logits"].to(dtype, copy=True).requires_grad_()
        target = target_of(case, logits.shape[1])
        void = [tensors[f"{case}.void"] > 0] if f"{case}.void" in tensors else []
        loss = loss_of(case, target)(logits, labels_of(tensors[f"{case}.target"], target), *void)
        loss.backward()
        wanted, gradient = tensors[f"{case}.loss"].to(dtype).squeeze(), tensors[f"{case}.grad"].to(dtype)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")
        torch.testing.assert_close(logits.grad, gradient, rtol=1e-5, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")
        # Gradients are as small as 1e-6, so they are also measured by their largest entry.
        assert (logits.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max()
        losses[case], targets[case] = loss.detach(), target
    named = {name: targets[name] for name in meta["loss_weights"]}
    weights = TaskWeights(named)
    assert weights.factors() == meta["loss_weights"]
    total = weights({name: losses[name] for name in named})
    torch.testing.assert_close(total, tensors["total.loss"].to(dtype).squeeze(), rtol=1e-5, atol=1e-6)


SCORES = {
    "semseg": {"miou": "mIoU"},
    "human_parts": {"miou": "mIoU"},
    "semseg_nyud": {"miou": "mIoU"},
    "sal": {"miou": "mIoU", "maxf": "maxF"},
    "depth": {"rmse": "rmse", "log_rmse": "log_rmse"},
    "normals": {
        "mean": "mean",
        "rmse": "true_rmse_not_from_authors_meter",
        "within_11.25": "11.25",
        "within_22.5": "22.5",
        "within_30": "30",
    },
}
"""The authors' names of our figures. Edges are left out: their meter has none for them but a loss."""


@pytest.mark.parametrize("task", SCORES)
def test_scores(task: str) -> None:
    meta, tensors = contents("multitask_metrics")
    target = target_of(task, tensors[f"batch0.logits.{task}"].shape[1])
    metric, single = dense_metric(target, task), dense_metric(target, task)
    for batch in range(meta["batches"]):
        outputs = tensors[f"batch{batch}.logits.{task}"]
        labels = labels_of(tensors[f"batch{batch}.target.{task}"], target)
        metric.update(outputs, labels)
        for image in range(len(outputs)):  # their saliency meter breaks on batches of one
            single.update(outputs[image : image + 1], labels[image : image + 1])
    for figures in (metric.compute(), single.compute()):
        for ours, theirs in SCORES[task].items():
            percent = 100 if ours.startswith("within") else 1
            margin = 1e-3 if ours in ("mean", "rmse") and task == "normals" else 1e-5
            wanted = meta["scores"][task][theirs]
            assert percent * figures[ours].item() == pytest.approx(wanted, abs=margin * percent), ours
    if task == "normals":
        assert meta["scores"][task]["rmse"] == meta["scores"][task]["mean"] < metric.compute()["rmse"] - 4
    if target.kind == "classes":
        iou = torch.tensor(meta["scores"][task]["jaccards_all_categs"])
        torch.testing.assert_close(metric.per_class()["iou"], iou, rtol=0, atol=1e-5)


def test_delta_m() -> None:
    meta, _ = contents("multitask_metrics")
    given = {
        when: {t: next(iter(f.values())) for t, f in meta["delta_m"][when].items()} for when in ("single", "multi")
    }
    for tasks, fraction in meta["delta_m"]["result"].items():
        names = tasks.split("+")
        higher = {name: name not in ("normals", "depth") for name in names}
        scores, baselines = ({name: given[when][name] for name in names} for when in ("multi", "single"))
        assert delta_m(scores, baselines, higher) == pytest.approx(100 * fraction, abs=1e-9)
