"""What leaves a task of metric learning: the network to deploy, and the state of a criterion for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.errors import FileError

__all__ = ["EmbeddingNetwork", "ExtraState", "embedding_of"]


def embedding_of(outputs: Tensor, normalised: bool) -> Tensor:
    """Turn outputs of a head into embeddings.

    Args:
        outputs: (B, d).
        normalised: Whether embeddings have length one.
    """
    return F.normalize(outputs, dim=1) if normalised else outputs


class EmbeddingNetwork(nn.Module):
    """Backbone and head in one module, which shares their tensors: normalised images in, embeddings out."""

    def __init__(self, model: nn.Module, head: nn.Module, normalised: bool) -> None:
        """Combine the parts.

        Args:
            model: The backbone, adapted or merged.
            head: The head.
            normalised: Whether embeddings have length one.
        """
        super().__init__()
        self.model, self.head, self.normalised = model, head, normalised

    def forward(self, images: Tensor) -> Tensor:
        """Compute embeddings (B, d).

        Args:
            images: Normalised images (B, 3, H, W).
        """
        return embedding_of(self.head(self.model(images)), self.normalised)


class ExtraState:
    """What modules keep besides tensors by ``get_extra_state``, which Lightning stores under no name of a tensor."""

    @staticmethod
    def of(module: nn.Module) -> dict[str, Any]:
        """Collect it, by the name of each module that has some.

        Args:
            module: The module.
        """
        return {name: part.get_extra_state() for name, part in module.named_modules() if _keeps(part)}

    @staticmethod
    def put(module: nn.Module, states: Mapping[str, Any]) -> None:
        """Put it back.

        Args:
            module: The module.
            states: A result of `of`.

        Raises:
            FileError: If it belongs to other modules.
        """
        parts = {name: part for name, part in module.named_modules() if _keeps(part)}
        if parts.keys() != states.keys():
            raise FileError(
                f"The checkpoint keeps the state of {sorted(states) or 'nothing'}, and the criterion has "
                f"{sorted(parts) or 'nothing'} to keep. Use the method it was written with."
            )
        for name, part in parts.items():
            part.set_extra_state(states[name])


def _keeps(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
