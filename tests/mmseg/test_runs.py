# ruff: noqa: E402 - mmsegmentation may be missing, and is made importable by the plug-in
import importlib
import json

import pytest

pytest.importorskip("mmseg")
importlib.import_module("vispeft.mmseg")

import torch
from mmengine.runner import Runner
from mmseg.apis import inference_model, init_model
from safetensors.torch import save_file

import vispeft
from tests.mmseg.toy import (
    BACKBONES,
    CLASSES,
    backbone_of,
    close,
    image_of,
    logits,
    make_config,
    plain,
    reloaded,
)
from vispeft.errors import BaseMismatchError, ConfigError, FileError
from vispeft.heads.pyramid import MapReader
from vispeft.mmseg import load_decoder, merge
from vispeft.storage.files import read_adapter
from vispeft.tasks.segmentation import Segmentation


def test_trains_validates_and_infers(trained, toy):
    (log,) = trained.place.glob("*/vis_data/scalars.json")
    assert any("mIoU" in json.loads(line) for line in log.read_text().splitlines())
    model = reloaded(trained)
    found = inference_model(model, image_of(toy))
    assert found.pred_sem_seg.data.shape == (1, 64, 96)
    assert model.dataset_meta["classes"] == CLASSES
    trained.model.cfg = model.cfg
    torch.testing.assert_close(found.seg_logits.data, logits(trained.model, toy), rtol=0, atol=0)


@pytest.mark.slow
def test_backbone_alone_works_in_a_config_of_somebody_else(toy, weights, tmp_path):
    config = make_config("swin", toy, weights, tmp_path)
    rules = {"custom_keys": {"norm": {"decay_mult": 0.0}, "head": {"lr_mult": 10.0}}}
    adamw = {"type": "AdamW", "lr": 0.01, "weight_decay": 0.01}
    config.optim_wrapper = {"type": "OptimWrapper", "optimizer": adamw, "paramwise_cfg": rules}
    config.custom_hooks = []
    config.model.test_cfg = {"mode": "slide", "crop_size": (64, 64), "stride": (42, 42)}
    runner = Runner.from_cfg(config)
    frozen = {name: t.clone() for name, t in runner.model.backbone.state_dict().items() if "adapters" not in name}
    runner.train()
    model = init_model(config, str(tmp_path / "iter_2.pth"), device="cpu")
    assert inference_model(model, image_of(toy)).pred_sem_seg.data.shape == (1, 64, 96)
    runner.model.eval().cfg = model.cfg
    torch.testing.assert_close(logits(model, toy), logits(runner.model, toy), rtol=0, atol=0)
    assert all(torch.equal(model.backbone.state_dict()[name], tensor) for name, tensor in frozen.items())


def test_only_adapter_and_decoder_train(trained):
    frozen = {f"backbone.{name}" for name in trained.model.backbone.frozen_keys()}
    after = trained.model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, trained.before[name])}
    assert frozen
    assert not changed & frozen
    assert any("ssf" in name for name in changed)
    assert any(name.startswith("decode_head") for name in changed)
    trained.model.train()
    assert not trained.model.backbone.model.patch_embed.training
    assert trained.model.decode_head.training
    trained.model.eval()


def test_checkpoint_has_nothing_of_the_backbone(trained):
    content = torch.load(trained.place / "iter_2.pth", weights_only=True)
    frozen = {f"backbone.{name}" for name in trained.model.backbone.frozen_keys()}
    assert set(content["state_dict"]) == (set(trained.before) - frozen) | {"backbone.base_fingerprint"}
    trainable = {id(p) for p in trained.model.parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in content["optimizer"]["param_groups"]) == len(trainable)


