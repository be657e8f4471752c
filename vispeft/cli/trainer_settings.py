"""The settings of Lightning's trainer that a config may give, with the types that it may give them in."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["TrainerSettings"]


class TrainerSettings(Trainer):
    """Lightning's trainer, with settings by name where Lightning takes objects, too.

    The class tells the parser of configs which settings there are; `Trainer` itself is made with them.
    """

    # Lightning writes Union[int, float], and typing's cache answers Union[float, int] for it when another library has
    # made that one first: a parser would then read 1 batch as 1.0, which is all of them.
    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str = "auto",
        profiler: str | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | None = None,
        **settings: Any,
    ) -> None:
        """Take what `Trainer` takes.

        Args:
            accelerator: Lightning's name of the hardware, such as ``cpu`` or ``gpu``.
            strategy: Lightning's name of a way to train.
            profiler: Lightning's name of a profiler: ``simple``, ``advanced`` or ``pytorch``.
            limit_train_batches: Number of training batches of an epoch, or their share as a number with a point.
            limit_val_batches: The same for validation.
            limit_test_batches: The same for the test.
            limit_predict_batches: The same for predictions.
            overfit_batches: Number or share of the training batches to train on again and again.
            val_check_interval: Number of batches, share of an epoch, or time, after which to validate.
            **settings: The other settings of `Trainer`.
        """
        super().__init__(
            accelerator=accelerator,
            strategy=strategy,
            profiler=profiler,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **settings,
        )
