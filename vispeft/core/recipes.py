"""Recipes: the learning rate, weight decay and size published for a method, with their source."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vispeft.core.sites import View
from vispeft.errors import ConfigError

__all__ = ["FEW_IMAGES", "FGVC", "MULTI_TASK", "SMALLEST_WIDTH", "VTAB", "Recipe", "choose_recipe"]

logger = logging.getLogger(__name__)

FEW_IMAGES = 2000
"""Up to this number of training images, the recipes for VTAB-1k (1,000 images) apply."""
SMALLEST_WIDTH = 384
"""Width of ViT-S; hardly any published learning rate is for a narrower model."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings for a method: AdamW, 10 % warm-up and cosine decay, unless the source says otherwise."""

    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Weight decay of matrices."""
    source: str
    """Source of the numbers."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method, such as its size."""
    images: int | None = None
    """Largest number of training images it applies to; None for any number."""
    layout: Literal["NLC", "NHWC"] | None = None
    """Layout of the models it applies to: token sequences (NLC) or maps (NHWC); None for both."""

    def sized(self, **fields: Any) -> Recipe:
        """Return a copy of the recipe with these method fields.

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
MULTI_TASK = Recipe(
    lr=1e-4,
    weight_decay=1e-4,
    source="Adam, as in the multi-task code the authors build on; their own settings were not found",
)
"""Recipe of the methods of arXiv 2210.03265, for several dense tasks."""


def choose_recipe(name: str, recipes: Sequence[Recipe], view: View, n_images: int) -> Recipe:
    """Choose a method's recipe for a model and a number of images; log a warning if none fits so narrow a model.

    Args:
        name: The method, for messages.
        recipes: Its recipes; the first that fits is chosen.
        view: The model's description.
        n_images: Number of training images.

    Raises:
        ConfigError: If the method has none that fits, or there are no images.
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
