"""The host of a whole model: the frozen part behaves in training as in evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from vispeft.adapters.hosts import Host
from vispeft.adapters.units import Unit

__all__ = ["ModelHost"]


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

    def _put_to_sleep(self, module: nn.Module, path: str) -> None:
        if isinstance(module, Unit) or path in self.awake:
            return
        module.training = False
        for name, child in module.named_children():
            self._put_to_sleep(child, f"{path}.{name}" if path else name)
