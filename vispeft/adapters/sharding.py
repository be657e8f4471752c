"""Sharding the frozen weights of a model over several processes, which put them together block by block."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from vispeft.adapters.compiling import CompilingBank
from vispeft.adapters.verify import probe_images
from vispeft.core.modes import evaluating
from vispeft.core.route import Route
from vispeft.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ShardingBank"]

SHARDED_ROLES = ("block", "downsample.reduction")
"""Roles of the modules whose frozen weights are sharded: nearly all of a backbone, and none that some passes skip."""


class ShardingBank(CompilingBank):
    """The sharded weights of a model."""

    @property
    def sharded(self) -> list[nn.Module]:
        """The modules of whose frozen weights each process holds a part; empty in a whole model."""
        return list(self._sharded)

    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of which each process holds a part, by their names in the timm model."""
        if not self._sharded:
            return {}
        from torch.distributed.tensor import DTensor

        return {name: parameter for name, parameter in self._model.named_parameters() if isinstance(parameter, DTensor)}

    def shard(self, mesh: DeviceMesh | None = None) -> None:
        """Leave a part of the frozen weights in each process, by ``torch.distributed.fsdp.fully_shard``.

        The weights of a block, and of the layer that joins patches between two stages, are put together before it runs,
        in the forward and in the backward pass, and given up after it. What trains stays whole in each process, and so
        do the embedding of patches, positions and norms outside of blocks. The model is moved to the device of the
        mesh. This cannot be undone: attaching, detaching, merging, verifying and compiling are refused from now on.

        Gradients are not exchanged here. Wrap the model in `torch.nn.parallel.DistributedDataParallel`, which ignores
        the sharded weights; of a module around the model it has to be told to ignore `sharded_parameters`. Every
        process has to run the same number of passes, forward and backward.

        Args:
            mesh: The processes, in one dimension; None for all of them.

        Raises:
            ConfigError: If the model is compiled, or its weights are sharded already.
            MergeError: If it is merged.
        """
        from torch.distributed.device_mesh import init_device_mesh

        with self.changing("shard its weights"):
            self.check_ready("shard its weights")
            if self.is_compiled:
                raise ConfigError(
                    "The model is compiled, and a graph of a block cannot wait for its weights. Leave compile out "
                    "(bank.compile('off')), or train with whole weights (ddp)."
                )
            if mesh is None:
                kind = next(self._model.parameters()).device.type
                mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
            self._whole_fingerprint = self.fingerprint()
            self._routing.sharded, self._routing.casts.keeps = True, False
            self._shard(mesh)
            self._move_and_run(mesh.device_type)

    def _shard(self, mesh: DeviceMesh) -> None:
        from torch.distributed.fsdp import fully_shard

        # Meant for callers that change the output of a block in place, which none of the models does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        base = {id(tensor) for _, tensor in self.base_tensors()}
        for module in (self._model.get_submodule(s.path) for role in SHARDED_ROLES for s in self.view.at(role)):
            # FSDP takes no scalars.
            whole = {p for p in module.parameters() if id(p) not in base or p.requires_grad or p.ndim == 0}
            fully_shard(module, mesh=mesh, ignored_params=whole)
            self._sharded.append(module)
        # The root shards nothing; it lets the blocks share streams, and fetch weights ahead in the backward pass.
        fully_shard(self._model, mesh=mesh, ignored_params=set(self._model.parameters()))
        names = list(self.sharded_parameters())
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._model, names)

    @torch.no_grad()
    def _move_and_run(self, kind: str) -> None:
        """Move what is whole, and run the base once: FSDP takes the first module that runs for the root."""
        place = kind if kind == "cpu" else f"{kind}:{torch.get_device_module(kind).current_device()}"
        model = self._model.to(torch.device(place))
        with evaluating(model), self._routing.using(Route()):
            model(probe_images(model, self.view))
