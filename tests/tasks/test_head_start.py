"""A head that starts from a probe: features, choice, epoch 0, resuming, and what is refused."""

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vispeft
from benchmarks.resume_kill import differences
from tests.cli.conftest import call
from tests.tiny import CONFIG, TINY
from vispeft.cli.evaluation import evaluation_trainer
from vispeft.cli.start import start_from
from vispeft.data import DenseTarget, DigitsData, ScenesData
from vispeft.errors import ConfigError, DataError, FileError, TrainingError
from vispeft.storage.class_embeddings import ClassEmbeddings
from vispeft.tasks import (
    Classification,
    MetricLearning,
    MultiLabel,
    MultiTaskDense,
    Regression,
    RunCheckpoints,
    Segmentation,
    head_start,
    probe,
)
from vispeft.tasks.callbacks import NarrowProgress
from vispeft.tasks.checkpoints import read_checkpoint
from vispeft.tasks.feature_cache import cache_features
from vispeft.tasks.logs import RunLog
from vispeft.viz import read_history

SMALL = {"batch_size": 32, "validation": 0.03, "test": 0.94}
"""53 training and 54 validation images."""
FEW = (1e3, 10.0, 1.0)
TASKS = {"class": Classification, "multilabel": MultiLabel, "regression": Regression}
DEPTH = {"depth": DenseTarget(kind="depth")}
LOW_BIT = vispeft.AdaptFormer(bits=1, bias=False, head_bits=1)
BY_RUN = (
    "--model.head_start=probe",
    "--data.validation=0.05",
    "--data.test=0.9",
    "--data.batch_size=32",
    "--model.ema=0.5",
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def few_strengths(monkeypatch):
    for module in (probe, head_start):
        monkeypatch.setattr(module, "STRENGTHS", FEW)


def make(target="class", method=None, args=None, **settings):
    seed_everything(0)
    return TASKS[target](
        backbone="vit_tiny_patch16_224",
        backbone_args={**TINY, **(args or {})},
        num_classes={"class": 10, "multilabel": 4, "regression": 1}[target],
        method=method or vispeft.LoRA(rank=2),
        **{"head_start": "probe", "lr": 1e-3, **settings},
    )


def fit(task, folder, data=None, **settings):
    kept = RunCheckpoints(folder / "checkpoints", monitor=task.monitor, mode=task.monitor_mode)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    log = RunLog(folder / "logs")
    trainer = Trainer(**{**quiet, "max_epochs": 1, "logger": log, "callbacks": [kept], **settings})
    trainer.fit(task, datamodule=data or DigitsData(target=task.target, **SMALL))
    return kept, trainer


@torch.no_grad()
def measured(task, data, split="validation"):
    """Outputs of a split, in evaluation."""
    training = task.training
    task.eval()
    parts = [(task(images).float(), targets) for images, targets in data.plain_dataloader(split)]
    task.train(training)
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])


def first_step(task, seen):
    """Note the outputs of a task on validation when its first step begins."""
    step = task.training_step

    def training_step(batch, batch_idx):
        if not seen:
            seen.append(measured(task, task.trainer.datamodule))
        return step(batch, batch_idx)

    task.training_step = training_step


@pytest.mark.parametrize("target", TASKS)
def test_training_starts_from_the_fitted_head_and_has_an_epoch_0(tmp_path, target):
    task, seen = make(target, args={"drop_rate": 0.5}), []
    first_step(task, seen)
    kept, trainer = fit(task, tmp_path)
    scores, targets = seen[0]
    record = task.head_start.record
    assert record["images"] == {"train": 53, "validation": 54}
    assert record["strength"] in probe.STRENGTHS

    # Fitted to what the head sees: the linear models of the same features, chosen by the task's own figure.
    fresh = make(target, args={"drop_rate": 0.5})
    data = trainer.datamodule
    fresh.check_data(data)
    model = fresh.model.eval()
    with torch.no_grad():
        x, y = (
            torch.cat(parts)
            for parts in zip(
                *[
                    (model.forward_head(model.forward_features(images), pre_logits=True), labels)
                    for images, labels in data.plain_dataloader("train")
                ],
                strict=True,
            )
        )
    y, weights = fresh.for_probe(y)
    path = dict(probe.fit_path(target, x, y, task.num_classes, weights=weights))
    with torch.no_grad():
        fresh.bank.head().weight.copy_(path[record["strength"]].weight)
        fresh.bank.head().bias.copy_(path[record["strength"]].bias)
    torch.testing.assert_close(measured(fresh, data)[0], scores, atol=1e-5, rtol=1e-4)

    metrics = fresh.make_metrics("validation")
    metrics.update(*fresh.for_metrics(scores, targets))
    figure = float(metrics.compute()[task.monitor])
    trainer.logger.save()
    curve = dict(read_history(tmp_path / "logs/csv/metrics.csv")[task.monitor])
    assert sorted(curve) == [-1, 0]
    assert curve[-1] == pytest.approx(figure, abs=1e-6)
    assert record["validation"][task.monitor.partition("/")[2]] == pytest.approx(figure, abs=1e-6)
    better = max if task.monitor_mode == "max" else min
    assert kept.best["score"] == better(curve.values())


