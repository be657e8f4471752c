"""Stochastic depth: off in a frozen base, and on while an adapter trains whose recipe asks for it."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn

from vispeft.core.sites import View

__all__ = ["StochasticDepth"]


class StochasticDepth:
    """Puts drop-path modules into a model, and the model's own back."""

    def __init__(self, model: nn.Module, view: View) -> None:
        """Take stock of a bare model.

        Args:
            model: The timm model.
            view: Its description.
        """
        self.model, self.view = model, view
        self.originals: dict[str, nn.Module] = {}
        """The model's own modules by path, for as long as others stand there."""

    def set(self, rate: float) -> None:
        """Give each block its rate, growing linearly with depth as in timm.

        Args:
            rate: Rate of the last block; 0 puts the model's own modules back.
        """
        for path, module in self.originals.items():
            self._put(path, module)
        self.originals = {}
        if rate <= 0:
            return
        last = max(1, self.view.depth - 1)
        for index, paths in enumerate(self.view.drop_path_paths):
            for path in paths:
                self.originals[path] = self.model.get_submodule(path)
                self._put(path, DropPath(rate * index / last))

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)
