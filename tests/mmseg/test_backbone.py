# ruff: noqa: E402 - mmsegmentation may be missing, and is made importable by the plug-in
import importlib

import pytest

pytest.importorskip("mmseg")
importlib.import_module("vispeft.mmseg")

import torch
from mmengine import Config
from mmseg.apis import init_model

import vispeft
from tests.mmseg.toy import (
    CHANNELS,
    backbone_of,
    close,
    make_config,
)
from vispeft.errors import ConfigError, FileError, UnknownNameError
from vispeft.mmseg import load_decoder, save_adapter
from vispeft.storage.files import read_decoder


def test_maps_of_any_size(weights):
    for family, strides in (("vit", [8, 8, 8]), ("swin", [4, 8, 16, 32])):
        backbone = backbone_of(family, weights, peft={"type": "SSF"})
        assert (backbone.channels, backbone.strides) == (CHANNELS[family], strides)
        for height, width in ((64, 64), (50, 70), (33, 128)):
            maps = backbone(torch.randn(1, 3, height, width))
            assert isinstance(maps, tuple)
            wanted = [(1, c, -(-height // s), -(-width // s)) for c, s in zip(CHANNELS[family], strides, strict=True)]
            assert [tuple(level.shape) for level in maps] == wanted


def test_methods_with_hooks_are_refused(weights, monkeypatch):
    """Nothing in mmengine's loops would call them."""
    monkeypatch.setattr(vispeft.SSF, "loss_term", lambda *_: None)
    with pytest.raises(ConfigError, match="loss_term"):
        backbone_of("vit", weights, peft={"type": "SSF"})


def test_init_weights_leaves_the_backbone_alone(weights):
    backbone = backbone_of("vit", weights, peft={"type": "SSF"})
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("peft", [{"type": "ssf"}, {"type": "bi_lora", "rank": 4}, {"type": "AdaptFormer"}, None])
def test_methods_by_any_name(weights, peft):
    backbone = backbone_of("vit", weights, peft=peft)
    expected = None if peft is None else {"bi_lora": "lora"}.get(peft["type"], peft["type"].lower())
    assert (None if backbone.bank is None else backbone.bank.plan().method.name) == expected


def test_pyramid_of_a_plain_vit_is_saved_beside_the_adapter(toy, weights, tmp_path):
    vitdet = {"levels": "vitdet", "width": 16}
    config = make_config("vit", toy, weights, tmp_path)
    config.model.backbone.update(vitdet)
    config.model.decode_head.update(in_channels=[16] * 4, in_index=[0, 1, 2, 3])
    model = init_model(config, device="cpu")
    save_adapter(model, tmp_path / "adapter")
    assert any(name.startswith("reader.levels") for name in read_decoder(tmp_path / "adapter"))
    again = backbone_of("vit", weights, peft={"load": str(tmp_path / "adapter")}, **vitdet).eval()
    images = torch.randn(1, 3, 64, 64)
    for level, expected in zip(again(images), model.eval().backbone(images), strict=True):
        close(level, expected)


def test_activations_may_be_computed_again(weights):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        backbone = backbone_of("swin", weights, peft={"type": "SSF"}, with_cp=again).train()
        torch.manual_seed(1)
        sum(level.square().mean() for level in backbone(torch.randn(1, 3, 64, 64))).backward()
        gradients.append([p.grad for p in backbone.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft": {"type": "SFF"}}, "Unknown method 'SFF'.*SSF"),
        ({"peft": {"type": "SSF", "rank": 4}}, "Unknown key 'SSF.rank'"),
        ({"peft": {"rank": 4}}, "type=METHOD"),
        ({"peft": {"load": "nowhere"}}, "nowhere"),
        ({"peft": {"load": "zoo:none"}}, "zoo"),
        ({"peft": {"load": "nowhere", "type": "SSF"}}, "load and type"),
        ({"peft": {"type": "VQT"}}, "no map"),
        ({"out_indices": [0, 9]}, "4 blocks"),
        ({"peft": {"type": "SSF"}, "out_indices": [0, 1]}, r"out_indices \[0, 1\].*blocks.2.*limit the method"),
        ({"pretrained": "open-mmlab://resnet50_v1c"}, "segmentor hands its own pretrained"),
        ({"model_args": {"num_classes": 3}}, "num_classes"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "x.pth"}}, "weights="),
    ],
)
def test_arguments_that_cannot_work_are_refused(weights, options, message):
    with pytest.raises(vispeft.VispeftError, match=message):
        backbone_of("vit", weights, **options)


@pytest.mark.slow
def test_an_adapter_of_the_zoo_and_its_decoder():
    made = vispeft.zoo.create("earth_lora")
    channels = made.bank.notes()["output"]["decoder"]["args"]["channels"]

    def segmentor(channels, load="zoo:earth_lora"):
        backbone = {"type": "VispeftBackbone", "model": "zoo:swin_tiny", "peft": {"load": load}}
        head = {"type": "SegformerHead", "in_channels": [32, 64, 128, 256], "in_index": [0, 1, 2, 3]}
        head |= {"channels": channels, "num_classes": len(made.class_names), "norm_cfg": {"type": "BN"}}
        plain = {"type": "SegDataPreProcessor"}
        parts = {"type": "EncoderDecoder", "data_preprocessor": plain, "backbone": backbone, "decode_head": head}
        return init_model(Config({"model": {**parts, "test_cfg": {"mode": "whole"}}}), device="cpu")

    model, images = segmentor(channels), torch.randn(1, 3, 64, 96)
    load_decoder(model, "zoo:earth_lora")
    with torch.no_grad():
        maps = model.backbone(images)
        for one, other in zip(maps, made.task.reader(made.backbone, images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        scores = made.task.decoder(made.task.reader(made.backbone, images))
        torch.testing.assert_close(model.decode_head(maps), scores, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileError, match=f"does not fit the segmentor.*'channels': {channels}.*give the decode_head"):
        load_decoder(segmentor(channels + 8), "zoo:earth_lora")
    with pytest.raises(UnknownNameError, match="earth_lora"):
        segmentor(channels, "zoo:earth_lra")
