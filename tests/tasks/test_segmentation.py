"""The segmentation task: maps, decoders, what trains, what is stored, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import vispeft
from tests.tiny import TINY
from vispeft.data import ScenesData
from vispeft.errors import BackboneError, ConfigError, DataError, FileError, VerificationError
from vispeft.heads.pyramid import DensePyramid, MapReader
from vispeft.storage.files import read_decoder
from vispeft.tasks import Inference, Segmentation
from vispeft.tasks.callbacks import EpochPictures
from vispeft.tasks.losses import ohem_cross_entropy

SWIN = {"pretrained": False, "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
SWIN |= {"depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", {**TINY, "patch_size": 4}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", {**SWIN, "img_size": 32}),
    "eva": ("vit_small_patch16_dinov3", {**TINY, "img_size": 32}),
}


def make(backbone: str = "vit", **settings: Any) -> Segmentation:
    torch.manual_seed(0)
    name, arguments = BACKBONES[backbone]
    defaults = {"method": vispeft.SSF(), "decoder": "segformer", "decoder_args": {"channels": 16}, "num_classes": 3}
    return Segmentation(backbone=name, backbone_args=arguments, **{**defaults, **settings})


class Squares(pl.LightningDataModule):
    """Bright squares on a dark ground, and pixels without a label around them."""

    num_classes, class_names, target = 3, ("ground", "square", "stripe"), "mask"
    palette = ((0, 0, 0), (255, 0, 0), (0, 0, 255))

    def batches(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(8, 3, 16, 16, generator=generator) * 0.1
        masks = torch.zeros(8, 16, 16, dtype=torch.long)
        images[:, :, 4:12, 4:12] += 2
        masks[:, 4:12, 4:12] = 1
        images[:, 0, :, :3] -= 2
        masks[:, :, :3] = 2
        masks[:, 3] = 255
        return DataLoader(list(zip(images, masks, strict=True)), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = batches


def fit(task: Segmentation, epochs: int = 12) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, datamodule=Squares())
    return trainer


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("decoder", "levels"), [("segformer", "taps"), ("fcn", "taps"), ("linear", "taps")])
def test_scores_have_the_size_of_the_images(backbone: str, decoder: str, levels: Any) -> None:
    options = {} if decoder == "linear" else {"channels": 8}
    task = make(backbone, decoder=decoder, decoder_args=options, levels=levels).eval()
    for size in ((32, 32), (30, 41)):
        images = torch.randn(2, 3, *size)
        assert task(images).shape == (2, 3, *size)
        assert task.predict(images, (17, 50)).shape == (2, 17, 50)


@pytest.mark.parametrize("decoder", ["uper", "segformer"])
def test_a_plain_vit_has_a_pyramid_when_asked_for(decoder: str) -> None:
    task = make(decoder=decoder, levels="vitdet").eval()
    maps = task.reader(task.model, torch.randn(1, 3, 32, 32))
    assert [level.shape[-1] for level in maps] == [32, 16, 8, 4]
    assert task.reader.strides == [1, 2, 4, 8]
    assert task(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    assert any(name.startswith("reader.levels") for name, p in task.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "method",
    [vispeft.SSF(), vispeft.VPT(num_tokens=2), vispeft.LoRA(rank=2), vispeft.AdaptFormer(bits=1)],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_training_learns_and_leaves_the_base_alone(method: vispeft.Method, backbone: str, tmp_path: Path) -> None:
    task = make(backbone, method=method, lr=1e-2)
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    before = {name: tensor.clone() for name, tensor in task.named_parameters()}
    trainer = fit(task)
    changed = {name for name, tensor in task.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed <= trained
    assert {name for name in trained if name.startswith("decoder")} <= changed
    assert any(".adapters." in name for name in changed)
    scores = trainer.callback_metrics
    assert scores["validation/miou"] > 0.6
    assert set(scores) >= {f"validation/{name}" for name in ("miou", "macc", "aacc", "mdice")}

    images = torch.randn(2, 3, 16, 16)
    task.eval()
    with torch.no_grad():
        expected = task(images)
    task.save_adapter(tmp_path / "adapter")
    again = make(backbone, method=method)
    again.load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.eval()(images), expected)
    stored = read_decoder(tmp_path / "adapter")
    assert {name.partition(".")[0] for name in stored} == {"decoder"}
    # The same file on a plain timm model, which knows nothing of the decoder.
    model = make(backbone, method=vispeft.LinearProbe()).model
    vispeft.AdapterBank.of(model).detach("default")  # type: ignore[union-attr]
    model.load_state_dict({k: v for k, v in task.model.state_dict().items() if "adapters" not in k}, strict=False)
    vispeft.load(model, tmp_path / "adapter")
    with torch.no_grad():
        maps = DensePyramid(model.eval())(images)
        assert all(map(torch.equal, maps, task.reader(task.model, images)))


def test_figures_pictures_and_groups(tmp_path: Path) -> None:
    task = make(boundary=True, decoder_lr=3e-3, losses={"cross_entropy": 1.0, "dice": 0.5}, lr=1e-2)
    trainer = fit(task, 4)
    found = trainer.test(task, datamodule=Squares(), verbose=False)[0]
    assert 0 <= found["test/boundary_f"] <= 1
    details = task.details("test", {}, Squares.class_names)
    assert set(details["test_iou_per_class"]) == set(Squares.class_names)
    assert found["test/miou"] == pytest.approx(sum(details["test_iou_per_class"].values()) / 3)
    task.draw_results({}, Squares.class_names, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "confusion_matrix.png",
        "iou_per_class.png",
        "overlays_test.png",
    }
    groups = task.further_groups()
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(3e-3, 1e-4), (3e-3, 0.0)]
    held = {id(p) for group in groups for p in group["params"]}
    assert held == {id(p) for part in (task.reader, task.decoder) for p in part.parameters()}


def test_windows_are_used_in_validation() -> None:
    whole, slid = (make(inference=i).eval() for i in (None, Inference(mode="slide", window=16, stride=8)))
    images = torch.randn(1, 3, 32, 24)
    assert whole.predict(images).shape == slid.predict(images).shape == (1, 32, 24)
    data = Squares()
    data.smallest_size = (12, 40)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"12 x 40 .* sliding window has 16"):
        slid.check_data(data)
    whole.check_data(data)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="vqt changes the backbone's last feature"):
        make(method=vispeft.VQT())
    with pytest.raises(ConfigError, match="needs a pyramid"):
        make(decoder="uper")
    with pytest.raises(ConfigError, match="has one already"):
        make("swin", levels="vitdet")
    with pytest.raises(ConfigError, match="the model has 2 blocks"):
        make(taps=[0, 2])
    with pytest.raises(ConfigError, match="rising order"):
        make("swin", taps=[2, 1])
    with pytest.raises(VerificationError, match=r"taps \[0\].*blocks.1.*add the last block"):
        make(method=vispeft.LoRA(), taps=[0])
    with pytest.raises(ConfigError, match="segformr"):
        make(decoder="segformr")
    with pytest.raises(ConfigError, match="decoder_lr"):
        make(decoder_lr=0)
    with pytest.raises(ConfigError, match="2 class_weights and scores of 3 classes"):
        make(class_weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="ohem_min_kept=0"):
        make(ohem_min_kept=0)
    data = Squares()
    data.num_classes = 4
    with pytest.raises(DataError, match="4 classes, and the model was made for 3"):
        make().check_data(data)
    data.target = "class"
    with pytest.raises(DataError, match="Segmentation needs 'mask'"):
        make().check_data(data)


def test_a_decoder_of_another_task_is_refused(tmp_path: Path) -> None:
    make().save_adapter(tmp_path / "a")
    other = make(decoder="linear", decoder_args={})
    with pytest.raises(FileError):
        other.load_adapter(tmp_path / "a")


def test_maps_do_not_hold_prompts_and_taps_count_from_behind() -> None:
    task = make(method=vispeft.VPT(num_tokens=3))
    assert [tuple(level.shape) for level in task.reader(task.model, torch.randn(1, 3, 24, 16))] == [(1, 32, 6, 4)] * 2
    assert MapReader(task.model, [-1]).taps == [1]
    features = vispeft.create_model("swin_tiny_patch4_window7_224", pretrained=False, features_only=True)
    with pytest.raises(BackboneError, match="whole model"):
        MapReader(features)


@pytest.mark.parametrize("method", [vispeft.Full(), vispeft.SSF(), vispeft.NormTuning()], ids=lambda m: m.name)
def test_the_norm_of_a_pooled_feature_is_not_expected_to_train(method: vispeft.Method) -> None:
    name, arguments = BACKBONES["vit"]
    pooled = {**arguments, "global_pool": "avg"}
    task = Segmentation(backbone=name, backbone_args=pooled, num_classes=3, method=method, decoder="linear")
    task(torch.randn(1, 3, 16, 16)).sum().backward()
    without = {n for n, p in task.named_parameters() if p.requires_grad and p.grad is None}
    assert all("fc_norm" in name for name in without)


def test_half_precision_base() -> None:
    task = make(base_dtype="bfloat16")
    scores = task(torch.randn(1, 3, 16, 16))
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    loss: Tensor = task.loss(scores, torch.zeros(1, 16, 16, dtype=torch.long))
    loss.backward()
    assert all(p.grad is not None for p in task.decoder.parameters())


def test_a_batch_of_one_that_batch_norm_cannot_train_on_is_found_at_once() -> None:
    settings = {"decoder": "uper", "num_classes": 5}
    task = make("swin", decoder_args={"channels": 8}, **settings)
    alone, together = (9, False, 1, False), (10, False, 2, False)
    cases = (alone, (9, True, 1, True), (10, False, 1, True), together, (12, False, 2, True))
    for images, drop_last, processes, fits in cases:
        shares = {"validation": 3 / (images + 6), "test": 3 / (images + 6)}
        scenes = {"images": images + 6, "scene_size": 32, **shares}
        data = ScenesData.for_model(task.model, batch_size=4, drop_last=drop_last, **scenes)
        data.processes = processes
        assert len(data.split("train")) == images  # type: ignore[arg-type]
        if fits:
            task.check_data(data)
            continue
        each = "" if processes == 1 else " for each of 2 processes"
        with pytest.raises(DataError, match=f"1 image{each}, and the decoder 'uper' needs 2"):
            task.check_data(data)
        make("swin", decoder_args={"channels": 8, "pool_scales": [2, 3]}, **settings).check_data(data)


def test_layers_learn_more_slowly_and_the_decoder_does_not() -> None:
    task = make(method=vispeft.Full(), layer_decay=0.5, lr=1e-2, decoder_lr=3e-3)
    trainer = fit(task, 1)
    groups = trainer.optimizers[0].param_groups
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in task.decoder.parameters()} == {3e-3}
    named = {name: rates[id(p)] for name, p in task.model.named_parameters() if p.requires_grad}
    first, last = ({rate for name, rate in named.items() if f"blocks.{i}." in name} for i in (0, 1))
    assert len(first) == len(last) == 1
    assert first.pop() == pytest.approx(0.5 * last.pop())
    assert {group["name"] for group in groups} >= {"decoder decay", "decoder no_decay"}


def test_a_backbone_of_one_size_that_is_not_square() -> None:
    torch.manual_seed(0)
    arguments = {**TINY, "patch_size": 4, "img_size": (8, 16), "flexible_size": False}
    task = Segmentation(backbone="vit_tiny_patch16_224", backbone_args=arguments, num_classes=3, method=vispeft.SSF())
    assert task.eval()(torch.randn(1, 3, 8, 16)).shape == (1, 3, 8, 16)


def test_hard_pixels_are_as_many_as_asked_for() -> None:
    scores, masks = torch.randn(1, 3, 8, 8), torch.randint(3, (1, 8, 8))
    found = make(losses={"ohem": 1.0}, ohem_thresh=0.0, ohem_min_kept=5).loss(scores, masks)
    assert found == ohem_cross_entropy(scores, masks, thresh=0.0, min_kept=5)
    assert found > make().loss(scores, masks)


def test_pictures_of_data_without_names(tmp_path: Path) -> None:
    class Nameless(pl.LightningDataModule):
        train_dataloader = val_dataloader = Squares.batches

    task = make()
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, callbacks=[EpochPictures(tmp_path)],
    )  # fmt: skip
    trainer.fit(task, datamodule=Nameless())
    assert [path.name for path in tmp_path.iterdir()] == ["overlays_epoch_001.png"]
