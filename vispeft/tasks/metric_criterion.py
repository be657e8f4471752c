"""The criterion of metric learning: a loss with its miner and its memory of earlier batches, exact in float32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.errors import ConfigError, DataError, VispeftError
from vispeft.losses.base import MetricLoss
from vispeft.metrics import make_similarity
from vispeft.tasks.gathering import gather, gather_with_grad
from vispeft.tasks.metric_losses import compares_images, is_of_library

__all__ = ["MetricCriterion", "check_memory"]

RAW = ("LargeMarginSoftmaxLoss", "SphereFaceLoss")
"""Losses of the library in which the length of an embedding has a meaning."""
LEAST_MEMORY = 8
"""Smallest memory: two classes with four images each, which are tried before training."""


class MetricCriterion(nn.Module):
    """A loss, a miner and a memory, called with the outputs of the head, the labels and the images.

    The library's losses get embeddings of length one. Those in which the length has a meaning get them as they are: our
    own, LargeMarginSoftmax, SphereFace, and those with an ``embedding_regularizer``. Everything runs in float32 outside
    of autocast, since the library converts its proxies in place to the type of the embeddings. With several processes
    the loss sees the embeddings of all of them.

    Tensors that the library keeps as plain attributes become buffers here, so that a checkpoint has them.
    """

    def __init__(self, loss: nn.Module, miner: nn.Module | None = None, memory: int = 0, dim: int = 0) -> None:
        """Combine the parts.

        Args:
            loss: Called with embeddings, labels and the choice of the miner.
            miner: Chooses pairs or triplets; None for all.
            memory: Embeddings of earlier batches that a batch is compared with as well; 0 for none.
            dim: Width of the embeddings, for the memory.

        Raises:
            ConfigError: If the loss cannot use a memory, or sums losses of different similarities.
        """
        super().__init__()
        self.raw = any(_keeps_length(module) for module in loss.modules())
        self.similarity = _similarity(loss)
        self.least_per_class = _least_per_class(loss, memory)
        self.loss, self.miner, self.memory = loss, miner, memory
        if memory:
            self.loss, self.miner = _with_memory(loss, miner, memory, dim), None
        for module in self.modules():
            _hold_tensors(module)

    @property
    def proxy_tensors(self) -> tuple[str, ...]:
        """Names of the parameters that the proxies' learning rate is for."""
        others = {
            id(parameter)
            for module in self.modules()
            if isinstance(module, MetricLoss) and module.proxy_tensors is not None
            for name, parameter in module.named_parameters()
            if name not in module.proxy_tensors
        }
        return tuple(name for name, parameter in self.named_parameters() if id(parameter) not in others)

    def forward(self, embeddings: Tensor, labels: Tensor, images: Any = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            embeddings: Outputs of the head (B, d).
            labels: Training classes from 0 on, int64 (B,).
            images: Not used; the criterion of a method may need them.

        Returns:
            A scalar in float32.

        Raises:
            DataError: If the memory holds less than a batch of all processes.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.float()
            embeddings = gather_with_grad(embeddings if self.raw else F.normalize(embeddings, dim=1))
            labels = gather(labels)
            check_memory(self.memory, len(labels))
            chosen = None if self.miner is None else self.miner(embeddings, labels)
            loss: Tensor = self.loss(embeddings, labels, chosen)
        for name, buffer in self.named_buffers():
            if buffer.requires_grad:  # a histogram of the library, which would keep the graph of this step
                module = self.get_submodule(name.rpartition(".")[0])
                setattr(module, name.rpartition(".")[2], buffer.detach())
        return loss

    def check(self, num_classes: int, dim: int) -> None:
        """Compute the loss of a small batch of noise, to refuse now what would fail in the first step.

        Args:
            num_classes: Number of training classes.
            dim: Width of the embeddings.

        Raises:
            ConfigError: If it fails.
        """
        classes = min(num_classes, 4, self.memory // 4 or 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            noise = torch.randn(4 * classes, dim, requires_grad=True)
            labels = torch.arange(classes).repeat_interleave(4)
            try:
                found = copy.deepcopy(self)(noise, labels)
                fine = isinstance(found, Tensor) and found.numel() == 1
            except VispeftError:
                raise
            except Exception as error:  # whatever the library raises for parts that do not fit
                raise ConfigError(f"{self._told()} cannot be computed: {error or type(error).__name__}.") from error
        if not fine:
            raise ConfigError(f"{self._told()} gives no number that could be minimised. Choose another reducer.")
        if not found.isfinite():
            raise ConfigError(
                f"{self._told()} is {found.item()} for a batch of noise, as it would be in the first step. Look at its "
                "arguments, such as a temperature or a scale of 0."
            )

    def _told(self) -> str:
        inner = getattr(self.loss, "loss", self.loss)
        miner = self.miner or getattr(self.loss, "miner", None)
        parts = [type(inner if isinstance(inner, nn.Module) else self.loss).__name__]
        parts += [] if miner is None else [f"with the miner {type(miner).__name__}"]
        parts += [f"and a memory of {self.memory}"] if self.memory else []
        return f"The loss {' '.join(parts)}"


def check_memory(memory: int, size: int) -> None:
    """Refuse a memory that holds less than a batch.

    Args:
        memory: Embeddings of earlier batches; 0 for none.
        size: Images of a batch of all processes.

    Raises:
        DataError: If it does.
    """
    if 0 < memory < size:
        raise DataError(
            f"A batch of all processes has {size} images, and the memory holds {memory}. Make memory larger, "
            f"{size} at least."
        )


def _similarity(loss: nn.Module) -> str | Mapping[str, Any]:
    """Return the similarity that a loss, and each of those it sums, compares embeddings by."""
    parts = [part for part in loss.modules() if isinstance(part, MetricLoss) or is_of_library(part)]
    found = [getattr(part, "similarity", "cosine") for part in parts] or ["cosine"]
    names = [make_similarity(similarity).to_dict() for similarity in found]
    if any(name != names[0] for name in names):
        told = ", ".join(f"{type(part).__name__} by {name['name']}" for part, name in zip(parts, names, strict=True))
        raise ConfigError(
            f"{type(loss).__name__} sums losses that compare embeddings differently ({told}), and neighbours are found "
            "by one similarity. Choose losses of one similarity."
        )
    return found[0]


def _least_per_class(loss: nn.Module, memory: int) -> int:
    """Return the smallest number of images of a class in a batch that a loss, and each of those it sums, can use."""
    own = [part.least_per_class for part in loss.modules() if isinstance(part, MetricLoss)]
    pairs = not memory and any(map(compares_images, loss.modules()))
    return max([2 if pairs else 1, *own])


def _keeps_length(module: nn.Module) -> bool:
    named = type(module).__name__ in RAW
    return named or isinstance(module, MetricLoss) or getattr(module, "embedding_regularizer", None) is not None


def _hold_tensors(module: nn.Module) -> None:
    """Turn tensors that are plain attributes of a module into buffers."""
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor):
            delattr(module, name)
            module.register_buffer(name, value)


def _with_memory(loss: nn.Module, miner: nn.Module | None, size: int, dim: int) -> nn.Module:
    """Put the library's cross-batch memory (arXiv 1912.06798) around a loss, with its state in buffers."""
    from pytorch_metric_learning.losses import CrossBatchMemory

    class Memory(CrossBatchMemory):
        """The library's memory; the place of the next batch and whether it is full are in a buffer, too."""

        @property
        def queue_idx(self) -> int:
            return int(self.place[0])

        @queue_idx.setter
        def queue_idx(self, value: int) -> None:
            if "place" not in self._buffers:
                self.register_buffer("place", torch.zeros(2, dtype=torch.long))
            self.place[0] = value

        @property
        def has_been_filled(self) -> bool:
            return bool(self.place[1])

        @has_been_filled.setter
        def has_been_filled(self, value: bool) -> None:
            if "place" not in self._buffers:
                self.register_buffer("place", torch.zeros(2, dtype=torch.long))
            self.place[1] = int(value)

    if size < LEAST_MEMORY:
        raise ConfigError(f"memory={size} was given; at least {LEAST_MEMORY} is needed, and as much as a batch.")
    supported = CrossBatchMemory.supported_losses()
    if type(loss).__name__ not in supported:
        raise ConfigError(
            f"memory={size} was given, and {type(loss).__name__} cannot compare a batch with another one. Leave memory "
            f"out, or choose {', '.join(supported)}."
        )
    return Memory(loss, dim, memory_size=size, miner=miner)
