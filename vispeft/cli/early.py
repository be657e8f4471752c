"""The config of a training, checked as far as possible before its backbone is made.

A backbone takes seconds, or minutes where it is fetched; what is wrong with settings, places and data is said before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vispeft.building.classes import import_class
from vispeft.cli.config import ConfigCLI
from vispeft.cli.processes import Team
from vispeft.cli.settings import check_last, check_settings
from vispeft.cli.start import check_source
from vispeft.data.listed import ListedData
from vispeft.data.metric_data import MetricData
from vispeft.storage.places import check_folder
from vispeft.tasks.sharding import check_sharding
from vispeft.tasks.trainer_checks import check_schedule

__all__ = ["TrainCLI"]


class TrainCLI(ConfigCLI):
    """The config of a training, read and checked; `create` makes its objects.

    `create` makes the data first, and checks them before it makes the task with its backbone.
    """

    def __init__(self, config: Path, overrides: Sequence[str]) -> None:
        """Read a config and check its settings.

        Args:
            config: The YAML file.
            overrides: Arguments such as ``--model.lr 1e-3``.

        Raises:
            ConfigError: If a setting cannot work.
            FileError: If the config, or an adapter to start from, cannot be read, or a folder cannot be made.
        """
        super().__init__(config, overrides, create=False)
        settings, model = self.settings("trainer"), self.settings("model")["init_args"]
        check_settings(settings)
        self.team = Team.of(settings)
        if self.team.shards:
            dtype = model.get("base_dtype", "float32")
            check_sharding(dtype, settings.get("precision"), self.config["compile"] != "off")
        check_schedule(model.get("schedule_epochs"), settings["max_epochs"])
        if self.config["init"] is not None and isinstance(model.get("method"), dict):
            check_source(self.config["init"], import_class(model["method"]["class_path"]))
        if isinstance(self.config["cache_features"], str):
            check_folder(Path(self.config["cache_features"]), "The folder of cache_features")

    def settings(self, section: str) -> dict[str, Any]:
        """Return a section of the config as it was read, without objects.

        Args:
            section: model, data or trainer.
        """
        return dict(self.config[section].as_dict())

    def create(self) -> None:
        """Create the data, check them, and create the task and a trainer that only evaluates.

        Raises:
            VispeftError: If one of them refuses its settings, or the data cannot be used.
        """
        super().create()
        check_last(self.settings("trainer"), self.datamodule)  # again, for a task that the data do not size

    def _sized_by(self, data: Any, name: str) -> Any:
        """Return what sizes the task, after checking the data, which are made before it."""
        found = super()._sized_by(data, name)
        check_last(self.settings("trainer"), data)
        if isinstance(data, ListedData):
            data.report().raise_errors()
        if isinstance(data, MetricData):
            data.check_batches()
        return found
