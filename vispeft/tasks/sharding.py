"""Training with the frozen weights sharded over several processes (PyTorch's FSDP2)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from vispeft.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PassesTogether", "ShardedStrategy", "check_sharding", "shards"]


def shards(trainer: Trainer) -> bool:
    """Whether a trainer shards the frozen weights of its task.

    Args:
        trainer: The trainer.
    """
    return isinstance(trainer.strategy, ShardedStrategy)


def check_sharding(base_dtype: str, precision: Any, compiled: bool) -> None:
    """Refuse settings with which the frozen weights cannot be sharded, or would be whole in spite of it.

    Args:
        base_dtype: Type of the frozen weights.
        precision: The trainer's setting; None for the default.
        compiled: Whether the model is compiled.

    Raises:
        ConfigError: If there is one.
    """
    mixed = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(str(precision))
    if mixed is not None and mixed != base_dtype:
        other = "Set model.base_dtype" if mixed == "bfloat16" else "Give bf16-mixed, and set model.base_dtype"
        raise ConfigError(
            f"trainer.strategy is fsdp2 and trainer.precision {precision}, with frozen weights in {base_dtype}: each "
            f"process would keep a copy of all of them in {mixed} from the forward to the backward pass, and sharding "
            f"is to keep a part. {other} to bfloat16, or leave precision out."
        )
    if compiled:
        raise ConfigError(
            "trainer.strategy is fsdp2 and the model is compiled: a graph of a block cannot wait for its weights. "
            "Leave compile out, or train with whole weights (trainer.strategy ddp)."
        )


class ShardedStrategy(DDPStrategy):
    """Data-parallel training in which each process holds a part of the frozen weights.

    What trains is whole in each process, and its gradients are exchanged as `DDPStrategy` does; the frozen weights are
    sharded by `AdapterBank.shard`. So optimiser, clipping, averages and checkpoints are those of any other training.
    """

    group: ProcessGroup | None = None
    """The processes, for exchanges of weights: these come in another order than those of gradients."""

    def model_to_device(self) -> None:
        """Shard the frozen weights, and move the rest of the task to its device.

        Raises:
            ConfigError: If the backbones of the processes differ, or the model cannot be sharded.
        """
        from torch.distributed.device_mesh import DeviceMesh

        task: Any = self.lightning_module
        if task.trainer.state.fn == TrainerFn.FITTING:
            dtype = str(task.base_dtype).removeprefix("torch.")
            check_sharding(dtype, task.trainer.precision, task.bank.is_compiled)
            self.group = distributed.new_group()
            task.bank.shard(DeviceMesh.from_group(self.group, self.root_device.type))
            _check_same_backbone(task.bank.fingerprint())
            # In front, since the others may gather metrics where it waits for the last pass.
            task.trainer.callbacks.insert(0, PassesTogether())
        super().model_to_device()

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap the task, so that the gradients of what trains are exchanged."""
        task: Any = model
        sharded = {id(parameter) for parameter in task.bank.sharded_parameters().values()}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in sharded]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return super()._setup_model(model)


def _check_same_backbone(fingerprint: dict[str, Any]) -> None:
    """Refuse processes with different backbones, whose parts would be put together."""
    own = json.dumps(fingerprint, sort_keys=True)
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ConfigError(
                f"The backbone of process {rank} has other weights than that of process 0, and each would hold a part "
                "of them. Give all processes the same file (model.weights), or the same cache of pretrained weights."
            )


class PassesTogether(Callback):
    """Let all processes make as many forward passes in a validation as the one that makes the most.

    A block is put together by all processes at once. One that has measured its images, and would not come any more,
    takes part in the passes of the others: it fetches the weights of the blocks and computes nothing.
    """

    def __init__(self) -> None:
        """Begin outside of a validation."""
        self._handles: list[RemovableHandle] = []
        self._order: list[Any] = []
        self._passes = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce each pass from now on, and note the order of the blocks in the first one."""
        self.end()
        strategy = cast(ShardedStrategy, trainer.strategy)
        for number, module in enumerate(cast(Any, pl_module).bank.sharded):

            def before(module: nn.Module, *_: Any, first: bool = number == 0) -> None:
                if first:
                    self._passes += 1
                    _still_measuring(strategy, 1)
                if self._passes == 1:
                    self._order.append(module)

            self._handles.append(module.register_forward_pre_hook(before, prepend=True))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After the last batch, take part in the passes of the others until none is left; then metrics are gathered."""
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress  # of loaders that do not know their length
        if progress.is_last_batch or batch_idx + 1 == counts[dataloader_idx]:
            self._join(cast(ShardedStrategy, trainer.strategy))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop announcing passes."""
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Announce nothing any more."""
        self.end()

    @torch.no_grad()
    def _join(self, strategy: ShardedStrategy) -> None:
        while _still_measuring(strategy, 0):
            for module in self._order:
                module.unshard()
                module.reshard()

    def end(self) -> None:
        """Stop announcing passes."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._order, self._passes = [], [], 0


def _still_measuring(strategy: ShardedStrategy, own: int) -> bool:
    """Tell whether any process makes another pass; one that does need not wait for the answer."""
    answer: Tensor = torch.tensor([own], device=strategy.root_device)
    distributed.all_reduce(answer, group=strategy.group)
    return not own and bool(answer.item())
