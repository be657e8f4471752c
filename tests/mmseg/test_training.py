# ruff: noqa: E402 - mmsegmentation may be missing, and is made importable by the plug-in
import importlib
from types import SimpleNamespace

import pytest

pytest.importorskip("mmseg")
importlib.import_module("vispeft.mmseg")

import torch
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

from tests.mmseg.toy import (
    backbone_of,
    make_config,
)
from vispeft.errors import ConfigError


def groups_of(weights, peft, **wrapper):
    model = torch.nn.ModuleDict(
        {"backbone": backbone_of("vit", weights, peft=peft), "decode_head": torch.nn.Conv2d(4, 2, 1)}
    )
    config = {"constructor": "VispeftOptimWrapperConstructor", "type": "OptimWrapper", **wrapper}
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
    with pytest.raises(ConfigError, match="lr"):
        groups_of(weights, {"type": "SSF"}, optimizer={"type": "AdamW"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_head": {"in_channels": [32, 32, 64]}}, "in_channels is .* have .32, 32, 32"),
        ({"decode_head": {"in_index": [0, 1, 7]}}, "gives 3 maps"),
        ({"decode_head": {"num_classes": 7}}, "num_classes is 7.* 3 classes"),
        ({"decode_head": {"type": "UPerHead"}}, "pyramid.*vitdet"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_the_first_step(toy, weights, tmp_path, changes, message):
    config = make_config("vit", toy, weights, tmp_path)
    config.merge_from_dict({"model": changes})
    with pytest.raises(ConfigError, match=message):
        Runner.from_cfg(config).train()


def test_hook_needs_the_backbone():
    from vispeft.mmseg import VispeftHook

    with pytest.raises(ConfigError, match="no VispeftBackbone"):
        VispeftHook().before_train(SimpleNamespace(model=torch.nn.Identity()))
