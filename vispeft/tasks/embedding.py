"""Embeddings of images by any task: those of its head in metric learning, else the backbone's pooled features."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from vispeft.metrics.similarity import Similarity, make_similarity
from vispeft.tasks.base import AdapterTask

__all__ = ["embed_images", "similarity_of"]


def _embeds(task: AdapterTask) -> bool:
    return getattr(task, "target", None) == "embedding"


@torch.no_grad()
def embed_images(task: AdapterTask, images: Tensor) -> Tensor:
    """Compute embeddings of images.

    Args:
        task: A trained task, in evaluation mode.
        images: Normalised images (B, 3, H, W) on the task's device.

    Returns:
        (B, d), float32: outputs of a task of metric learning; else the adapted backbone's pooled features, which are
        what its classifier reads.
    """
    if _embeds(task):
        return cast(Tensor, task(images)).float()
    model: Any = task.model
    features = model.forward_features(images.to(task.base_dtype))
    return cast(Tensor, model.forward_head(features, pre_logits=True)).float()


def similarity_of(task: AdapterTask) -> Similarity:
    """Return the similarity that a task's embeddings are compared by: that of its loss, else the cosine.

    Args:
        task: The task.
    """
    return make_similarity(getattr(task, "similarity", "cosine"))
