"""The task of metric learning: head, criterion, warm-up, figures, files, resumption."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import nn

import vispeft
from tests.tasks.metric_toy import ToyMetricData
from tests.tasks.test_resume import Killed, leaves
from tests.tiny import TINY
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.heads.embedding import EmbeddingHead
from vispeft.tasks import Classification, MetricLearning
from vispeft.tasks.checkpoints import Cadence, RunCheckpoints, SealedCheckpointIO, find_checkpoint, read_checkpoint
from vispeft.tasks.logs import RunLog

pytestmark = pytest.mark.usefixtures("one_thread")


def make(method=None, **settings):
    seed_everything(0)
    settings = {"num_classes": 3, "dim": 8, "lr": 1e-2, "loss": "ProxyAnchorLoss", **settings}
    return MetricLearning(
        method=method or vispeft.LoRA(rank=2), backbone="vit_tiny_patch16_224", backbone_args=TINY, **settings
    )


def fit(task, epochs=2, data=None, **settings):
    trainer = Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=settings.pop("sanity", 0),
        **settings,
    )
    trainer.fit(task, datamodule=data or ToyMetricData())
    return trainer


# ------------------------------------------------------------------ head


def test_heads_and_their_starts():
    features = torch.randn(5, 16)
    for norm, init in (("none", "orthogonal"), ("affine", "xavier"), ("plain", "default")):
        head = EmbeddingHead(16, 16, norm=norm, init=init)
        wanted = features if norm == "none" else nn.functional.layer_norm(features, (16,), eps=1e-5)
        torch.testing.assert_close(head(features), nn.functional.linear(wanted, head.proj.weight, head.proj.bias))
        assert head.proj.bias.any() == (init == "default")
        assert len(list(head.parameters())) == (4 if norm == "affine" else 2)
        assert head(features.bfloat16()).dtype == torch.float32
    square = EmbeddingHead(16, 16)
    cosines = [
        nn.functional.normalize(x, dim=1) @ nn.functional.normalize(x, dim=1).T for x in (features, square(features))
    ]
    torch.testing.assert_close(*cosines)
    bound = math.sqrt(6 / (16 + 4))
    assert EmbeddingHead(16, 4, init="xavier").proj.weight.abs().max() <= bound
    for settings in ({"dim": 0}, {"norm": "batch"}, {"init": "zeros"}):
        with pytest.raises(ConfigError, match=f"EmbeddingHead\\({next(iter(settings))}="):
            EmbeddingHead(16, **{"dim": 4, **settings})


# ------------------------------------------------------------------ training


def test_training_improves_retrieval_of_other_classes_and_logs_the_figures():
    task = make(ks=(1, 2))
    trainer = fit(task, epochs=4, sanity=2)
    assert set(trainer.callback_metrics) == {
        "lr", "train/loss", *(f"validation/{n}" for n in ("recall@1", "recall@2", "map@r", "r_precision", "mrr"))
    }  # fmt: skip
    assert 0.5 < trainer.callback_metrics["validation/map@r"] <= 1
    assert not task.scores["validation"].labels  # checkpoints stay small
    embeddings = task.eval()(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_figures_are_those_of_the_library():
    task, data = make(), ToyMetricData(noise=0.6)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    [found] = trainer.test(task, datamodule=data, verbose=False)
    images, labels, _ = data.split("test").batch([(0, index) for index in range(len(data.split("test")))])
    with torch.no_grad():
        embeddings = task(images)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity(), batch_size=8),
    )
    wanted = calculator.get_accuracy(embeddings, labels)
    assert 0.05 < found["test/map@r"] < 0.95
    assert found["test/recall@1"] == pytest.approx(wanted["precision_at_1"], abs=1e-6)
    assert found["test/map@r"] == pytest.approx(wanted["mean_average_precision_at_r"], abs=1e-6)
    details = task.details("test", {"embeddings": embeddings, "labels": labels}, ())
    assert details == {"test_queries": 24, "test_lone_queries": 0, "similarity": {"name": "cosine"}}
    task.clusters = True
    assert 0 <= task.details("test", {"embeddings": embeddings, "labels": labels}, ())["test_nmi"] <= 1


def test_optimiser_groups_of_head_proxies_and_network():
    task = make(loss="Hist", head_norm="affine", head_lr=2e-2, proxy_lr=0.5, proxy_weight_decay=0.1, weight_decay=1e-3)
    groups = {group["name"]: group for group in task.further_groups()}
    shapes = {name: sorted(tuple(p.shape) for p in group["params"]) for name, group in groups.items()}
    assert shapes["proxies decay"] == [(3, 8), (3, 8)]
    assert shapes["decoder decay"] == [(8, 32)]
    assert shapes["decoder no_decay"] == [(8,), (32,), (32,)]
    assert [groups[n]["lr"] for n in ("proxies decay", "decoder decay", "criterion decay")] == [0.5, 2e-2, 1e-2]
    assert [groups[n]["weight_decay"] for n in ("proxies decay", "decoder decay", "decoder no_decay")] == [0.1, 1e-3, 0]
    count = sum(p.numel() for group in groups.values() for p in group["params"])
    assert count == sum(p.numel() for p in task.own_parameters())
    task = make(loss="Hist", head_norm="affine", weight_decay=1e-3, decay_vectors=True)
    assert {group["weight_decay"] for group in task.further_groups()} == {1e-3}
    assert sum(p.numel() for group in task.further_groups() for p in group["params"]) == count
    report = task.report()
    assert report.trained == sum(p.numel() for _, p in task.trainable_parameters())
    assert report.trained - report.deployed == sum(p.numel() for p in task.criterion.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": -1, "max_steps": 6}])
def test_a_schedule_of_more_epochs_than_are_trained(length):
    task = make(schedule_epochs=5, final_lr=1e-3, warmup=0.0)
    trainer = fit(task, **length, limit_val_batches=0)
    assert trainer.global_step == 6  # of three in an epoch
    fallen = (1 + math.cos(math.pi * 6 / 15)) / 2
    for group in trainer.optimizers[0].param_groups:
        assert group["lr"] == pytest.approx(1e-3 + 9e-3 * fallen)
    with pytest.raises(ConfigError, match=r"15 steps \(schedule_epochs\), and the training has 18"):
        fit(make(schedule_epochs=5), epochs=6)


@pytest.mark.slow
def test_a_warm_up_trains_head_and_proxies_alone():
    task = make(warm_epochs=1)
    before = {name: p.detach().clone() for name, p in task.trainable_parameters()}
    fit(task, epochs=1)
    changed = {name for name, p in task.trainable_parameters() if not torch.equal(p, before[name])}
    assert changed == {"head.proj.weight", "head.proj.bias", "criterion.loss.proxies"}
    task = make(warm_epochs=1)
    fit(task, epochs=2)
    assert all(not torch.equal(p, before[name]) for name, p in task.trainable_parameters())


@pytest.mark.slow
def test_embeddings_of_the_hyperbolic_loss_are_what_its_similarity_prepares():
    task = make(loss={"class_path": "Hyperbolic", "init_args": {"curvature": 0.2}})
    fit(task, epochs=1)
    images = torch.randn(3, 3, 16, 16)
    assert task.similarity.to_dict() == {"name": "hyperbolic", "curvature": 0.2, "clip": 2.3}
    assert task.output()["similarity"] == task.similarity.to_dict()
    torch.testing.assert_close(task.eval()(images), task.head(task.model(images)))
    torch.testing.assert_close(task.deployed().eval()(images), task(images))


# ------------------------------------------------------------------ criterion of a method


class Own(nn.Module):
    """A criterion with a state that no tensor of the checkpoint holds."""

    proxy_tensors = ("proxies",)

    def __init__(self, head, classes, dim):
        super().__init__()
        self.head, self.proxies, self.scale = (
            head,
            nn.Parameter(torch.randn(classes, dim)),
            nn.Parameter(torch.ones(())),
        )
        self.register_buffer("seen", torch.zeros(classes))
        self.steps, self.optimizer = 0, None

    def watch(self, optimizer):
        self.optimizer = optimizer

    def forward(self, embeddings, labels, images):
        assert images.shape[0] == len(embeddings)
        self.steps, self.seen = self.steps + 1, self.seen + labels.bincount(minlength=len(self.seen))
        return nn.functional.cross_entropy(self.scale * embeddings @ self.proxies.T, labels) * (1 + 0.1 * self.steps)

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


@dataclass(frozen=True, kw_only=True)
class Bringing(vispeft.LoRA):
    """LoRA with a criterion."""

    name: ClassVar[str] = "bringing_lora"

    def criterion(self, model, head, classes, dim):
        return Own(head, classes, dim)


def test_a_method_may_bring_its_criterion():
    task = make(Bringing(rank=2), proxy_lr=0.3)
    names = {group["name"]: len(group["params"]) for group in task.further_groups()}
    assert names["proxies decay"] == 1
    fit(task, epochs=1)
    assert task.criterion.steps == 3
    assert task.criterion.seen.sum() == 24
    assert task.criterion.optimizer is not None
    with pytest.raises(ConfigError, match="brings its own criterion"):
        make(Bringing(rank=2), memory=16)


def test_a_loss_beside_the_criterion_of_a_method_is_named_in_a_warning(caplog):
    make(Bringing(rank=2), loss=None)
    assert "is not used" not in caplog.text
    make(Bringing(rank=2), loss="TripletMarginLoss")
    assert "bringing_lora brings its own criterion, and the loss TripletMarginLoss is not used" in caplog.text


def test_class_prompts_in_host_memory_need_a_step_after_each_batch():
    task = make(vispeft.VPTSP(num_tokens=2, bank=True))
    with pytest.raises(ConfigError, match="accumulate_grad_batches is 2"):
        fit(task, epochs=1, accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match="Leave ema out"):
        make(vispeft.VPTSP(num_tokens=2, bank=True), ema=0.5)
    before = task.criterion.prompts.bank.clone()
    fit(task, epochs=1)
    assert not torch.equal(task.criterion.prompts.bank, before)


# ------------------------------------------------------------------ checks


def test_bad_settings_are_refused():
    for settings in (
        {"head_lr": 0},
        {"proxy_lr": math.nan},
        {"proxy_weight_decay": -1},
        {"warm_epochs": -1},
        {"memory": 20.5},
        {"dim": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            make(**settings)
    known = {"image_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    with pytest.raises(DataError, match="Make memory larger"):
        make(loss="ContrastiveLoss", memory=8).check_data(ToyMetricData(batch_size=12, **known))
    task, data = make(loss="ContrastiveLoss", memory=16), ToyMetricData(batch_size=12, **known)
    task.check_data(data)
    data.processes = 2
    with pytest.raises(DataError, match="A batch of all processes has 24 images, and the memory holds 16"):
        task.check_data(data)
    with pytest.raises(DataError, match="has 24 images, and the memory holds 16"):  # as in a loop of one's own
        task.criterion(torch.randn(24, 8), torch.arange(24) % 3)
    with pytest.raises(DataError, match="images_per_class to 2 or more"):
        make(loss="RecallAtK").check_data(ToyMetricData(images_per_class=1, **known))
    with pytest.raises(DataError, match="images_per_class to 2 or more"):
        make(loss="NTXentLoss").check_data(ToyMetricData(images_per_class=1, **known))
    make(loss="NTXentLoss", memory=16).check_data(ToyMetricData(images_per_class=1, **known))
    make().check_data(ToyMetricData(images_per_class=1, **known))
    with pytest.raises(ConfigError, match="at least 8 is needed"):
        make(loss="ContrastiveLoss", memory=4)
    with pytest.raises(DataError, match="MetricLearning"):
        Classification(
            method=vispeft.SSF(), backbone="vit_tiny_patch16_224", backbone_args=TINY, num_classes=3
        ).check_data(ToyMetricData())


# ------------------------------------------------------------------ files


def test_the_adapters_file_has_the_head_and_no_proxies(tmp_path):
    task = make(head_norm="affine")
    with torch.no_grad():
        for _, parameter in task.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    task.bank.annotate(output=task.output())
    task.save_adapter(tmp_path / "adapter")
    images = torch.randn(3, 3, 16, 16)
    other = make(head_norm="affine", num_classes=7)  # other training classes
    other.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(other.eval()(images), task.eval()(images))
    assert not any("proxies" in key for key in task.head_tensors())
    with pytest.raises(FileError):
        make(dim=4).load_adapter(tmp_path / "adapter")


# ------------------------------------------------------------------ resumption


class Stopping(MetricLearning):
    stop = None

    def training_step(self, batch, batch_idx):
        if self.stop == (self.current_epoch, batch_idx):
            raise Killed
        return super().training_step(batch, batch_idx)


def run(folder, stop=None, **settings):
    """Train for three epochs, going on with what is in the folder."""
    seed_everything(0)
    method = settings.pop("method", vispeft.LoRA(rank=2, dropout=0.2))
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "num_classes": 3, "dim": 8, **settings}
    task = Stopping(method=method, lr=1e-2, proxy_lr=0.1, warm_epochs=1, **settings)
    task.stop, found = stop, find_checkpoint(folder / "checkpoints")
    checkpoints = RunCheckpoints(folder / "checkpoints", monitor=task.monitor, cadence=Cadence(every_n_steps=1))
    trainer = Trainer(
        max_epochs=3,
        default_root_dir=folder,
        callbacks=[checkpoints],
        plugins=[SealedCheckpointIO()],
        logger=RunLog(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = None if found is None else str(found.path)
    try:
        trainer.fit(task, datamodule=ToyMetricData(), ckpt_path=path, weights_only=True)
    except Killed:
        return
    assert stop is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "proxies", "own", "vptsp", "vptsp_bank"])
def test_a_training_stopped_in_the_middle_goes_on_as_if_it_had_not(tmp_path, kind):
    settings = {
        "memory": {"loss": "ContrastiveLoss", "miner": "PairMarginMiner", "memory": 20, "ema": 0.5},
        "proxies": {"loss": "SoftTripleLoss"},
        "own": {"method": Bringing(rank=2)},
        "vptsp": {"method": vispeft.VPTSP(num_tokens=2, state_dropout=0.2)},
        "vptsp_bank": {"method": vispeft.VPTSP(num_tokens=2, class_tokens=2, class_step=1, bank=True)},
    }[kind]
    run(tmp_path / "whole", **settings)
    for stop in ((0, 1), (2, 2), None):
        run(tmp_path / "parts", stop, **settings)
    whole, parts = (
        read_checkpoint(find_checkpoint(tmp_path / name / "checkpoints").path) for name in ("whole", "parts")
    )
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert any(key.startswith("criterion.") for key in whole["state_dict"])
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "criterion", "average"):
        for (place, first), (other, second) in zip(leaves(whole.get(key)), leaves(parts.get(key)), strict=True):
            assert place == other
            assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second, place
