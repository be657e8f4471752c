"""The head of metric learning: a linear layer on the backbone's features, with or without a layer norm in front."""

from __future__ import annotations

from typing import Literal, cast, get_args

from torch import Tensor, nn

from vispeft.core.arguments import check_arguments
from vispeft.errors import ConfigError

__all__ = ["EmbeddingHead", "Init", "Norm"]

Norm = Literal["none", "affine", "plain"]
"""Layer norm in front of the linear layer: none, one with learned gains and biases, one without them."""
Init = Literal["orthogonal", "xavier", "default"]
"""Start of the linear layer."""

EPS = 1e-5
"""Term in the denominator of the layer norm, as in the public code of VPTSP; that of a ViT is 1e-6."""


class EmbeddingHead(nn.Module):
    """Turn features (B, width) into embeddings (B, dim), which are not normalised.

    Published heads: VPTSP has ``affine`` and ``xavier`` (arXiv 2402.02340), HIER ``plain`` and ``orthogonal`` (arXiv
    2212.14162), Hyp-ViT ``none`` and ``orthogonal`` (arXiv 2203.10833); Proxy-Anchor's on a CNN is ``none`` with
    another start (arXiv 2003.13911).
    """

    def __init__(self, width: int, dim: int, *, norm: Norm = "none", init: Init = "orthogonal") -> None:
        """Create the layers in float32.

        Args:
            width: Number of features of the backbone.
            dim: Width of the embeddings.
            norm: Layer norm in front: ``none``, ``affine`` or ``plain``.
            init: Start of the weight: ``orthogonal`` (with as many embedding as feature entries, cosines of features
                are those of embeddings), ``xavier`` (uniform), both with biases of 0, or ``default``, PyTorch's.

        Raises:
            ConfigError: If a number is out of range, or a name is unknown.
        """
        super().__init__()
        self.check(width, dim, norm, init)
        self.width, self.dim, self.norm_kind = width, dim, norm
        affine = norm == "affine"
        self.norm = nn.Identity() if norm == "none" else nn.LayerNorm(width, eps=EPS, elementwise_affine=affine)
        self.proj = nn.Linear(width, dim)
        if init != "default":
            (nn.init.orthogonal_ if init == "orthogonal" else nn.init.xavier_uniform_)(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    @staticmethod
    def check(width: int, dim: int, norm: str, init: str) -> None:
        """Refuse arguments that cannot work, before there is a backbone.

        Args:
            width: Number of features.
            dim: Width of the embeddings.
            norm: Layer norm in front.
            init: Start of the weight.

        Raises:
            ConfigError: If a number is out of range, or a name is unknown.
        """
        check_arguments(EmbeddingHead, {"width": width, "dim": dim})
        if dim < 1:
            raise ConfigError(f"EmbeddingHead(dim={dim}): at least 1 is needed.")
        for name, given, known in (("norm", norm, get_args(Norm)), ("init", init, get_args(Init))):
            if given not in known:
                raise ConfigError(f"EmbeddingHead({name}={given!r}): choose {', '.join(map(repr, known))}.")

    def forward(self, features: Tensor) -> Tensor:
        """Compute embeddings (B, dim), in the weights' type.

        Args:
            features: (B, width).
        """
        return cast(Tensor, self.proj(self.norm(features.to(self.proj.weight.dtype))))
