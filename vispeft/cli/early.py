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
from vispeft.cli.settings import check_settings
from vispeft.cli.start import check_source
from vispeft.cli.trackers import check_trackers
from vispeft.data.base import ImageData
from vispeft.data.listed import ListedData
from vispeft.data.metric_data import MetricData
from vispeft.data.shares import part_of_batch
from vispeft.storage.class_embeddings import ClassEmbeddings
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
            FileError: If the config, an adapter or class embeddings to start from cannot be read, or a folder cannot
                be made.
        """
        super().__init__(config, overrides, create=False)
        settings, model = self.settings("trainer"), self.settings("model")["init_args"]
        check_settings(settings)
        check_trackers(self.trackers)
        self.team = Team.of(settings)
        self.processes = self.team.processes
        """Processes of the training, which may be others than there are where it is only measured."""
        self.needed: Sequence[str] = ()
        """Arguments that going on needs besides the run."""
        self.batches: dict[str, int] = {}
        """Images of a batch in the checkpoint that is gone on from, which the processes share, by class of the data."""
        if self.team.shards:
            dtype = model.get("base_dtype", "float32")
            check_sharding(dtype, settings.get("precision"), self.config["compile"] != "off")
        check_schedule(model.get("schedule_epochs"), settings["max_epochs"])
        if self.config["init"] is not None and isinstance(model.get("method"), dict):
            check_source(self.config["init"], import_class(model["method"]["class_path"]))
        start = model.get("head_start")
        if isinstance(start, str) and start.endswith(".safetensors"):
            ClassEmbeddings.load(start)
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
        self._tell_processes(self.datamodule)  # again, for a task that the data do not size

    def _sized_by(self, data: Any, name: str) -> Any:
        """Return what sizes the task, after checking the data, which are made before it."""
        found = super()._sized_by(data, name)
        self._tell_processes(data)
        if isinstance(data, ListedData):
            data.report().raise_errors()
        if isinstance(data, MetricData):
            data.check_batches()
        return found

    def _tell_processes(self, data: Any) -> None:
        """Let data know how many processes share a batch, before a trainer does."""
        if not isinstance(data, ImageData):
            return
        data.processes = self.processes
        if together := self.batches.get(type(data).__qualname__):
            data.batch_size = part_of_batch(together, self.processes)
