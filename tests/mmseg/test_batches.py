"""Batches too small for a BatchNorm of a head are refused before training."""

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