@pytest.mark.parametrize("method", [vispeft.VPT(num_tokens=2), vispeft.VQT(num_queries=2), vispeft.LST(reduction=2)])
def test_the_strength_is_that_with_the_best_validation_figure(tmp_path, monkeypatch, method):
    judged = []
    judge = head_start._judge

    def noted(task, scores, targets):
        judged.append(judge(task, scores, targets))
        return judged[-1]

    monkeypatch.setattr(head_start, "_judge", noted)
    task = make(method=method)
    fit(task, tmp_path, max_steps=1)
    assert len(judged) == 2 * 3, "those of the frozen features, then those of what the adapter makes of them"
    judged = judged[3:]
    assert task.head_start.record["strength"] == probe.STRENGTHS[judged.index(max(judged))]
    assert task.head_start.record["validation"]["accuracy"] == pytest.approx(max(judged)[0])


@pytest.mark.parametrize("method", [vispeft.SSF(), vispeft.VPT(num_tokens=2)])
def test_the_probe_of_the_frozen_features_is_the_start_or_is_measured_too(tmp_path, method):
    alone = make(method=vispeft.LinearProbe(), lr=1e-12)
    fit(alone, tmp_path / "alone", max_steps=1)
    task, starts = make(method=method), []
    step = task.training_step

    def training_step(batch, batch_idx):
        starts.append({name: tensor.detach().clone() for name, tensor in task.bank.named_tensors().items()})
        return step(batch, batch_idx)

    task.training_step = training_step
    fit(task, tmp_path / "run", max_steps=1)
    probe_alone, record = alone.head_start.record, task.head_start.record
    if method.name == "ssf":  # it starts as the identity, so that epoch 0 is the probe
        kinds = {name: name.rpartition(".")[2] for name in starts[0] if not name.startswith("head")}
        assert all(bool((starts[0][name] == float(kind == "scale")).all()) for name, kind in kinds.items())
        assert {"scale", "shift"} == set(kinds.values())
        assert record == {**probe_alone, "validation": pytest.approx(probe_alone["validation"], abs=1e-5)}
    else:
        accuracy = probe_alone["validation"]["accuracy"]
        assert record["frozen"] == {"strength": probe_alone["strength"], "figure": pytest.approx(accuracy)}
        assert task.head_start.frozen_is_better(accuracy - 0.01, "max")
        assert not task.head_start.frozen_is_better(accuracy, "max")
        assert task.head_start.frozen_is_better(accuracy + 0.01, "min")
    assert not alone.head_start.frozen_is_better(0.0, "max")


def test_a_loaded_adapter_is_not_set_to_the_identity(tmp_path):
    source = make(head_start=None, method=vispeft.SSF())
    source.bank.annotate(class_names=[f"other {index}" for index in range(10)])
    source.save_adapter(tmp_path / "adapter")
    task, seen = make(method=vispeft.SSF()), []
    start_from(task, str(tmp_path / "adapter"), [str(index) for index in range(10)])
    step = task.training_step
    task.training_step = lambda batch, batch_idx: (
        seen.append(next(iter(task.bank.units().values())).scale.detach().clone()) or step(batch, batch_idx)
    )
    fit(task, tmp_path / "run", max_steps=1)
    torch.testing.assert_close(seen[0], next(iter(source.bank.units().values())).scale)
    assert set(task.head_start.record["frozen"]) == {"strength", "figure"}


def test_test_images_are_not_looked_at_and_random_numbers_stay(tmp_path):
    states = {}
    for name in (None, "probe"):
        task, data = make(head_start=name, method=vispeft.VPT(num_tokens=2)), DigitsData(**SMALL)
        data.test_dataloader = None
        seen = []
        step = task.training_step
        task.training_step = lambda batch, batch_idx, step=step, seen=seen: (
            seen.append(batch[0]) or step(batch, batch_idx)
        )
        fit(task, tmp_path / str(name), data)
        states[name] = torch.get_rng_state(), seen
    assert torch.equal(states[None][0], states["probe"][0])
    assert all(torch.equal(one, other) for one, other in zip(states[None][1], states["probe"][1], strict=True))


