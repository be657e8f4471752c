"""The settings of Lightning's trainer that a config may give, with the types that it may give them in."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["TrainerSettings"]


class TrainerSettings(Trainer):
    """Lightning's trainer, with settings by name where Lightning takes objects, too.

    The class tells the parser of configs which settings there are; `Trainer` itself is made with them.
    """

    def __init__(
        self, *, accelerator: str = "auto", strategy: str = "auto", profiler: str | None = None, **settings: Any
    ) -> None:
        """Take what `Trainer` takes.

        Args:
            accelerator: Lightning's name of the hardware, such as ``cpu`` or ``gpu``.
            strategy: Lightning's name of a way to train.
            profiler: Lightning's name of a profiler: ``simple``, ``advanced`` or ``pytorch``.
            **settings: The other settings of `Trainer`.
        """
        super().__init__(accelerator=accelerator, strategy=strategy, profiler=profiler, **settings)