@pytest.mark.parametrize("folder", ["adapter", "adapter_best"])
def test_adapter_acts_on_a_plain_model(trained, weights, folder):
    model = plain(trained.family, weights)
    bank = vispeft.load(model, trained.place / folder)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = MapReader(model, BACKBONES[trained.family]["out_indices"])(model.eval(), images)
        for level, expected in zip(found, trained.model.backbone(images), strict=True):
            close(level, expected)
    assert bank.notes()["class_names"] == list(CLASSES)
    assert bank.notes()["preprocessing"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    metrics = bank.notes()["metrics"]
    assert (metrics is not None and "mIoU" in metrics) == (folder == "adapter_best")


def test_lightning_and_mmseg_give_equal_scores(trained, toy, weights, tmp_path):
    backbone = BACKBONES[trained.family]
    task = Segmentation(
        backbone=backbone["model"],
        backbone_args=backbone["model_args"],
        weights=str(weights[trained.family]),
        taps=backbone["out_indices"],
        method=vispeft.SSF(),
        num_classes=len(CLASSES),
        decoder="segformer",
        decoder_args={"channels": 16},
    )
    task.load_adapter(trained.place / "adapter")
    task.eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = task.reader(task.model, images)
        for level, expected in zip(maps, trained.model.backbone(images), strict=True):
            close(level, expected)
        close(task.decoder(maps), trained.model.decode_head(trained.model.backbone(images)))
    # and back
    task.save_adapter(tmp_path / "adapter")
    config = make_config(trained.family, toy, weights, tmp_path, peft={"load": str(tmp_path / "adapter")})
    model = init_model(config, device="cpu")
    load_decoder(model, tmp_path / "adapter")
    model.cfg = trained.model.cfg = config
    close(logits(model, toy), logits(trained.model, toy))


def test_merged_segmentor_is_plain_and_equal(trained, toy, tmp_path):
    model = reloaded(trained)
    before = logits(model, toy)
    report = merge(model, tmp_path)
    assert report.merged
    close(logits(model, toy), before)
    deployed = init_model(str(tmp_path / "config.py"), str(tmp_path / "model.pth"), device="cpu")
    assert deployed.backbone.bank is None
    assert not any("adapters" in name for name in deployed.state_dict())
    close(logits(deployed, toy), before)
    del deployed.cfg
    with pytest.raises(ConfigError, match="One VispeftBackbone with an adapter"):
        merge(deployed)


@pytest.mark.slow
def test_runs_go_on_and_keep_an_average(toy, weights, tmp_path):
    average = [{"type": "VispeftHook"}, {"type": "EMAHook", "momentum": 0.5}]
    options = {"custom_hooks": average, "peft": {"type": "LoRA", "rank": 2}}
    Runner.from_cfg(make_config("vit", toy, weights, tmp_path, **options)).train()
    content = torch.load(tmp_path / "iter_2.pth", weights_only=True)
    _, units, _ = read_adapter(tmp_path / "adapter")
    averaged, last = content["state_dict"], content["ema_state_dict"]
    key = "backbone.model.blocks.0.attn.qkv.adapters.default."
    names = [name for name in averaged if name.startswith(key)]
    assert names
    for name in names:
        (saved,) = [t for unit, t in units.items() if unit.startswith("blocks.0.attn") and same(t, averaged[name])]
        assert not torch.equal(saved, last[f"module.{name}"]) or not saved.any()
    longer = {"train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 3, "val_interval": 3}, "resume": True}
    runner = Runner.from_cfg(make_config("vit", toy, weights, tmp_path, **options, **longer))
    runner.train()
    assert runner.iter == 3


def same(one, other):
    return one.shape == other.shape and torch.equal(one, other)


def test_checkpoint_is_refused_on_other_weights(trained, toy, weights, tmp_path):
    tensors = plain(trained.family, weights).state_dict()
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, other)
    config = make_config(trained.family, toy, {trained.family: other}, tmp_path)
    with pytest.raises(BaseMismatchError, match="other weights"):
        init_model(config, str(trained.place / "iter_2.pth"), device="cpu")


def test_checkpoint_of_another_method_is_refused(trained, toy, weights, tmp_path):
    config = make_config(trained.family, toy, weights, tmp_path, peft={"type": "LoRA"})
    with pytest.raises(FileError, match=r"lacks .*lora.*has .*ssf"):
        init_model(config, str(trained.place / "iter_2.pth"), device="cpu")


@pytest.mark.parametrize("slim", [True, False])
def test_state_dict_loads_strictly_with_and_without_the_base(weights, slim):
    source, target = (backbone_of("vit", weights, peft={"type": "SSF"}) for _ in range(2))
    state = {f"net.{name}": tensor for name, tensor in source.state_dict().items()}
    for name in state:
        if "ssf" in name:
            state[name] = torch.randn_like(state[name])
    if slim:
        source.slim(state, "net.")
        assert len(state) < len(source.state_dict())
    outer = torch.nn.ModuleDict({"net": target})
    outer.load_state_dict(state, strict=True)
    assert all(torch.equal(outer.state_dict()[name], t) for name, t in state.items() if "ssf" in name)


def test_random_base_stays_in_the_checkpoint(toy, weights, tmp_path):
    config = make_config("vit", toy, weights, tmp_path)
    config.model.backbone.update(weights=None, pretrained=False)
    runner = Runner.from_cfg(config)
    runner.train()
    model = init_model(config, str(tmp_path / "iter_2.pth"), device="cpu")
    runner.model.eval().cfg = model.cfg
    torch.testing.assert_close(logits(model, toy), logits(runner.model, toy), rtol=0, atol=0)
