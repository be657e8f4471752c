"""The network of several dense tasks: the maps that their decoders read, the norms and the decoders."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from vispeft.adapters.task_maps import forward_tasks
from vispeft.heads.pyramid import MapReader, wide
from vispeft.tasks.dense import DenseNetwork

__all__ = ["MultiTaskNetwork", "OneOutput"]


class MultiTaskNetwork(DenseNetwork):
    """Backbone, map reader, and norms and decoder of each task in one module: images in, outputs by task."""

    def __init__(
        self,
        model: nn.Module,
        reader: MapReader,
        norms: nn.ModuleDict,
        decoders: nn.ModuleDict,
        routed: bool = False,
        batched: bool = False,
    ) -> None:
        """Combine the parts.

        Args:
            model: The backbone, adapted or merged.
            reader: The reader of its maps.
            norms: Norms of the maps by task, one for each map; empty without norms.
            decoders: A decoder by task; those of some tasks leave the others out.
            routed: Whether the route of the model has chosen the task already, as a merged model needs it.
            batched: Run all tasks in one pass; see `forward_tasks`.
        """
        super().__init__(model, reader)
        self.norms, self.decoders, self.routed, self.batched = norms, decoders, routed, batched

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute outputs (B, K, H, W) by task, resized bilinearly to the images.

        Args:
            images: Normalised images (B, 3, H, W) of any size; they are padded to whole patches inside.
        """
        padded = self.padded(images)
        if self.routed:
            maps = dict.fromkeys(self.decoders, self.reader(self.model, padded))
        else:
            asked = {"batched": self.batched, "norm": self.reader.norm}
            maps = forward_tasks(self.model, padded, list(self.decoders), self.reader.taps, **asked)
        found = {}
        for task, decoder in self.decoders.items():
            levels = wide(maps[task], images)
            if task in self.norms:
                norms = cast(nn.ModuleList, self.norms[task])
                levels = [norm(level) for norm, level in zip(norms, levels, strict=True)]
            found[task] = self.fitted(decoder(levels), padded, images)
        return found


class OneOutput(nn.Module):
    """A network of one task whose output is a tensor."""

    def __init__(self, network: MultiTaskNetwork, task: str) -> None:
        """Combine the parts.

        Args:
            network: The network.
            task: The task.
        """
        super().__init__()
        self.network, self.task = network, task

    @property
    def pads_to(self) -> int:
        """Number whose multiples height and width are padded to."""
        return self.network.pads_to

    def forward(self, images: Tensor) -> Tensor:
        """Compute outputs (B, K, H, W), resized bilinearly to the images.

        Args:
            images: Normalised images (B, 3, H, W).
        """
        return cast(Tensor, self.network(images)[self.task])
