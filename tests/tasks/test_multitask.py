"""Several dense tasks at once: outputs, losses, weights, figures, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import vispeft
from tests.tasks.dense_toy import TARGETS, ToyTasks, squares
from vispeft.data.dense_targets import IGNORE, DenseTarget
from vispeft.errors import ConfigError, DataError, FileError, UnknownNameError
from vispeft.tasks import Inference, MultiTaskDense
from vispeft.tasks.baselines import mean_gain, mean_score, read_baselines

SWIN = {"pretrained": False, "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8}
SWIN |= {"depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
VIT = {"pretrained": False, "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
VIT_SETTINGS = {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT}


def make(method: Any = None, **settings: Any) -> MultiTaskDense:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"targets": TARGETS, "decoder_args": {"channels": [2, 3, 4, 5]}, "lr": 1e-2}
    defaults |= {"backbone": "swin_tiny_patch4_window7_224", "backbone_args": SWIN}
    return MultiTaskDense(
        method=method or vispeft.MTLoRA(rank=2, task_rank=1, dropout=0.0),
        **{**defaults, **settings},
    )


def fit(task: MultiTaskDense, epochs: int = 2) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=5.0,
    )  # fmt: skip
    trainer.fit(task, datamodule=ToyTasks(batch_size=4, image_size=32))
    return trainer


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (vispeft.MTLoRA(rank=2, task_rank=1), {}),
        (vispeft.LoRA(rank=2), {"output_norms": True}),
        (vispeft.SSF(), {"shared": True, "decoder": "segformer", "decoder_args": {"channels": 4}}),
        (vispeft.LinearProbe(), {"shared": True}),
    ],
    ids=["knows tasks", "copies", "shared", "decoders only"],
)
def test_every_task_has_an_output_of_the_images_size(method: vispeft.Method, settings: dict[str, Any]) -> None:
    task = make(method, **settings).eval()
    images = torch.randn(2, 3, 30, 41)
    with torch.no_grad():
        outputs = task(images)
        found = task.predict(images, (17, 50))
    assert {name: tuple(values.shape) for name, values in outputs.items()} == {
        name: (2, target.channels, 30, 41) for name, target in TARGETS.items()
    }
    assert found["parts"].shape == (2, 17, 50)
    assert found["parts"].dtype == torch.int64
    assert 0 < found["sal"].min() <= found["sal"].max() < 1
    torch.testing.assert_close(found["slope"].norm(dim=1), torch.ones(2, 17, 50))
    assert found["depth"].min() > 0
    counted = sum(p.numel() for part in task.parts().values() for p in part.parameters())
    assert task.report().decoder == counted


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "settings", "widths"),
    [
        (vispeft.Polyhistor(task_dim=5, hidden_dim=8, embed_dim=6, reduction=2), {}, (8, 16, 32, 64)),
        (vispeft.Polyhistor(task_dim=5, hidden_dim=8, embed_dim=6, reduction=2), VIT_SETTINGS, (16,) * 4),
        (vispeft.MTLoRA(rank=2, task_rank=1), VIT_SETTINGS, (16,) * 4),
        (vispeft.LinearProbe(), {"shared": True}, (8, 16, 32, 64)),
    ],
    ids=["polyhistor on swin", "polyhistor on vit", "mtlora on vit", "decoders only"],
)
def test_maps_reach_the_norms_of_their_task_without_the_backbones(
    method: vispeft.Method, settings: dict[str, Any], widths: tuple[int, ...]
) -> None:
    settings = {"decoder": "segformer", "decoder_args": {"channels": 4, "level_norm": False}, **settings}
    targets = {name: TARGETS[name] for name in ("depth", "sal")}
    task = make(method, output_norms=True, targets=targets, **settings).eval()
    images = torch.randn(2, 3, 32, 32)
    for p in [*task.norms.parameters(), *task.model.norm.parameters()]:  # the backbone's must not matter
        p.add_(0.3 * torch.randn_like(p))
    outputs = task(images)
    task.model.norm = torch.nn.Identity()
    maps = vispeft.forward_tasks(task.model, images, list(targets))
    for name, levels in maps.items():
        normed = []
        for norm, level in zip(task.norms[name], levels, strict=True):  # over channels, as a LayerNorm of rows
            rows = level.permute(0, 2, 3, 1)
            rows = torch.nn.functional.layer_norm(rows, rows.shape[-1:], norm.weight, norm.bias, norm.eps)
            normed.append(rows.permute(0, 3, 1, 2))
        wanted = torch.nn.functional.interpolate(task.decoders[name](normed), (32, 32), mode="bilinear")
        assert torch.allclose(outputs[name], wanted, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in task.norms.parameters()) == 2 * 2 * sum(widths)


@pytest.mark.parametrize(
    ("method", "settings"),
    [(vispeft.SSF(roles=("final_norm", "downsample.norm")), {}), (vispeft.NormTuning(), VIT_SETTINGS)],
    ids=["swin", "vit"],
)
def test_units_at_a_norm_that_no_decoder_reads_are_known_by_name(
    method: vispeft.Method, settings: dict[str, Any]
) -> None:
    settings = {"targets": {"sal": TARGETS["sal"]}, "decoder": "segformer", "decoder_args": {"channels": 4}, **settings}
    unused = make(method, output_norms=True, shared=True, **settings).unused_tensors()
    assert len(unused) == 2
    assert all(name.startswith("model.norm.") for name in unused)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (vispeft.Polyhistor(task_dim=5, hidden_dim=8, embed_dim=6, reduction=2), VIT_SETTINGS),
        (vispeft.LoRA(rank=2), {"backbone_args": {**SWIN, "depths": [1, 1], "num_heads": [1, 1]}}),
    ],
    ids=["polyhistor", "copies"],
)
def test_a_step_of_all_tasks_in_one_batch_is_that_of_one_pass_per_task(
    method: vispeft.Method, settings: dict[str, Any]
) -> None:
    targets = {name: TARGETS[name] for name in ("depth", "sal")}
    settings = {"decoder": "segformer", "decoder_args": {"channels": 4, "dropout": 0.0}, **settings}
    task = make(method, targets=targets, batched=True, **settings).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in task.trainable_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    images, labels = squares(3, 32, 0)
    found = []
    for batched in (True, False):
        task.batched = batched
        task.zero_grad()
        loss = task.training_loss(task(images), labels)
        loss.backward()
        tensors = {name: p.grad for name, p in task.trainable_parameters()}
        found.append({"loss": loss.detach(), **{name: grad for name, grad in tensors.items() if grad is not None}})
    together, apart = found
    assert set(together) == set(apart)
    assert len(apart) > 10
    for name, wanted in apart.items():
        assert (together[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_tensors_without_a_gradient_are_known_by_name() -> None:
    task = make()
    unused = task.unused_tensors()
    assert {name.rpartition(".")[2] for name in unused} == {"A", "B"}
    assert all("layers.3.blocks.0.mlp.fc2" in name for name in unused)
    images, labels = squares(2, 32, 0)
    task.training_loss(task(images), labels).backward()
    missing = [name for name, p in task.trainable_parameters() if p.grad is None or not p.grad.any()]
    assert set(unused) <= set(missing)
    assert not [name for name in missing if name.startswith("decoders")]


def test_a_batch_without_labels_of_a_task_has_no_loss_for_it() -> None:
    task = make()
    images, labels = squares(2, 32, 0)
    for values in labels.values():
        values.fill_(IGNORE)
    loss = task.training_loss(task(images), labels)
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for _, p in task.trainable_parameters())
    task.measure("validation", images, labels)
    found = task.figures("validation")
    assert all(torch.isnan(found[name]) for name in ("parts/miou", "depth/rmse", "slope/mean", "score"))


def test_images_without_finite_outputs_are_left_out_of_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make().eval()
    images, labels = squares(3, 32, 0)
    logged: dict[str, tuple[float, int]] = {}

    def log(name: str, value: Any, batch_size: int, **_: Any) -> None:
        logged[name] = (float(value), batch_size)

    def log_dict(values: dict[str, Any], **settings: Any) -> None:
        for name, value in values.items():
            log(name, value, **settings)

    monkeypatch.setattr(task, "log", log)
    monkeypatch.setattr(task, "log_dict", log_dict)
    with torch.no_grad():
        task.measure("validation", images[1:], {name: values[1:] for name, values in labels.items()})
        wanted = dict(logged)
        images[0] = torch.nan
        task.measure("validation", images, labels)
        assert logged == {name: (pytest.approx(value, rel=1e-5), 2) for name, (value, _) in wanted.items()}
        task.measure("validation", images[:1], {name: values[:1] for name, values in labels.items()})
    assert set(logged.values()) == {(0.0, 0)}  # of no weight, and logged nevertheless: other processes wait for it
    assert (task.outputs_seen.images, task.outputs_seen.broken) == (6, 2)


def test_weights_come_from_the_data_or_the_settings() -> None:
    data = ToyTasks(batch_size=4, image_size=32)
    task = make()
    task.check_outputs(data)
    assert task.task_weights.factors() == {"parts": 1.0, "depth": 2.0, "sal": 5.0, "slope": 1.0}
    own = make(loss_weights={"depth": 3.0})
    own.check_outputs(data)
    assert own.task_weights.factors() == {"parts": 1.0, "depth": 3.0, "sal": 5.0, "slope": 1.0}
    images, labels = squares(2, 32, 0)
    outputs = own(images)
    parts = {name: own.losses[name](outputs[name], labels[name]) for name in TARGETS}
    wanted = parts["parts"] + 3 * parts["depth"] + 5 * parts["sal"] + parts["slope"]
    torch.testing.assert_close(own.training_loss(outputs, labels), wanted)
    own.check_outputs(SimpleNamespace(targets=TARGETS, loss_weights={"depth": 9.0, "sal": 8.0, "slope": 7.0}))
    assert own.task_weights.factors() == {"parts": 1.0, "depth": 3.0, "sal": 8.0, "slope": 7.0}


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["uncertainty", "average"])
def test_changing_weights_train_and_are_logged(weighting: Any) -> None:
    task = make(weighting=weighting)
    before = {name: value.clone() for name, value in task.task_weights.state_dict().items()}
    found = fit(task, 3).callback_metrics
    assert any(not torch.equal(value, before[name]) for name, value in task.task_weights.state_dict().items())
    factors = task.task_weights.factors()
    assert {name for name in found if name.startswith("weight/")} == {f"weight/{name}" for name in factors}
    assert len({round(value, 6) for value in factors.values()}) > 1


@pytest.mark.slow
def test_the_trainer_does_what_a_plain_loop_does(one_thread: None) -> None:
    task, plain = make(), make()
    found = fit(task).callback_metrics
    data = ToyTasks.for_model(plain.model, batch_size=4)
    plain.check_outputs(data)
    groups = [*plain.bank.parameter_groups(1e-2, 1e-4), *plain.further_groups()]
    optimizer = torch.optim.AdamW(groups)
    schedule = vispeft.tasks.warmup_cosine(optimizer, 4, 0.1)
    plain.train()
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            outputs = plain(images)
            losses = {name: plain.losses[name](outputs[name], labels[name]) for name in TARGETS}
            sum(plain.task_weights.weights[name] * loss for name, loss in losses.items()).backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 5.0)
            optimizer.step()
            schedule.step()
    for (name, one), (_, other) in zip(task.trainable_parameters(), plain.trainable_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
    assert {"train/loss", "train/loss_depth", "validation/loss_sal", "validation/score"} <= set(found)


def test_files_keep_norms_decoders_and_the_description_of_tasks(tmp_path: Path) -> None:
    task = make(vispeft.LoRA(rank=2), output_norms=True).eval()
    with torch.no_grad():
        for _, p in task.trainable_parameters():
            p.add_(torch.randn_like(p) * 0.1)
        wanted = task(torch.ones(1, 3, 32, 32))
    task.bank.annotate(output=task.output(), class_names=task.output_names(None))
    task.save_adapter(tmp_path)
    header = json.loads((tmp_path / "adapter.json").read_text())
    sizes = MultiTaskDense.sized_by_file(header)
    turned = {"targets": dict(reversed(sizes["targets"].items()))}
    again = make(vispeft.LoRA(rank=2), output_norms=True, **turned).eval()  # names decide, not their order
    again.load_adapter(tmp_path)
    with torch.no_grad():
        found = again(torch.ones(1, 3, 32, 32))
    assert all(torch.equal(found[name], values) for name, values in wanted.items())
    other = make(vispeft.LoRA(rank=2), output_norms=True, targets={**TARGETS, "sal": DenseTarget(kind="edge")})
    with pytest.raises(FileError, match="'sal' as saliency, not edge"):
        other.load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"targets": {}}, ConfigError, "name at least one task"),
        ({"targets": {"a": {"kind": "depht"}}}, ConfigError, "choose 'classes'"),
        ({"targets": {"keys": TARGETS["sal"]}}, ConfigError, "attribute of PyTorch"),
        ({"targets": {"strips": TARGETS["sal"]}}, ConfigError, "another folder of predictions"),
        ({"targets": {"a_mm": TARGETS["sal"], "a": TARGETS["depth"]}}, ConfigError, "another folder of predictions"),
        ({"loss_weights": {"dept": 1.0}}, UnknownNameError, "depth"),
        ({"baselines": {"dept": 1.0}}, UnknownNameError, "depth"),
        ({"baselines": {"depth": 1.0}}, ConfigError, "no figure for parts, sal, slope"),
        ({"weighting": "sum"}, UnknownNameError, "fixed"),
        ({"levels": "vitdet"}, ConfigError, "Leave levels out"),
        ({"inference": Inference(flip=True)}, ConfigError, "Leave inference out"),
        ({"shared": True}, ConfigError, "knows the tasks itself"),
        ({"method": vispeft.SSF(), "batched": True}, ConfigError, "'ssf' has units of kind 'affine'.*batched=False"),
        ({"decoder_args": {"channels": [2, 3]}}, ConfigError, "there are 4 maps"),
        ({"method": vispeft.VQT()}, ConfigError, "changes the backbone's last feature"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make(**settings)


def test_data_are_matched_by_name_and_refused_where_a_task_lacks_labels() -> None:
    task = make(vispeft.LinearProbe(), shared=True)
    turned = SimpleNamespace(targets=dict(reversed(TARGETS.items())), target="tasks")
    task.check_outputs(turned)
    with pytest.raises(DataError, match="'slope' has no labels in the data, which have parts, depth, sal"):
        task.check_outputs(SimpleNamespace(targets={name: TARGETS[name] for name in ("parts", "depth", "sal")}))
    with pytest.raises(DataError, match=r"labels of 'sal' in the data are edge, and the task was made for saliency"):
        task.check_outputs(SimpleNamespace(targets={**TARGETS, "sal": DenseTarget(kind="edge")}))


def test_baselines_are_figures_or_runs(tmp_path: Path) -> None:
    mains = {"parts": "miou", "depth": "rmse"}
    figures = {"validation": {"depth/rmse": 1.5}, "test": {"depth/rmse": 2.0}}
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    found = read_baselines({"parts": 0.5, "depth": str(tmp_path)}, mains)
    assert found.figures == {"validation": {"parts": 0.5, "depth": 1.5}, "test": {"parts": 0.5, "depth": 2.0}}
    with pytest.raises(FileError, match="does not have parts/miou of the validation split"):
        read_baselines(str(tmp_path), mains)
    for wrong in (0.0, -1.5, float("nan")):
        with pytest.raises(ConfigError, match="divides by it"):
            read_baselines({"parts": 0.5, "depth": wrong}, mains)


def test_without_baselines_a_geometric_mean_chooses() -> None:
    score = mean_score({"a": torch.tensor(0.5), "b": torch.tensor(2.0)}, {"a": True, "b": False})
    assert float(score) == pytest.approx((0.5 / 2.0) ** 0.5)
    better = mean_score({"a": torch.tensor(0.5), "b": torch.tensor(1.9)}, {"a": True, "b": False})
    assert better > score


def test_tasks_without_a_labelled_pixel_are_left_out_of_both_means() -> None:
    higher, baselines = {"a": True, "b": False}, {"a": 0.4, "b": 2.0}
    nan = torch.tensor(float("nan"))
    some = {"a": torch.tensor(0.5), "b": nan}
    assert float(mean_score(some, higher)) == pytest.approx(0.5)
    assert float(mean_gain(some, baselines, higher)) == pytest.approx(25)
    both = {"a": torch.tensor(0.5), "b": torch.tensor(1.0)}
    assert float(mean_gain(both, baselines, higher)) == pytest.approx(37.5)
    assert torch.isnan(mean_score({"a": nan, "b": nan}, higher))
    assert torch.isnan(mean_gain({"a": nan, "b": nan}, baselines, higher))
    boundless = {"a": torch.tensor(0.5), "b": torch.tensor(float("inf"))}
    assert mean_score(boundless, higher) == 0
    assert mean_gain(boundless, baselines, higher) == -torch.inf
