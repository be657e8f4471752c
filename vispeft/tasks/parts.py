"""The base of tasks with modules of their own behind the backbone, which train and are stored with the adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vispeft.adapters.report import Report
from vispeft.storage.files import DECODER, check_tensors, read_decoder
from vispeft.tasks.base import AdapterTask

__all__ = ["PartsTask"]


class PartsTask(AdapterTask, ABC):
    """Base of the tasks whose outputs come from modules behind the backbone, in place of its classifier.

    Subclasses name these modules in `parts`.
    """

    classifies: ClassVar[bool] = False
    head_name: ClassVar[str] = "decoder"
    parts_lr: float | None = None
    """Highest learning rate of these modules; None for that of the adapter."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Modules that train with the adapter and are stored with it, by their name in files."""

    def report(self) -> Report:
        """Count the parameters of the adapter, and of the modules behind the backbone."""
        trained = [p for part in self.parts().values() for p in part.parameters() if p.requires_grad]
        return replace(super().report(), decoder=sum(p.numel() for p in trained))

    # ------------------------------------------------------------------ training

    def further_groups(self) -> list[dict[str, Any]]:
        """Return optimiser groups of these modules: matrices decay, vectors only with `decay_vectors`."""
        trained = [p for part in self.parts().values() for p in part.parameters()]
        lr = self.lr if self.parts_lr is None else self.parts_lr
        return self.groups_of("decoder", trained, lr, self.weight_decay)

    def groups_of(self, name: str, trained: list[nn.Parameter], lr: float, decay: float) -> list[dict[str, Any]]:
        """Sort tensors into a group with and one without weight decay; none is empty.

        Args:
            name: Name of the groups, in front of ``decay`` and ``no_decay``.
            trained: The tensors.
            lr: Their learning rate.
            decay: Weight decay of matrices, and with `decay_vectors` of vectors.
        """
        groups = [
            {
                "params": [p for p in trained if (p.ndim > 1 or self.decay_vectors) == decays],
                "lr": lr,
                "weight_decay": decay if decays else 0.0,
                "name": f"{name} {'decay' if decays else 'no_decay'}",
            }
            for decays in (True, False)
        ]
        return [group for group in groups if group["params"]]

    # ------------------------------------------------------------------ pictures

    def as_picture(self, image: Tensor) -> Tensor:
        """Undo the normalisation of an image.

        Args:
            image: Normalised (3, H, W).

        Returns:
            uint8 (3, H, W), on the CPU.
        """
        preprocessing = getattr(self.shown_data(), "preprocessing", self.preprocessing)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        return ((image.cpu().float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)

    def shown_data(self) -> Any:
        """Data module of the trainer; None without one."""
        return getattr(self._trainer, "datamodule", None) if self._trainer is not None else None

    # ------------------------------------------------------------------ files

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors of these modules by their names in files."""
        return {f"{DECODER}{key}": tensor for key, tensor in self._parts_state().items()}

    def _parts_state(self) -> dict[str, Tensor]:
        parts = self.parts().items()
        return {f"{name}.{key}": tensor for name, part in parts for key, tensor in part.state_dict().items()}

    def take(self, units: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a saved adapter, and those of these modules if given."""
        super().take(units, {})
        if head:
            self.load_decoder({key.removeprefix(DECODER): tensor for key, tensor in head.items()})

    def load_decoder(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into these modules.

        Args:
            tensors: A result of `files.read_decoder`.

        Raises:
            FileError: If one is missing, unknown, of another shape, or not finite; nothing is copied then.
        """
        own = self._parts_state()
        check_tensors(own, tensors)
        with torch.no_grad():
            for key, tensor in tensors.items():
                own[key].copy_(tensor)

    def save_adapter(self, path: str | Path) -> None:
        """Write the adapter with these modules.

        Args:
            path: Its directory.
        """
        self.bank.save(path, decoder=self._parts_state())

    def load_adapter(self, path: str | Path) -> None:
        """Replace adapter and modules by saved ones.

        Args:
            path: Their directory.
        """
        super().load_adapter(path)
        self.load_decoder(read_decoder(path))
