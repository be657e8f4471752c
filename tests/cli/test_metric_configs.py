"""The published recipes of VPTSP as configs: every value of the public code, and what trains by them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from tests.tiny import TINY
from vispeft.building.config_files import read_config
from vispeft.building.methods import build_method
from vispeft.cli import settings
from vispeft.cli.config import build_data, build_task
from vispeft.cli.config_keys import check_config
from vispeft.core.families import describe
from vispeft.data.augmentation import Augmentation
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import FileError
from vispeft.heads.embedding import EmbeddingHead
from vispeft.resources import find_config
from vispeft.tasks.trainer_checks import check_schedule


@dataclass(frozen=True)
class Published:
    """A row of the released configurations (Noahsark/ParameterEfficient-DML c7c9416)."""

    optimizer: str
    lr: float
    proxy_lr: float
    decay: float
    period: int
    """Epochs of the cosine, T_max."""
    least: float
    """Rate at its end, eta_min."""
    epochs: int
    batch: tuple[int, int]
    """Images, and images of a class."""
    batches: int
    """Batches of an epoch."""
    prompts: tuple[int, int, int]
    """Shared prompts, blocks with any, and fewer in each block than in the one before."""
    own: tuple[int, int, int]
    """The same of class prompts."""
    share: float
    dropout: float
    dim: int
    trained: int
    """All values that train, with every class of the set."""
    host: bool
    """Whether class prompts are in host memory."""


PUBLISHED = {
    "cub": Published(
        *("SGD", 5e-3, 0.1, 1e-6, 50, 1e-8, 15, (64, 2), 91, (10, 12, 0), (3, 12, 0), 0.5, 0.0, 384, 2_701_824, False)
    ),
    "cars196": Published(
        *("AdamW", 5e-4, 0.01, 0.0, 50, 1e-6, 50, (64, 2), 125, (80, 11, 2), (50, 8, 2)),
        *(0.7, 0.0, 384, 16_663_296, False),
    ),
    "sop": Published(
        *("AdamW", 1e-4, 0.05, 1e-4, 120, 5e-5, 120, (32, 1), 1860, (90, 12, 0), (5, 12, 0)),
        *(0.2, 0.1, 384, 266_762_496, True),
    ),
    "inshop": Published(
        *("AdamW", 1e-4, 0.05, 1e-7, 100, 5e-6, 80, (32, 1), 808, (90, 12, 0), (80, 12, 0)),
        *(0.2, 0.1, 384, 1_476_638_592, True),
    ),
    "inaturalist": Published(
        *("AdamW", 1e-4, 0.05, 0.0, 50, 1e-6, 40, (64, 1), 5091, (90, 12, 5), (10, 12, 0)),
        *(0.2, 0.0, 512, 530_601_472, True),
    ),
}

each = pytest.mark.parametrize("name", PUBLISHED)


def tree_of(name: str) -> dict[str, Any]:
    config = f"metric_learning/{name}_vptsp"
    tree = read_config(find_config(config))
    check_config(tree, [], config)
    return tree


def settings_of(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["model"]["init_args"]


@each
def test_what_trains_is_what_the_public_code_trains(name: str) -> None:
    wanted, tree = PUBLISHED[name], tree_of(name)
    data, given = build_data(tree["data"], [], name), settings_of(tree)
    classes = data.counts["train"][1]
    with torch.device("meta"):  # the class prompts of In-Shop have 5.5 GiB
        model = timm.create_model(given["backbone"], num_classes=0)
        head = EmbeddingHead(model.embed_dim, given["dim"], norm=given["head_norm"], init=given["head_init"])
        method = build_method(given["method"])
        criterion = method.criterion(model, head, classes, given["dim"])
    size = sum(p.numel() for p in head.parameters())
    assert method.parameter_count(describe(model)) + size + criterion.trainable == wanted.trained
    assert criterion.steps_each_batch == wanted.host


@each
def test_batches_images_and_epochs_are_the_published_ones(name: str) -> None:
    wanted, tree = PUBLISHED[name], tree_of(name)
    data = build_data(tree["data"], [], name)
    assert (data.batch_size, data.images_per_class) == wanted.batch
    assert data.counts["train"][0] // data.batch_size == wanted.batches
    assert data.augment == Augmentation(crop="resized", crop_area=(0.08, 1.0), flip=0.5)
    data.fit_to(Preprocessing(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic"))
    assert (data.preprocessing.interpolation, data.preprocessing.crop_pct) == ("bilinear", 224 / 256)
    trainer = tree["trainer"]
    assert (trainer["max_epochs"], trainer["precision"]) == (wanted.epochs, "16-mixed")
    assert "gradient_clip_val" not in trainer
    settings.check_settings(trainer)
    assert not data.validation_chooses  # the last epoch is the result, and never the best one on the test classes


@pytest.mark.slow
@each
def test_the_optimiser_and_its_rates_are_the_published_ones(name: str) -> None:
    wanted, tree = PUBLISHED[name], tree_of(name)
    settings_of(tree).update(backbone="vit_tiny_patch16_224", backbone_args={**TINY, "depth": 12})
    task = build_task(tree["model"], 4, name)
    check_schedule(task.schedule_epochs, tree["trainer"]["max_epochs"])
    steps = wanted.epochs * wanted.batches
    task._trainer = SimpleNamespace(
        estimated_stepping_batches=steps,
        train_dataloader=(),
        num_training_batches=wanted.batches,
        accumulate_grad_batches=1,
        precision_plugin=None,
    )
    made = task.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert type(optimizer).__name__ == wanted.optimizer
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for _, p in task.trainable_parameters()}
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        highest = wanted.proxy_lr if group["name"].startswith("proxies") else wanted.lr
        assert (base, group["weight_decay"], group.get("momentum", 0.9)) == (highest, wanted.decay, 0.9)
        for step in (0, steps // 2, steps - 1):
            fallen = (1 + math.cos(math.pi * step / (wanted.period * wanted.batches))) / 2
            assert base * factor(step) == pytest.approx(wanted.least + (highest - wanted.least) * fallen, rel=1e-9)


@each
def test_the_method_is_the_published_one(name: str) -> None:
    wanted, given = PUBLISHED[name], settings_of(tree_of(name))
    method = build_method(given["method"])
    assert (method.num_tokens, method.depth or 12, method.step) == wanted.prompts
    assert (method.class_tokens, method.class_depth or 12, method.class_step) == wanted.own
    assert (method.learned_share, method.state_dropout) == (wanted.share, wanted.dropout)
    assert (method.integrator, method.loss, method.against, method.pull) == ("gru_relu", "anchor", "all", "all")
    assert (method.alpha, method.margin, method.train_biases) == (32, 0.1, True)
    assert given["backbone"] == f"vit_{'base' if name == 'inaturalist' else 'small'}_patch16_224.augreg_in21k"
    assert (given["dim"], given["head_norm"], given["head_init"]) == (wanted.dim, "affine", "xavier")


def test_room_on_the_disk_counts_class_prompts_in_host_memory(tmp_path, monkeypatch) -> None:
    """They are in every checkpoint, and are no parameters."""
    monkeypatch.setattr(settings.shutil, "disk_usage", lambda _: SimpleNamespace(free=63 * 2**30))
    task = SimpleNamespace(trainable_parameters=list, report=lambda: SimpleNamespace(trained=2**30))
    with pytest.raises(FileError, match=r"has 64,512 MiB left, .* need about 65,5"):
        settings.check_room(tmp_path / "run", task)
