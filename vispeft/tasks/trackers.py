"""Trackers of experiments, such as W&B and MLflow: what they are told, and why none of them can end a training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from vispeft.building.known import register_class
from vispeft.errors import ConfigError, brief

__all__ = ["Tracker", "TrackioLogger", "goes_on_by"]

logger = logging.getLogger(__name__)

_GOES_ON_BY = {
    "WandbLogger": "id",
    "MLFlowLogger": "run_id",
    "TensorBoardLogger": "version",
    "TrackioLogger": "resumed",
}
"""Argument of a logger that takes what its `version` was, to go on with the same run of the tracker."""


@register_class
class TrackioLogger(Logger):
    """Log to trackio, which keeps runs in a local database, on a server, or in a Space of Hugging Face."""

    def __init__(
        self,
        project: str = "vispeft",
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        server_url: str | None = None,
        resumed: str | None = None,
    ) -> None:
        """Store the settings; the run is made when something is logged.

        Args:
            project: Name of the project.
            name: Name of the run; None takes one of trackio's.
            group: Name of a group of runs.
            space_id: Space that shows the project; None for a local database.
            server_url: Server of one's own, with its token; see trackio.
            resumed: Name of an earlier run to go on with.
        """
        super().__init__()
        self._settings = {"project": project, "group": group, "space_id": space_id, "server_url": server_url}
        self._named, self._resumed, self._run = name, resumed, None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of trackio."""
        if self._run is None:
            import trackio

            settings = {name: value for name, value in self._settings.items() if value is not None}
            name, resume = (self._named, "never") if self._resumed is None else (self._resumed, "allow")
            self._run = trackio.init(**settings, name=name, resume=resume, embed=False)
        return self._run

    @property
    def name(self) -> str:
        """The project."""
        return str(self._settings["project"])

    @property
    def version(self) -> str | None:
        """Name of the run; None before there is one."""
        return self._resumed if self._run is None else str(self._run.name)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log settings.

        Args:
            params: Values by name.
            args: Not used.
            kwargs: Not used.
        """
        self.experiment.config.update(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values.

        Args:
            metrics: Values by name.
            step: Number of steps so far.
        """
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what waits, and end the run.

        Args:
            status: success or failed.
        """
        if self._run is not None:
            import trackio

            trackio.finish()
            self._run = None


class Tracker(Logger):
    """A logger of the user's, which is started before the first step and then cannot end the training.

    Whatever it raises later costs its own values alone: that is said once, and the training goes on.
    """

    def __init__(self, title: str, make: Callable[[], Logger]) -> None:
        """Store how the logger is made, which `start` does.

        Args:
            title: Its name in messages.
            make: Makes it.
        """
        super().__init__()
        self.title, self._make = title, make
        self._inner: Logger | None = None

    def start(self) -> str | int | None:
        """Make the logger and its run, or find it again.

        Returns:
            What the logger needs to go on with its run; None if it cannot.

        Raises:
            ConfigError: If it cannot be started.
        """
        try:
            inner = self._make()
            _ = getattr(inner, "experiment", None)
            found = inner.version if goes_on_by(inner) is not None else None
        except Exception as error:  # whatever a tracker's package raises
            raise ConfigError(
                f"{self.title} was asked for, and could not be started: {type(error).__name__}: {brief(error)} Correct "
                "its settings under trainer.logger, or leave it out: logs for TensorBoard and as CSV are always kept."
            ) from error
        self._inner = inner
        return found

    def close(self, status: str, figures: Mapping[str, float] | None = None, step: int = 0) -> None:
        """Log the last figures, and end the run.

        Args:
            status: success or failed.
            figures: Values by name.
            step: Number of steps so far.
        """
        if figures:
            self.log_metrics(dict(figures), step)
        experiment = self.experiment
        self._tell("finalize", status)
        if type(experiment).__module__.partition(".")[0] == "wandb":  # Lightning leaves its run open
            self._guarded(experiment.finish, exit_code=int(status != "success"))
        self._inner = None

    def _tell(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of the logger."""
        if self._inner is not None:
            self._guarded(getattr(self._inner, method), *args, **kwargs)

    def _guarded(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            self._inner = None
            logger.warning(
                "%s failed, and gets no further values (%s: %s) The training goes on; all values are in the run's "
                "logs/.",
                self.title,
                type(error).__name__,
                brief(error),
            )

    # ------------------------------------------------------------------ as Lightning calls a logger

    @property
    def name(self) -> str:
        """The title: a tracker may ask its server for a name."""
        return self.title

    @property
    def version(self) -> None:
        """None, for the same reason."""
        return

    @property
    def experiment(self) -> Any:
        """The logger's own; None where it has none, or has failed."""
        found: list[Any] = [None]
        if self._inner is not None:
            self._guarded(lambda: found.append(getattr(self._inner, "experiment", None)))
        return found[-1]

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Hand values on.

        Args:
            metrics: Values by name.
            step: Number of steps so far.
        """
        self._tell("log_metrics", {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hand settings on.

        Args:
            params: Values by name.
            args: As the logger takes them.
            kwargs: As the logger takes them.
        """
        self._tell("log_hyperparams", params, *args, **kwargs)

    def save(self) -> None:
        """Let the logger write."""
        self._tell("save")

    def flush(self) -> None:
        """Let the logger write or send what it holds, where it can be told to."""
        experiment = self.experiment
        if hasattr(experiment, "flush"):
            self._guarded(experiment.flush)

    def finalize(self, status: str) -> None:
        """Leave the run open where training has ended well: its figures are measured behind that.

        Args:
            status: As Lightning tells it.
        """
        if status == "failed":
            self.close(status)


def goes_on_by(inner: Logger | type[Logger]) -> str | None:
    """Return the argument by which a logger goes on with an earlier run of its tracker; None if it cannot.

    Args:
        inner: The logger, or its class.
    """
    cls = inner if isinstance(inner, type) else type(inner)
    return next((_GOES_ON_BY[base.__name__] for base in cls.__mro__ if base.__name__ in _GOES_ON_BY), None)