def test_augmentation_is_left_out_of_the_features(tmp_path):
    heads = []
    for augment in (False, True):
        task = make()
        step, head = task.training_step, task.bank.head()
        task.training_step = lambda batch, batch_idx, step=step, head=head: (
            heads.append(head.weight.detach().clone()) or step(batch, batch_idx)
        )
        fit(task, tmp_path / str(augment), DigitsData(augment=augment, **SMALL), max_steps=1)
    assert torch.equal(heads[0], heads[1])


def test_without_a_validation_that_chooses_folds_of_the_training_images_do(tmp_path, monkeypatch):
    task, data = make(), DigitsData(**SMALL)
    monkeypatch.setattr(data, "validation_chooses", False)
    kept, _ = fit(task, tmp_path, data)
    assert task.head_start.record["chosen_on"] == "5 folds of the training images"
    assert set(task.head_start.record["images"]) == {"train"}
    assert kept.best["epoch"] == 0, "the last epoch is kept, whatever validation says"


@pytest.mark.parametrize(
    ("limits", "images"),
    [
        ({}, {"train": 53, "validation": 54}),
        ({"limit_train_batches": 3, "limit_val_batches": 0.5}, {"train": 24, "validation": 24}),
        ({"overfit_batches": 2}, {"train": 16, "validation": 16}),
        ({"fast_dev_run": True}, {"train": 8, "validation": 8}),
    ],
)
def test_the_images_of_a_start_are_those_that_the_trainer_is_limited_to(limits, images):
    task, data = make(), DigitsData(**{**SMALL, "batch_size": 8})
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(**{**quiet, "logger": False, "max_epochs": 1, "accelerator": "cpu", **limits})
    data.fit_to(task.preprocessing)
    data.setup("fit")
    trainer.datamodule = data
    loaders = {name: head_start._loader(trainer, name) for name in images}
    assert {name: len(loader.sampler) for name, loader in loaders.items()} == images
    targets, found = data.split("train").targets, [label for _, labels in loaders["train"] for label in labels]
    if "overfit_batches" in limits:  # the first ones of the split, in every epoch
        assert found == targets[:16].tolist()


def test_a_start_and_its_training_see_the_same_few_images(tmp_path):
    task = make(lr=1e-12)
    seen, step, unit = [], task.training_step, next(iter(task.bank.units().values()))
    task.training_step = lambda batch, batch_idx: seen.append((batch[1], unit.training)) or step(batch, batch_idx)
    unit.eval()
    data = DigitsData(**{**SMALL, "batch_size": 8})
    fit(task, tmp_path, data, limit_train_batches=2, limit_val_batches=2)
    assert task.head_start.record["images"] == {"train": 16, "validation": 16}
    wanted = [labels for _, labels in head_start._loader(task.trainer, "train")]
    assert torch.equal(torch.cat([labels for labels, _ in seen]), torch.cat(wanted))
    assert not seen[0][1], "a unit that was set apart keeps its mode"


def kept_outputs(task, folder):
    data = DigitsData.for_model(task.model, **SMALL)
    cache_features(task, data, evaluation_trainer(accelerator="cpu"), folder)
    return data


def test_kept_outputs_of_a_frozen_backbone_give_the_same_start(tmp_path):
    found = []
    for cached in (False, True):
        task = make(method=vispeft.LinearProbe())
        data = kept_outputs(task, tmp_path / "kept") if cached else DigitsData(**SMALL)
        fit(task, tmp_path / str(cached), data, max_steps=1)
        found.append(task.head_start.record)
    assert found[0] == found[1]


@pytest.mark.slow
def test_kept_outputs_of_a_network_beside_the_backbone_have_a_start(tmp_path):
    """The frozen features, which are not kept, were to be measured as well, and no step was made."""
    task = make(method=vispeft.LST())
    fit(task, tmp_path / "run", kept_outputs(task, tmp_path / "kept"), max_steps=1)
    assert task.head_start.record.get("frozen", task.head_start.record["strength"]) in FEW  # not a record of its own


