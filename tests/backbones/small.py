"""A small ViT with random weights, as a model and as a file, for the tests of `create_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vispeft.backbones.create import create_model

ARCHITECTURE = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def tiny(num_classes: int = 7, **args: Any) -> nn.Module:
    """A small ViT with weights that are not those of a fresh one: every tensor is random."""
    torch.manual_seed(1)
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, **{**ARGS, **args}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def load(path: Path, **args: Any) -> nn.Module:
    return create_model(ARCHITECTURE, weights=path, **{**ARGS, **args}).eval()
