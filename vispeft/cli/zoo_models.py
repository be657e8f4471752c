"""`vispeft.zoo.create`: an adapter of the zoo on its backbone, with head and preprocessing, ready to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vispeft.adapters.bank import AdapterBank
from vispeft.cli.evaluate import trained_task
from vispeft.cli.runs import Run
from vispeft.core.arguments import check_arguments
from vispeft.data.preprocessing import Preprocessing
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.parts import PartsTask
from vispeft.tasks.predictions import Prediction
from vispeft.zoo.adapters import PREFIX, find_zoo_adapter
from vispeft.zoo.index import ZooEntry

__all__ = ["ZooModel", "create"]


@dataclass(frozen=True)
class ZooModel:
    """An adapter of the zoo on its backbone, in evaluation mode."""

    entry: ZooEntry
    """Its description."""
    task: AdapterTask
    """The task it was trained for, a LightningModule: normalised images in, outputs out."""

    @property
    def backbone(self) -> nn.Module:
        """The timm model, in which the adapter acts."""
        return self.task.model

    @property
    def bank(self) -> AdapterBank:
        """The bank of the backbone, which switches, merges and saves adapters."""
        return self.task.bank

    @property
    def head(self) -> nn.Module | None:
        """What turns features into outputs: the adapter's classifier, or the decoders; None without one."""
        if isinstance(self.task, PartsTask):
            return nn.ModuleDict(self.task.parts())
        return cast("nn.Module | None", self.bank.head())

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are resized and normalised."""
        notes = self.bank.notes().get("preprocessing")
        return self.task.preprocessing if notes is None else Preprocessing.from_dict(notes)

    @property
    def class_names(self) -> list[str]:
        """Names of the outputs, in their order."""
        return self.task.class_names()

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Predict images.

        Args:
            images: uint8 (3, H, W), of any size each.

        Returns:
            One prediction for each: the row of `vispeft predict`'s table, and its pictures.
        """
        return self.task.predictor()(images)


def create(name: str) -> ZooModel:
    """Create an adapter of the zoo on its backbone.

    Args:
        name: Its name, with or without ``zoo:``.

    Returns:
        Backbone, adapter, head and preprocessing, ready to predict.

    Raises:
        UnknownNameError: If the zoo has no such adapter; near names are listed.
        FileError: If a file of it is missing or was changed.
        BaseMismatchError: If its backbone has other weights than it was trained on.

    Example:
        >>> model = vispeft.zoo.create("digits_ssf")
        >>> model.class_names[0]
        '0'
    """
    check_arguments(create, {"name": name})
    plain = name.removeprefix(PREFIX)
    entry = find_zoo_adapter(plain).entry
    task, _ = trained_task(Run.open(f"{PREFIX}{plain}"))
    return ZooModel(entry, task)
