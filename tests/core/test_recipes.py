"""Every method states published numbers with their source, and tiny models are warned about."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import timm
import torch

import vispeft
from vispeft.core.recipes import FEW_IMAGES, SMALLEST_WIDTH
from vispeft.errors import ConfigError

METHODS = [n for n in vispeft.list_methods() if type(vispeft.method(n)).__module__.startswith("vispeft.methods.")]


@pytest.fixture(scope="module")
def models():
    names = ("vit_base_patch16_224", "swin_base_patch4_window7_224", "vit_tiny_patch16_224")
    with torch.device("meta"):
        return {name: timm.create_model(name) for name in names}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_a_recipe_whose_fields_it_takes(name, models, caplog):
    method = vispeft.method(name)
    for model in ("vit_base_patch16_224", "swin_base_patch4_window7_224"):
        for images in (1, FEW_IMAGES, FEW_IMAGES + 1, 10**7):
            recipe = method.recommended(models[model], images)
            assert 0 < recipe.lr < 1
            assert recipe.weight_decay >= 0
            assert len(recipe.source) > 20
            sized = dataclasses.replace(method, **recipe.fields)
            assert all(getattr(sized, field) == value for field, value in recipe.fields.items())
            assert recipe.images is None or images <= recipe.images
    assert not caplog.records


def test_few_and_many_images_and_families_differ(models):
    vit, swin = models["vit_base_patch16_224"], models["swin_base_patch4_window7_224"]
    assert vispeft.AdaptFormer().recommended(vit, 1000).fields == {"bottleneck": 8}
    assert vispeft.AdaptFormer().recommended(vit, 50_000).fields == {"bottleneck": 64}
    rates = [vispeft.SSF().recommended(model, n).lr for model in (vit, swin) for n in (1000, 50_000)]
    assert rates == [5e-3, 1e-3, 5e-3, 5e-3]


def test_a_tiny_model_is_warned_about(models, caplog):
    with caplog.at_level(logging.WARNING):
        vispeft.Adapter().recommended(models["vit_tiny_patch16_224"], 1000)
    assert f"this one is {models['vit_tiny_patch16_224'].embed_dim} wide" in caplog.text
    assert models["vit_tiny_patch16_224"].embed_dim < SMALLEST_WIDTH
    with pytest.raises(ConfigError, match="0 training images"):
        vispeft.Adapter().recommended(models["vit_tiny_patch16_224"], 0)
