"""Small batches, files that exist and decoders of other classes are refused before work is lost."""

# ruff: noqa: E402 - mmsegmentation may be missing, and is made importable by the plug-in
import importlib
from types import SimpleNamespace

import pytest

pytest.importorskip("mmseg")
importlib.import_module("vispeft.mmseg")

import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmseg.registry import MODELS

from tests.mmseg.toy import CHANNELS, backbone_of
from vispeft.errors import ConfigError
from vispeft.mmseg import load_decoder, merge
from vispeft.mmseg.hooks import check_batches


def segmentor(head, weights, **settings):
    width = CHANNELS["swin"]
    several = {"in_channels": width, "in_index": [0, 1, 2, 3]}
    one = {"in_channels": width[-1], "in_index": 3}
    inputs = several if head in ("UPerHead", "SegformerHead") else one
    built = MODELS.build(
        {"type": head, "channels": 8, "num_classes": 3, "norm_cfg": {"type": "BN"}, **inputs, **settings}
    )
    return SimpleNamespace(
        backbone=backbone_of("swin", weights),
        decode_head=built,
        with_auxiliary_head=False,
        with_neck=False,
        data_preprocessor=SimpleNamespace(size=(64, 64)),
    )


def batches(images, size, *, drop_last=False, endless=False):
    sampler = (InfiniteSampler if endless else DefaultSampler)(list(range(images)), shuffle=False)
    return SimpleNamespace(batch_size=size, drop_last=drop_last, sampler=sampler)


@pytest.mark.parametrize(
    ("head", "settings", "fits"),
    [
        ("UPerHead", {"pool_scales": (1, 2)}, False),
        ("UPerHead", {"pool_scales": (2, 3)}, True),
        ("PSPHead", {"pool_scales": (1, 2)}, False),
        ("ASPPHead", {"dilations": (1, 2)}, False),
        ("FCNHead", {"num_convs": 1}, True),
        ("SegformerHead", {}, True),
    ],
)
def test_a_head_that_pools_to_one_pixel_needs_two_images(head, settings, fits, weights):
    model = segmentor(head, weights, **settings)
    before = {name: tensor.clone() for name, tensor in model.decode_head.state_dict().items()}
    for loader in (batches(8, 7), batches(8, 1), batches(9, 4), batches(8, 1, endless=True)):
        if fits:
            check_batches(model, loader)
            continue
        with pytest.raises(ConfigError, match=r"has 1 image, and decode_head needs 2 for its BatchNorm.*drop_last"):
            check_batches(model, loader)
    for loader in (batches(8, 7, drop_last=True), batches(8, 4), batches(8, 7, endless=True), batches(2, 4)):
        check_batches(model, loader)
    after = model.decode_head.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert model.decode_head.training


def test_one_pixel_of_the_coarsest_map_counts_too(weights):
    model = segmentor("FCNHead", weights, num_convs=1)
    model.data_preprocessor.size = (32, 32)
    with pytest.raises(ConfigError, match="needs 2 for its BatchNorm"):
        check_batches(model, batches(8, 7))


def test_merging_overwrites_nothing(weights, tmp_path):
    model = torch.nn.Module()
    model.backbone, model.cfg = backbone_of("vit", weights, peft={"type": "SSF"}), object()
    (tmp_path / "model.pth").write_text("mine")
    with pytest.raises(ConfigError, match=r"model\.pth exists already"):
        merge(model, tmp_path)
    assert (tmp_path / "model.pth").read_text() == "mine"
    assert model.backbone.bank.active == ["default"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_a_decoder_of_the_same_classes_in_another_order_is_refused(weights, tmp_path):
    model = torch.nn.Module()
    model.backbone = backbone_of("vit", weights, peft={"type": "SSF"})
    model.backbone.bank.annotate(class_names=["dark", "red", "blue"])
    model.backbone.bank.save(tmp_path / "adapter", decoder={"decoder.weight": torch.zeros(2)})
    for classes, message in (
        (("blue", "red", "dark"), "has the same classes in another order: dark, red, blue there, blue, red, dark here"),
        (("dark", "red", "sky"), "has other classes"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_decoder(model, tmp_path / "adapter", classes)
