"""The classifier of class embeddings: scores of a CLIP without training."""

from __future__ import annotations

from torch import Tensor, nn

from vispeft.adapters.bank import AdapterBank
from vispeft.errors import ConfigError
from vispeft.storage.class_embeddings import ClassEmbeddings

__all__ = ["ZeroShotHead", "zero_shot"]


class ZeroShotHead(nn.Module):
    """``scale * cos(P f, t_c)`` for the features f of a CLIP's visual tower and the embedding of each class.

    Nothing in it trains, and its tensors are in no state dict: the file of class embeddings holds them.
    """

    embeddings: Tensor
    projection: Tensor

    def __init__(self, classes: ClassEmbeddings) -> None:
        """Take the class embeddings.

        Args:
            classes: The embeddings.
        """
        super().__init__()
        self.class_names, self.scale = classes.class_names, classes.scale
        self.in_features, self.out_features = classes.projection.shape[1], len(classes.embeddings)
        self.register_buffer("embeddings", classes.embeddings, persistent=False)
        self.register_buffer("projection", classes.projection, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Compute scores (B, classes), in the buffers' type, from features (B, width)."""
        features = features.to(self.projection.dtype)
        joint = nn.functional.normalize(nn.functional.linear(features, self.projection), dim=-1)
        return self.scale * nn.functional.linear(joint, self.embeddings)


def zero_shot(model: nn.Module, classes: ClassEmbeddings) -> ZeroShotHead:
    """Let class embeddings classify the images of a timm model without adapters, in place of its head.

    Args:
        model: A timm model, such as ``vit_base_patch16_clip_224.openai``; its head is replaced.
        classes: The embeddings, made with the text tower of the same CLIP.

    Returns:
        The new head.

    Raises:
        ConfigError: If the model has no head of its own at ``head``, or other features than the embeddings are for.
    """
    width = getattr(model, "head_hidden_size", None)
    plain = isinstance(getattr(model, "head", None), nn.Linear | nn.Identity | ZeroShotHead)
    if width is None or not plain or AdapterBank.of(model) is not None:
        raise ConfigError(
            f"A {type(model).__name__} was to be classified by class embeddings; it needs a head that is one linear "
            "layer and no adapters yet. Take the visual tower of a CLIP, such as vit_base_patch16_clip_224.openai."
        )
    if width != classes.projection.shape[1]:
        raise ConfigError(
            f"The class embeddings are for {classes.projection.shape[1]} features, and the model has {width}. Make "
            "them with the text tower of the same CLIP."
        )
    reference = next(model.parameters())
    head = ZeroShotHead(classes).to(device=reference.device)
    model.head, model.num_classes = head, head.out_features
    return head