def test_a_loaded_adapter_with_another_classifier_keeps_its_units_and_gets_a_fitted_head(tmp_path):
    source = make(head_start=None)
    with torch.no_grad():
        for tensor in source.bank.named_tensors().values():
            tensor.normal_(std=0.1)
    source.bank.annotate(class_names=[f"other {index}" for index in range(10)])
    source.save_adapter(tmp_path / "adapter")
    task = make()
    said = start_from(task, str(tmp_path / "adapter"), [str(index) for index in range(10)])
    assert "the classifier is a fresh one (other classes)" in said
    seen = []
    first_step(task, seen)
    fit(task, tmp_path / "run")
    assert task.head_start.record["strength"] in FEW
    assert float((seen[0][0].argmax(1) == seen[0][1]).float().mean()) == pytest.approx(
        task.head_start.record["validation"]["accuracy"], abs=1e-6
    )
    kept = make()
    said = start_from(kept, str(tmp_path / "adapter"), [f"other {index}" for index in range(10)])
    assert "It is trained already, so head_start has no effect" in said
    fit(kept, tmp_path / "kept", max_steps=1)
    assert kept.head_start.record == {}


def test_an_ema_starts_from_the_probe(tmp_path):
    task, starts = make(ema=0.9), []
    step = task.training_step

    def training_step(batch, batch_idx):
        starts.append({name: tensor.clone() for name, tensor in task.ema.average(task).items()})
        starts.append({name: tensor.detach().clone() for name, tensor in task.trainable_parameters()})
        return step(batch, batch_idx)

    task.training_step = training_step
    fit(task, tmp_path, max_steps=1)
    assert all(torch.equal(starts[0][name], tensor) for name, tensor in starts[1].items())


def test_a_second_training_goes_on_from_the_first(tmp_path):
    task = make()
    fit(task, tmp_path / "one")
    before = task.bank.head().weight.detach().clone()
    task.lr = 1e-12
    fit(task, tmp_path / "two")
    torch.testing.assert_close(task.bank.head().weight.detach(), before)
    assert list(dict(read_history(tmp_path / "two/logs/csv/metrics.csv")[task.monitor])) == [0]


def test_progress_is_shown_in_the_bar_of_the_trainer(tmp_path, monkeypatch):
    bar, counts = NarrowProgress(), []
    shown = head_start._shown

    def noted(trainer, what, total):
        counts.append(total)
        return shown(trainer, what, total)

    monkeypatch.setattr(head_start, "_shown", noted)
    monkeypatch.setattr(bar, "_stop_progress", lambda: counts.append([t.completed for t in bar.progress.tasks]))
    task = make()
    with redirect_stdout(io.StringIO()):
        fit(task, tmp_path, enable_progress_bar=True, callbacks=[bar, RunCheckpoints(tmp_path, monitor=task.monitor)])
    assert counts[0] == 2 + 2 + 3, "batches of training and validation, and the models"
    assert counts[0] in counts[-1]


