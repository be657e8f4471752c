"""Class embeddings against the cosines of a CLIP whose public code was run for MMRL (file ``mmrl_vit``)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tests.parity.beyond import file
from tests.parity.test_parity import backbone
from vispeft.heads.zero_shot import zero_shot
from vispeft.storage.class_embeddings import ClassEmbeddings


def test_scores_of_a_clip() -> None:
    """The public CLIP's own cosines (reference part F), in float64, through a timm tower and its projection."""
    meta, tensors = file("mmrl_vit")
    norm = partial(nn.LayerNorm, eps=meta["config"]["norm_eps"])
    made = {**meta, "timm_kwargs": {**meta["timm_kwargs"], "norm_layer": norm}}
    model: Any = backbone(made, tensors, torch.float64)
    texts = tensors["out.zero_shot_text_features"]
    assert not model.head.bias.any()  # a CLIP's projection has none
    classes = ClassEmbeddings(
        texts.float(), tuple(meta["config"]["classes"]), 100.0, model.head.weight.detach().float()
    )
    images = tensors["input.images"].double()
    head = zero_shot(model, classes).double()
    head.embeddings = texts  # without the rounding of the file
    wanted = 100 * tensors["out.zero_shot_image_features"] @ texts.T
    with torch.no_grad():
        torch.testing.assert_close(model(images), wanted, rtol=1e-9, atol=1e-8)
        torch.testing.assert_close(
            classes.scores(model.forward_head(model.forward_features(images), pre_logits=True)),
            wanted,
            rtol=1e-4,
            atol=1e-4,
        )
