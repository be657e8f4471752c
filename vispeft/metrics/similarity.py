"""Similarities that rank neighbours: cosine, dot product, and the hyperbolic distance of Hyp-ViT."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from vispeft.errors import ConfigError, UnknownNameError
from vispeft.metrics.sums import sum_type

__all__ = ["Cosine", "Dot", "Hyperbolic", "Similarity", "make_similarity"]


class Similarity(ABC):
    """A score of two embeddings, which is the larger the more similar they are."""

    name: ClassVar[str]
    """Name by which `make_similarity` finds the class."""
    working: ClassVar[int] = 4
    """Bytes that `scores` needs at once for each pair, result included."""

    def prepare(self, embeddings: Tensor) -> Tensor:
        """Compute once for each embedding the vector that the scores are made of.

        Args:
            embeddings: (N, d), float32.

        Returns:
            (N, d), float32.
        """
        return embeddings

    @abstractmethod
    def scores(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Compute the score of each pair.

        Args:
            queries: Prepared vectors (Q, d).
            gallery: Prepared vectors (N, d).

        Returns:
            (Q, N), float32, a tensor of its own.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the settings as plain values, which `make_similarity` reads."""
        return {"name": self.name}


class Dot(Similarity):
    """The dot product."""

    name = "dot"

    def scores(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Compute dot products (Q, N)."""
        return queries @ gallery.T


class Cosine(Dot):
    """The cosine of the angle, from -1 to 1; 0 for vectors of zeros."""

    name = "cosine"

    def prepare(self, embeddings: Tensor) -> Tensor:
        """Divide each embedding by its length."""
        return F.normalize(embeddings, dim=1)


@dataclass(frozen=True, kw_only=True)
class Hyperbolic(Similarity):
    """The negative geodesic distance in the Poincare ball, as in Hyp-ViT (Ermolov et al., CVPR 2022).

    Embeddings are clipped to a length, mapped into the ball by the exponential map at 0, and kept away from its rim.
    Defaults and the margin at the rim are those of the public code (htdt/hyp_metric). Neighbours by this distance are
    not those by the cosine.
    """

    name: ClassVar[str] = "hyperbolic"
    working: ClassVar[int] = 32

    curvature: float = 0.1
    """Negative curvature c of the ball, whose radius is 1/sqrt(c)."""
    clip: float = 2.3
    """Largest length of an embedding in front of the map."""

    RIM: ClassVar[float] = 1e-3
    """Smallest distance to the rim, as a share of the radius."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: If one is not above 0.
        """
        for field, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise ConfigError(f"Hyperbolic({field}={value}): a number above 0 is needed.")

    def prepare(self, embeddings: Tensor) -> Tensor:
        """Map embeddings to points of the ball: clip, then tanh(sqrt(c) |x|) x / (sqrt(c) |x|)."""
        root = math.sqrt(self.curvature)
        length = embeddings.norm(dim=1, keepdim=True)
        clipped = embeddings * (self.clip / (length + 1e-5)).clamp(max=1)
        length = clipped.norm(dim=1, keepdim=True).clamp_min(1e-5)
        points = (root * length).tanh() * clipped / (root * length)
        length = points.norm(dim=1, keepdim=True).clamp_min(1e-5)
        return points * ((1 - self.RIM) / root / length).clamp(max=1)

    def scores(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Compute -2/sqrt(c) artanh(sqrt(c) |-x (+) y|) for each pair (Q, N).

        The length of the Moebius sum is |x - y| / sqrt(1 - 2c <x, y> + c^2 |x|^2 |y|^2), for which a product of
        matrices is enough. It is computed in double precision, where there is one, since |x - y|^2 of neighbours is a
        small difference of large numbers.
        """
        c = self.curvature
        x, y = queries.to(sum_type()), gallery.to(sum_type())
        product = x @ y.T
        lengths, others = x.square().sum(1)[:, None], y.square().sum(1)
        squares = (lengths + others).sub_(product, alpha=2).clamp_(min=0)
        below = (lengths * (c * c * others)).sub_(product, alpha=2 * c).add_(1)
        inside = squares.div_(below).sqrt_().mul_(math.sqrt(c)).clamp_(max=1 - 1e-5).float()
        return inside.atanh_().mul_(-2 / math.sqrt(c))

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the settings."""
        return {"name": self.name, **asdict(self)}


def _classes(base: type[Similarity] = Similarity) -> dict[str, type[Similarity]]:
    """Return all imported similarities by name: ours, and then those of one's own."""
    found: dict[str, type[Similarity]] = {}
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and isinstance(name := getattr(cls, "name", None), str):
            found.setdefault(name, cls)
        found = {**_classes(cls), **found}
    return found


def make_similarity(given: str | Mapping[str, Any] | Similarity) -> Similarity:
    """Create a similarity.

    One of your own is found by its ``name`` once its module is imported.

    Args:
        given: A name (``cosine``, ``dot``, ``hyperbolic``), the values of `Similarity.to_dict`, or a similarity.

    Raises:
        ConfigError: If there is no such similarity, or a setting is none of its own.
    """
    if isinstance(given, str):
        given = {"name": given}
    if isinstance(given, Mapping):
        settings = dict(given)
        name, classes = str(settings.pop("name", None)), _classes()
        if name not in classes:
            raise UnknownNameError("similarity", name, classes)
        try:
            return classes[name](**settings)
        except TypeError as error:
            raise ConfigError(f"The similarity {name} does not take {settings} ({error}).") from error
    if not isinstance(given, Similarity):
        raise ConfigError(f"similarity={given!r}: choose {', '.join(_classes())}, or give a Similarity.")
    return given
