"""The host of a whole model: the frozen part behaves in training as in evaluation."""

from __future__ import annotations

import re
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from vispeft.core.units import QueryUnit, Unit
from vispeft.errors import BackboneError
from vispeft.hosts.base import Host

__all__ = ["ModelHost"]

_UNIT = re.compile(r"adapters\.[^.]+\.[^.]+\.")
"""What a unit puts into the name of a tensor of the base that it stands for."""


class ModelHost(Host):
    """An adapted timm model. Families with a forward of their own subclass it in ``vispeft/backbones``."""

    awake: tuple[str, ...]
    """Paths of base modules that follow the training mode; an empty path means the whole base."""
    attributes: ClassVar[dict[str, Any]] = {**Host.attributes, "awake": ()}

    def train(self, mode: bool = True) -> Any:
        """Switch units, head and whatever a method wakes between training and evaluation; the rest stays as evaluated.

        Args:
            mode: True for training.

        Returns:
            The model.
        """
        nn.Module.train(self, mode)
        if mode and "" not in self.awake:
            self._put_to_sleep(self, "")
            self.training = mode
        return self

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute features as timm does, for images of a size the model takes."""
        self.check_size(x)
        return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]  # timm's

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute intermediate features as timm does, for images of a size the model takes."""
        self.check_size(x)
        return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]  # timm's

    def reader(self) -> QueryUnit | None:
        """Look up the active queries that read the blocks, if any."""
        return next(self.units(QueryUnit), None)

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Make a new classifier as timm does, as wide as the method that is active wants it."""
        super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]  # timm's
        bank = self.__dict__.get("_vispeft_bank")
        if bank is not None:
            bank.fit_head()

    def group_matcher(self, coarse: bool = False) -> Any:
        """Say which layer a tensor belongs to, as timm does, also for units that stand for tensors of the stem.

        Args:
            coarse: Group whole stages where the family has them.
        """
        return {name: _also_in_units(spec) for name, spec in super().group_matcher(coarse).items()}  # type: ignore[misc]

    def no_weight_decay(self) -> set[str]:
        """Name the tensors that should not decay: timm's, the units that stand for these, and what units exempt."""
        listing: Any = getattr(super(), "no_weight_decay", set)
        exempt = set(listing())
        stand_for = {name for name, _ in self.named_parameters() if _UNIT.sub("", name) in exempt}
        units = [(path, module) for path, module in self.named_modules() if isinstance(module, Unit)]
        return exempt | stand_for | {f"{path}.{name}" for path, unit in units for name in unit.no_decay}

    def check_size(self, images: Tensor) -> None:
        """Refuse images the model was not built for.

        Args:
            images: (B, C, H, W).

        Raises:
            BackboneError: If the model takes one size only and this is another one, or the patches do not fit.
        """
        embed = cast(Any, self.patch_embed)
        size = tuple(images.shape[-2:])
        if embed.img_size is None:
            return
        if embed.strict_img_size and size != tuple(embed.img_size):
            raise BackboneError(
                f"Images of {size[0]} x {size[1]} were given to a model built for {embed.img_size[0]} x "
                f"{embed.img_size[1]}. Resize them, create the model with img_size={size}, or once for all sizes with "
                "vispeft.create_model(..., flexible_size=True)."
            )
        if not embed.dynamic_img_pad and any(side % patch for side, patch in zip(size, embed.patch_size, strict=True)):
            raise BackboneError(
                f"Images of {size[0]} x {size[1]} were given to a model with patches of {embed.patch_size[0]} x "
                f"{embed.patch_size[1]}, which do not fit into them. Resize or pad them to multiples of the patch."
            )

    def _put_to_sleep(self, module: nn.Module, path: str) -> None:
        if isinstance(module, Unit) or path in self.awake:
            return
        module.training = False
        for name, child in module.named_children():
            self._put_to_sleep(child, f"{path}.{name}" if path else name)


def _also_in_units(spec: Any) -> Any:
    """Let a pattern of names match units of the whole model too, such as the one of a trained position embedding."""
    if isinstance(spec, str):
        anywhere = re.sub(r"(^|[|])[\^]", r"\1", spec)  # names are matched from their beginning in any case
        return f"(?:{_UNIT.pattern})?(?:{anywhere})"
    return [(_also_in_units(pattern), suffix) for pattern, suffix in spec]
