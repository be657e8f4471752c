"""Schedules of methods as Lightning callbacks. Lightning is imported when a training asks for them."""

from __future__ import annotations

from typing import Any

__all__ = ["Schedule", "as_callback"]


class Schedule:
    """What a method does around the steps of a training: nothing, where a subclass does not say."""

    def begin(self, task: Any, trainer: Any) -> None:
        """Check what the schedule needs, before the first step."""

    def before(self, task: Any, trainer: Any) -> None:
        """Prepare the next forward pass."""

    def after(self, task: Any, trainer: Any) -> None:
        """Follow an optimiser's step."""

    def end(self, task: Any) -> None:
        """Leave the units as a training without the schedule does, also after an error."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: As from `state`.
        """


def as_callback(schedule: Schedule, key: str) -> Any:
    """Make a Lightning callback of a schedule.

    Args:
        schedule: The schedule.
        key: Its name in checkpoints.
    """
    from lightning.pytorch import Callback

    class ScheduleCallback(Callback):
        """A schedule of a method."""

        state_key = key
        followed = -1

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            schedule.begin(pl_module, trainer)
            self.followed = trainer.global_step

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            schedule.before(pl_module, trainer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step != self.followed:  # not while gradients are summed
                self.followed = trainer.global_step
                schedule.after(pl_module, trainer)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            schedule.end(pl_module)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            schedule.end(pl_module)

        def state_dict(self) -> dict[str, Any]:
            return schedule.state()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            schedule.restore(state_dict)

    return ScheduleCallback()