@pytest.mark.parametrize("size", [32, 36])
def test_a_linear_decoder_starts_from_a_probe_of_cells(tmp_path, size, monkeypatch):
    monkeypatch.setattr(head_start, "ROWS", 400)
    seed_everything(0)
    task = Segmentation(
        backbone="vit_tiny_patch16_224",
        backbone_args={**TINY, "img_size": 32},
        method=vispeft.LoRA(rank=2),
        num_classes=5,
        decoder="linear",
        decoder_args={"dropout": 0.5},
        head_start="probe",
        lr=1e-9,
    )
    data = ScenesData(images=12, scene_size=48, image_size=size, batch_size=4)
    kept, seen = [], []
    starts, step = task.start_from_probe, task.training_step

    def start_from_probe(model, features):
        kept.append((model, features))
        starts(model, features)

    def training_step(batch, batch_idx):
        if not seen:
            images, masks = next(iter(data.plain_dataloader("train")))
            maps = task.eval().reader(task.model, task.network().padded(images))
            joined = torch.cat(list(maps), 1)
            seen.append((joined, task.decoder(maps), masks, images))
            task.train()
        return step(batch, batch_idx)

    task.start_from_probe, task.training_step = start_from_probe, training_step
    fit(task, tmp_path, data, max_steps=1)
    (model, features), (joined, scores, _masks, _images) = kept[0], seen[0]
    cells = joined.shape[-1]
    assert cells == -(-size // 8)
    assert len(features) <= 400
    assert task.head_start.record["validation"]["miou"] == pytest.approx(
        dict(read_history(tmp_path / "logs/csv/metrics.csv"))["validation/miou"][0][1]
    )
    wanted = model(joined.permute(0, 2, 3, 1).flatten(0, 2) / (1 + task.decoder.bn.eps) ** 0.5)
    torch.testing.assert_close(scores.permute(0, 2, 3, 1).flatten(0, 2), wanted, atol=1e-3, rtol=1e-3)


def test_cells_have_the_class_of_the_mask_at_their_centre():
    task = Segmentation(
        backbone="vit_tiny_patch16_224", backbone_args=TINY, method=vispeft.SSF(), num_classes=3, decoder="linear"
    )
    seen = torch.arange(2 * 9).reshape(2, 1, 3, 3).float()  # 20 x 20 pixels are padded to 24: the third cells reach out
    masks = torch.zeros(2, 10, 10, dtype=torch.long)  # half the size of the images
    masks[:, 4:, :4], masks[:, :4, 4:], masks[1, :4, :4] = 1, 2, 255
    rows, labels = task.probe_rows(seen, torch.zeros(2, 3, 20, 20), masks, 100)
    # Centres lie at 4, 12 and 20 pixels; 20 is behind the image.
    assert rows.flatten().tolist() == [0, 1, 3, 4, 10, 12, 13]
    assert labels.tolist() == [0, 2, 1, 0, 2, 1, 0]
    rows, labels = task.probe_rows(seen, torch.zeros(2, 3, 20, 20), masks, 2)
    assert rows.flatten().tolist() == [0, 3, 10, 12]


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        for module in (probe, head_start):
            patch.setattr(module, "STRENGTHS", FEW)
        result = call("train", folder / "tiny.yaml", *BY_RUN, "--checkpoints.every_n_steps=2", "--out", folder / "run")
    assert result.status == 0, result.err
    return folder / "run"


class Killed(BaseException):
    """Ends a process where it stands; nothing handles it."""


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_in_one_go(whole, tmp_path, monkeypatch):
    step, left = Classification.training_step, [1, 5]

    def stopped(self, batch, batch_idx):
        if left and self.global_step == left[0]:
            left.pop(0)
            raise Killed
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", stopped)
    with pytest.raises(Killed):
        call("train", whole.parent / "tiny.yaml", *BY_RUN, "--checkpoints.every_n_steps=2", "--out", tmp_path / "run")
    with pytest.raises(Killed):  # it begins anew, since there is no checkpoint yet
        call("train", "--resume", tmp_path / "run")
    assert call("train", "--resume", tmp_path / "run").status == 0
    assert differences(whole, tmp_path / "run") == []
    assert json.loads((whole / "metrics.json").read_text())["head_start"]["strength"] in FEW


@pytest.mark.slow
def test_the_start_is_kept_where_no_epoch_is_better(whole, tmp_path):
    config = whole.parent / "tiny.yaml"
    result = call("train", config, *BY_RUN, "--model.lr=10", "--model.ema=0", "--out", tmp_path / "run")
    assert result.status == 0, result.err
    assert "Best of 2 epochs: epoch 0" in result.out
    assert "No epoch was better on validation than the probe" in result.out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["best_epoch"] == 0
    assert metrics["validation"] == pytest.approx(metrics["head_start"]["validation"])
    assert (tmp_path / "run/checkpoints/best-start-step0000000.ckpt").is_file()
    assert (tmp_path / "run/plots/learning_curves.png").is_file()
    # What is saved is the adapter at its start: as the method draws it.
    task = make(method=vispeft.SSF(), head_start=None)
    units = {k: v for k, v in task.bank.state_dict().items() if not k.startswith("head/")}
    content = read_checkpoint(tmp_path / "run/checkpoints/best-start-step0000000.ckpt")
    saved = vispeft.storage.files.read_adapter(tmp_path / "run/adapter")[1]
    assert saved.keys() == units.keys()
    assert len(content["state_dict"]) == len(units) + 2


@pytest.mark.slow
def test_a_run_below_the_probe_of_the_frozen_features_says_so(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(head_start, "_measure_frozen", lambda *_: {"strength": 1.0, "figure": 1.5})
    result = call("train", whole.parent / "tiny.yaml", *BY_RUN, "--method", "vpt", "--out", tmp_path / "run")
    assert result.status == 0, result.err
    assert "The probe of the frozen features alone is better on validation (accuracy 1.5000): vpt acts" in result.out
    assert json.loads((tmp_path / "run/metrics.json").read_text())["head_start"]["frozen"]["figure"] == 1.5


# ------------------------------------------------------------------ what is refused


def refused(cls, **settings):
    sizes = {} if "targets" in settings else {"num_classes": 3}
    return cls(**{"backbone": "no_such_backbone", "method": vispeft.LoRA(), **sizes, **settings})


@pytest.mark.parametrize(
    ("cls", "settings", "said"),
    [
        (Classification, {"head_start": "best"}, "head_start='best'): choose 'probe'"),
        (MultiLabel, {"head_start": "c.safetensors"}, "class embeddings start the classifier of the task Class"),
        (Segmentation, {"head_start": "c.safetensors", "decoder": "linear"}, "class embeddings start the classifier"),
        (Segmentation, {"head_start": "probe"}, "segformer has layers that are not linear"),
        (MultiTaskDense, {"head_start": "probe", "targets": DEPTH}, "another head (its decoder)"),
        (MetricLearning, {"head_start": "probe"}, "another head (its embedding head)"),
        (Classification, {"head_start": "probe", "method": LOW_BIT}, "has 1 bit per weight"),
    ],
)
def test_heads_that_are_not_linear_are_refused_before_there_is_a_backbone(cls, settings, said):
    with pytest.raises(ConfigError, match="head_start") as caught:
        refused(cls, **settings)
    assert said in str(caught.value)


def test_other_classifiers_and_other_data_are_refused_before_a_step(tmp_path):
    task = make()
    task.bank.put_head("default", nn.Sequential(nn.Linear(32, 10)))
    with pytest.raises(ConfigError, match="the classifier is a Sequential"):
        fit(task, tmp_path / "head")
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 16, 16), torch.arange(4)), batch_size=2)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(DataError, match="no data module of vispeft"):
        trainer.fit(make(), loader, loader)


