# ruff: noqa: E402 - mmsegmentation may be missing, and is made importable by the plug-in
import importlib
from types import SimpleNamespace

import pytest

pytest.importorskip("mmseg")
importlib.import_module("vispeft.mmseg")

import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmseg.apis import init_model

from tests.mmseg.toy import (
    backbone_of,
    make_config,
)
from vispeft.errors import ConfigError
from vispeft.mmseg import save_adapter
from vispeft.storage.files import read_adapter, read_decoder


def groups_of(weights, peft, **wrapper):
    model = torch.nn.ModuleDict(
        {"backbone": backbone_of("vit", weights, peft=peft), "decode_head": torch.nn.Conv2d(4, 2, 1)}
    )
    config = {"constructor": "VispeftOptimWrapperConstructor", "type": "OptimWrapper", **wrapper}
    with DefaultScope.overwrite_default_scope("mmseg"):
        optimizer = build_optim_wrapper(model, config).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }, model


def test_optimiser_follows_the_units_and_mmengine(weights):
    adamw = {"type": "AdamW", "lr": 0.1, "weight_decay": 0.5}
    rules = {"custom_keys": {"decode_head": {"lr_mult": 10.0}}, "bias_decay_mult": 0.0}
    found, model = groups_of(weights, {"type": "lora_plus"}, optimizer=adamw, paramwise_cfg=rules)
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for group in model["backbone"].bank.parameter_groups(0.1, 0.5):
        for parameter in group["params"]:
            name = next(name for name, p in model.named_parameters() if p is parameter)
            assert found[name] == (group["lr"], group["weight_decay"])
    assert len({lr for name, (lr, _) in found.items() if name.startswith("backbone")}) == 2
    assert found["decode_head.weight"] == (1.0, 0.5)


def test_optimiser_rule_for_the_whole_backbone(weights):
    sgd = {"type": "SGD", "lr": 0.1}
    found, _ = groups_of(
        weights, {"type": "SSF"}, optimizer=sgd, paramwise_cfg={"custom_keys": {"backbone": {"lr_mult": 0.5}}}
    )
    assert {group for name, group in found.items() if name.startswith("backbone")} == {(0.05, 0.0)}
    assert found["decode_head.bias"] == (0.1, 0)
    found, _ = groups_of(
        weights, {"type": "lora"}, optimizer={"type": "AdamW", "lr": 0.1, "weight_decay": 0.5},
        paramwise_cfg={"custom_keys": {"backbone": {"decay_mult": 0.2}}},
    )  # fmt: skip
    assert {group for name, group in found.items() if name.startswith("backbone")} == {(0.1, 0.1)}
    assert found["decode_head.weight"] == (0.1, 0.5)
    with pytest.raises(ConfigError, match="lr"):
        groups_of(weights, {"type": "SSF"}, optimizer={"type": "AdamW"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_head": {"in_channels": [32, 32, 64]}}, "in_channels is .* have .32, 32, 32"),
        ({"decode_head": {"in_index": [0, 1, 7]}}, "gives 3 maps"),
        ({"decode_head": {"num_classes": 7}}, "num_classes is 7.* 3 classes"),
        ({"decode_head": {"type": "UPerHead"}}, "pyramid.*vitdet"),
        ({"decode_head": {"in_index": [0, 1], "in_channels": [32, 32]}}, "no head reads the backbone's last map"),
    ],
)
@pytest.mark.slow
def test_parts_that_do_not_fit_are_refused_before_the_first_step(toy, weights, tmp_path, changes, message):
    config = make_config("vit", toy, weights, tmp_path)
    config.merge_from_dict({"model": changes})
    with pytest.raises(ConfigError, match=message):
        Runner.from_cfg(config).train()


def test_a_last_batch_of_one_image_is_refused_before_the_first_step(toy, weights, tmp_path):
    config = make_config("swin", toy, weights, tmp_path)
    config.merge_from_dict({"model": {"decode_head": {"type": "UPerHead", "pool_scales": (1, 2)}}})
    config.merge_from_dict({"train_dataloader": {"batch_size": 3, "sampler": {"type": "DefaultSampler"}}})  # 3 + 1
    config.train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 1}
    runner = Runner.from_cfg(config)
    with pytest.raises(ConfigError, match=r"each epoch has 1 image, and decode_head needs 2 for its BatchNorm"):
        runner.train()
    assert runner.iter == 0
    assert not list(tmp_path.glob("*.pth"))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
def test_cascades_of_heads_are_checked_and_saved(toy, weights, tmp_path):
    config = make_config("vit", toy, weights, tmp_path)
    first = {"type": "FCNHead", "in_channels": 32, "in_index": 2, "channels": 8, "num_classes": 3}
    second = {**first, "type": "OCRHead", "ocr_channels": 4}
    config.model.update(type="CascadeEncoderDecoder", num_stages=2, decode_head=[first, second])
    config.train_cfg.max_iters = 1
    Runner.from_cfg(config).train()
    header, _, _ = read_adapter(tmp_path / "adapter")
    assert header["output"]["decoder"]["name"] == "OCRHead"
    names = read_decoder(tmp_path / "adapter")
    assert {name.split(".")[1] for name in names if name.startswith("decoder.")} == {"0", "1"}
    config.model.decode_head[1].num_classes = 7
    with pytest.raises(ConfigError, match=r"decode_head\[1\].num_classes is 7"):
        Runner.from_cfg(config).train()


def test_decoder_is_loaded_although_there_is_nothing_to_resume(toy, weights, tmp_path):
    config = make_config("vit", toy, weights, tmp_path)
    source = init_model(config, device="cpu")
    save_adapter(source, tmp_path / "source")
    still = {"type": "SGD", "lr": 1e-30}
    wrapper = {"type": "OptimWrapper", "constructor": "VispeftOptimWrapperConstructor", "optimizer": still}
    hooks = [{"type": "VispeftHook", "decoder": str(tmp_path / "source")}]
    config.merge_from_dict({"custom_hooks": hooks, "resume": True, "work_dir": str(tmp_path / "run")})
    config.optim_wrapper = wrapper
    runner = Runner.from_cfg(config)
    runner.train()
    torch.testing.assert_close(runner.model.decode_head.conv_seg.weight, source.decode_head.conv_seg.weight)


@pytest.mark.slow
def test_best_adapter_by_each_metric(toy, weights, tmp_path):
    config = make_config("vit", toy, weights, tmp_path)
    config.default_hooks.checkpoint.save_best = ["mIoU", "aAcc"]
    Runner.from_cfg(config).train()
    for name in ("mIoU", "aAcc"):
        header, _, _ = read_adapter(tmp_path / f"adapter_best_{name}")
        assert name in header["metrics"]


def test_hook_needs_the_backbone():
    from vispeft.mmseg import VispeftHook

    with pytest.raises(ConfigError, match="no VispeftBackbone"):
        VispeftHook().before_train(SimpleNamespace(model=torch.nn.Identity()))
