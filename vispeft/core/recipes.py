"""Recipes: learning rate, weight decay and size that were published for a method, with their source."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vispeft.core.sites import View
from vispeft.errors import ConfigError

__all__ = ["FEW_IMAGES", "FGVC", "SMALLEST_WIDTH", "VTAB", "Recipe", "choose_recipe"]

logger = logging.getLogger(__name__)

FEW_IMAGES = 2000
"""Up to so many training images, recipes of VTAB-1k (1,000 images) are taken."""
SMALLEST_WIDTH = 384
"""Width of ViT-S; hardly any published rate belongs to a narrower model."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train a method with: AdamW, a warm-up of 10 % and a cosine, unless the source says otherwise."""

    lr: float
    """Highest learning rate."""
    weight_decay: float
    """Weight decay of matrices."""
    source: str
    """Where the numbers come from."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method, such as its size."""
    images: int | None = None
    """It is for so many training images at most; None for any number."""
    layout: Literal["NLC", "NHWC"] | None = None
    """It is for models of one sequence of tokens (NLC) or for those of maps (NHWC); None for all."""

    def sized(self, **fields: Any) -> Recipe:
        """Give the same recipe with fields of a method.

        Args:
            **fields: Such as ``rank=8``.
        """
        return dataclasses.replace(self, fields=fields)


VTAB = Recipe(
    lr=1e-3,
    weight_decay=1e-4,
    images=FEW_IMAGES,
    source="common VTAB-1k recipe: AdamW, batch 64, 100 epochs, drop path 0.1 (PETL-ViT 026e4f1, RepAdapter 360992f)",
)
FGVC = Recipe(
    lr=1e-3,
    weight_decay=5e-2,
    source="FGVC on all images: AdamW, batch 64, 100 epochs, rates from 2e-4 to 2e-3 by data set (V-PETL c188fad)",
)


def choose_recipe(name: str, recipes: Sequence[Recipe], view: View, n_images: int) -> Recipe:
    """Choose a method's recipe for a model and a number of training images; warn where none was made for such a model.

    Args:
        name: The method, for messages.
        recipes: Its recipes; the first one that fits is taken.
        view: The model's description.
        n_images: Number of training images.

    Raises:
        ConfigError: If the method states none, or there are no images.
    """
    if n_images < 1:
        raise ConfigError(f"{name}: a recipe for {n_images} training images was asked for; at least 1 is needed.")
    fitting = [r for r in recipes if r.layout in (None, view.layout) and (r.images is None or n_images <= r.images)]
    if not fitting:
        raise ConfigError(f"{name} states no recipe; choose a learning rate on validation images.")
    width = max(view.widths)
    if width < SMALLEST_WIDTH:
        logger.warning(
            "The recipe of %s was published for models 768 wide and more, and this one is %d wide. Small models often "
            "want a higher learning rate: try %.0e to %.0e on validation images.",
            name,
            width,
            fitting[0].lr,
            10 * fitting[0].lr,
        )
    return fitting[0]