def test_features_that_are_not_finite_are_told_and_the_next_training_fits_the_head(tmp_path):
    task = make()
    bias = task.model.blocks[0].mlp.fc1.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[0] = torch.nan
    with pytest.raises(TrainingError, match="53 rows of 53 rows of features are not finite"):
        fit(task, tmp_path / "broken", num_sanity_val_steps=0)
    assert task.head_start.record == {}
    with torch.no_grad():
        bias.copy_(kept)
    fit(task, tmp_path / "mended", max_steps=1)
    assert task.head_start.record["strength"] in FEW
    assert list(dict(read_history(tmp_path / "mended/logs/csv/metrics.csv")[task.monitor])) == [-1]


# ------------------------------------------------------------------ class embeddings


def embeddings(path, width=32, names=tuple("9876543210")):
    generator = torch.Generator().manual_seed(3)
    unit = nn.functional.normalize(torch.randn(len(names), 6, generator=generator), dim=-1)
    classes = ClassEmbeddings(unit, names, 20.0, torch.randn(6, width, generator=generator), "random")
    classes.save(path)
    return classes


@pytest.mark.slow
def test_class_embeddings_start_the_classifier(tmp_path):
    path = tmp_path / "classes.safetensors"
    classes = embeddings(path)
    task = make(head_start=str(path), lr=1e-12, weight_decay=0.0)
    data = DigitsData.for_model(task.model, **SMALL)
    with torch.no_grad():
        images = torch.cat([images for images, _ in data.plain_dataloader("train")])
        features = task.model.eval().forward_head(task.model.forward_features(images), pre_logits=True)
        wanted = classes.ordered(list("0123456789")).linear_weight(features)
    fit(task, tmp_path, data=data)
    torch.testing.assert_close(task.bank.head().weight.detach(), wanted, rtol=1e-5, atol=1e-5)
    assert task.bank.head().bias.abs().max() < 1e-6
    record = task.head_start.record
    assert (record["class_embeddings"], record["scale"]) == ("random", 20.0)
    assert record["images"] == {"train": 53}
    curve = dict(read_history(tmp_path / "logs/csv/metrics.csv")["validation/accuracy"])
    assert curve[-1] == pytest.approx(record["validation"]["accuracy"])


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"names": tuple("987654321")}, ConfigError, "first '0', have no embedding"),
        ({"width": 24}, ConfigError, "are for 24 features, and the classifier takes 32"),
        (None, FileError, "no file of class embeddings"),
    ],
    ids=["class", "width", "missing"],
)
def test_class_embeddings_that_do_not_fit_are_refused_before_a_step(settings, error, said, tmp_path):
    path = tmp_path / "classes.safetensors"
    if settings is not None:
        embeddings(path, **settings)
    task = make(head_start=str(path))
    data = DigitsData.for_model(task.model, **SMALL)
    with pytest.raises(error, match=said):
        task.head_start.check(task, data)
