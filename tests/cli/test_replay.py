"""A training that meets a value that is not finite, and where `vispeft replay` finds it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import vispeft
from tests.tiny import CONFIG, TINY
from vispeft.cli.config import ConfigCLI
from vispeft.cli.replay import advice, main, replay
from vispeft.cli.train import train
from vispeft.errors import FileError, TrainingError
from vispeft.tasks import Classification
from vispeft.tasks.failures import FAILURE, StepStart, keep_failure, read_failures
from vispeft.tasks.tracing import trace


def make(**settings: Any) -> Classification:
    torch.manual_seed(0)
    task = Classification(
        backbone="vit_tiny_patch16_224", backbone_args=TINY, method=vispeft.LoRA(rank=2), num_classes=3, **settings
    )
    return task.train()


def batch() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0])]


def model_of(task: Classification) -> Any:
    return task.model


def test_a_sound_step_has_no_origin() -> None:
    task = make()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    assert trace(task, batch(), 0) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in task.state_dict().items() if "metrics" not in name)
    assert all(p.grad is None for p in task.parameters())


@pytest.mark.parametrize("name", ["model.blocks.0.norm1.weight", "model.adapter_heads.default.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_named(name: str, value: float) -> None:
    task = make()
    with torch.no_grad():
        task.get_parameter(name)[1] = value
    found = trace(task, batch(), 0)
    assert found is not None
    assert (found.kind, found.place, found.broken, found.nan) == ("weight", name, 1, int(value != value))


def test_a_broken_image_is_named() -> None:
    images, labels = batch()
    images[2, 1, 3, 3] = torch.nan
    found = trace(make(), [images, labels], 0)
    assert found is not None
    assert (found.kind, found.place, found.broken) == ("batch", "batch[0]", 1)
    assert "doctor" in advice(found)


@pytest.mark.parametrize("place", ["blocks.1.attn.qkv", "blocks.0.norm2", "blocks.1.mlp.fc1"])
def test_an_overflow_of_float16_is_found_in_its_layer(place: str) -> None:
    task = make()
    with torch.no_grad():
        task.model.get_submodule(place).weight.normal_(3e4, 3e4)
    with torch.autocast("cpu", dtype=torch.float16):
        found = trace(task, batch(), 0)
    assert found is not None
    assert found.kind == "forward"
    assert found.place.startswith(f"model.{place[:8]}")
    assert found.largest > 1e3


def test_an_overflow_inside_attention_is_found_there() -> None:
    task = make()
    with torch.no_grad():
        task.model.get_submodule("blocks.0.attn.qkv").weight.normal_(0, 300)
        model_of(task).blocks[0].attn.fused_attn = False  # the fused kernel sums in float32
    with torch.autocast("cpu", dtype=torch.float16):
        found = trace(task, batch(), 0)
    assert found is not None
    assert found.place.startswith("model.blocks.0.attn")


def test_a_loss_that_divides_by_zero_is_found_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make()
    monkeypatch.setattr(task, "training_loss", lambda scores, targets: scores.sum() * 0 / (scores * 0).sum())
    found = trace(task, batch(), 0)
    assert found is not None
    assert (found.kind, found.place, found.operation) == ("forward", "loss", "div")


def test_a_gradient_alone_is_found_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make()
    monkeypatch.setattr(task, "training_loss", lambda scores, targets: (scores * 0).abs().sqrt().sum())
    found = trace(task, batch(), 0)
    assert found is not None
    assert found.kind == "backward"
    assert found.broken


def test_an_attention_mask_is_no_fault() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = x @ x.transpose(-1, -2)
            return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ x

    task = make()
    model_of(task).blocks[0].attn.proj_drop = Masked()
    assert trace(task, batch(), 0) is None


def test_a_training_keeps_the_step_and_says_how_to_look_at_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"vispeft replay .*run"):
        train(config, ["--model.lr=1e30", "--model.warmup=0", "--trainer.max_epochs=1"], out=run)
    kept = read_failures(run)[0]
    assert kept.batch[0].shape[0] == 256
    failure, origin = replay(run)
    assert "at step" in failure.told
    assert origin is not None
    main([str(run)])
    said = capsys.readouterr().out
    assert "First value that is not finite" in said
    assert origin.place in said


# ------------------------------------------------------------------ from the file that a run keeps, to the tensor


def _set(name: str, value: float) -> Any:
    """Plant a value in one entry of a trained tensor."""

    def plant(task: Any, images: torch.Tensor, at: torch.Generator) -> None:
        tensor = task.get_parameter(name).data.view(-1)
        tensor[int(torch.randint(len(tensor), (), generator=at))] = value

    return plant


def _scale(name: str, scale: float) -> Any:
    """Let a trained tensor be so large that a product with it leaves float16."""

    def plant(task: Any, images: torch.Tensor, at: torch.Generator) -> None:
        tensor = task.get_parameter(name).data
        tensor.copy_(scale * (1 + torch.rand(tensor.shape, generator=at)))

    return plant


def _pixel(value: float) -> Any:
    """Plant a value in one pixel."""

    def plant(task: Any, images: torch.Tensor, at: torch.Generator) -> None:
        pixels = images.view(-1)
        pixels[int(torch.randint(len(pixels), (), generator=at))] = value

    return plant


def _nothing(task: Any, images: torch.Tensor, at: torch.Generator) -> None:
    """Plant nothing: the loss is the fault."""


NAN, INF = float("nan"), float("inf")
QKV = "model.blocks.0.attn.qkv.adapters.default.ssf"
CASES: dict[str, tuple[Any, str, str, str, Any]] = {
    "NaN in a weight": (_set(f"{QKV}.scale", NAN), "32", "weight", f"{QKV}.scale", None),
    "infinity in the classifier": (
        _set("model.adapter_heads.default.weight", INF), "32", "weight", "model.adapter_heads.default.weight", None
    ),
    "NaN in an input": (_pixel(NAN), "32", "batch", "batch[0]", None),
    "infinity in an input": (_pixel(-INF), "bf16-mixed", "batch", "batch[0]", None),
    "NaN in a loss": (
        _nothing, "32", "forward", "loss", lambda _, scores, targets: scores.sum() * 0 / (scores * 0).sum()
    ),
    "infinity in a loss": (_nothing, "32", "forward", "loss", lambda _, scores, targets: -(scores * 0).sum().log()),
    "NaN in a gradient alone": (
        _nothing, "32", "backward", "", lambda _, scores, targets: (scores * 0).abs().sqrt().sum()
    ),
    "float16 in attention": (_scale(f"{QKV}.scale", 3e5), "16-mixed", "forward", "model.blocks.0.attn", None),
    "float16 behind a norm": (
        _scale("model.blocks.1.norm2.adapters.default.ssf.shift", 3e5), "16-mixed", "forward", "model.blocks.1.", None
    ),
    "float16 in an MLP": (
        _scale("model.blocks.1.mlp.fc1.adapters.default.ssf.scale", 3e6), "16-mixed", "forward", "model.blocks.1.mlp",
        None,
    ),
}  # fmt: skip
"""What is planted, the trainer's precision, where it is found, and another loss."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ten_seeded_faults_are_found_from_the_kept_step(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, precision, kind, place, loss = CASES[case]
    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = ConfigCLI(tmp_path / "config.yaml", [])
    cli.datamodule.fit_to(cli.model.preprocessing)
    cli.datamodule.setup()
    images, labels = next(iter(cli.datamodule.train_dataloader()))
    plant(cli.model.train(), images, torch.Generator().manual_seed(list(CASES).index(case)))
    trainer: Any = SimpleNamespace(global_step=4, current_epoch=1, precision=precision, global_rank=0)
    keep_failure(tmp_path, cli.model, trainer, StepStart.now([images, labels], 2), case)
    if loss is not None:
        monkeypatch.setattr(Classification, "training_loss", loss)
    failure, origin = replay(tmp_path)
    assert (failure.told, failure.step, failure.index) == (case, 4, 2)
    assert origin is not None
    assert origin.kind == kind
    assert origin.place.startswith(place)
    assert origin.broken


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="There is no run directory"):
        replay(tmp_path / "none")
    with pytest.raises(FileError, match="no step of it has met"):
        replay(tmp_path)
    (tmp_path / FAILURE).write_bytes(b"no file of torch")
    with pytest.raises(FileError, match="cannot be read"):
        replay(tmp_path)
