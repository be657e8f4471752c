"""Processes of mmengine's launchers: who they are, and which run directory the first one has made for all."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import distributed

from vispeft.errors import ConfigError

__all__ = ["LAUNCHERS", "Launched"]

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
"""mmengine's names of what has started the processes; ``pytorch`` is torchrun."""
_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launched:
    """One of the processes that train together; or the only one, which needs nothing of this."""

    def __init__(self, launcher: str, config: Any) -> None:
        """Join the others, and let mmengine's Runner know how.

        Args:
            launcher: One of `LAUNCHERS`.
            config: mmengine's config; changed in place.

        Raises:
            ConfigError: If the launcher has not started this process.
        """
        self.rank, self._told = 0, launcher == "none"
        if launcher == "none":
            return
        _join(launcher, config)
        config.launcher, self.rank = launcher, distributed.get_rank()
        if config.get("find_unused_parameters") is None:
            # Without an adapter all of a backbone trains, and no map reads its last norm.
            config.find_unused_parameters = not (config.model.get("backbone") or {}).get("peft")
        if not torch.cuda.is_available() and config.get("model_wrapper_cfg") is None:
            config.model_wrapper_cfg = {
                "type": "MMDistributedDataParallel",
                "device_ids": None,  # mmengine would name a GPU
                "broadcast_buffers": False,
                "find_unused_parameters": config.find_unused_parameters,
            }

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return distributed.is_available() and distributed.is_initialized()

    def tell(self, place: str | None) -> None:
        """Tell the others, once, which directory the run has.

        Args:
            place: The directory; None if there will be no run.
        """
        if not self._told:
            self._told = True
            distributed.broadcast_object_list([place])

    def listen(self) -> str:
        """Wait until the first process has made the run directory, and return it; end where it makes none."""
        said: list[str | None] = [None]
        distributed.broadcast_object_list(said)
        if said[0] is None:
            raise SystemExit(2)
        return said[0]

    def leave(self) -> None:
        """Leave the others, when all have trained."""
        if self.several:
            distributed.destroy_process_group()


def _join(launcher: str, config: Any) -> None:
    missing = [name for name in _NEEDED if name not in os.environ] if launcher == "pytorch" else []
    if missing:
        raise ConfigError(
            f"--launcher pytorch was given, and {', '.join(missing)} is not set: torchrun sets it. Start the command "
            "by torchrun --nproc-per-node N -m vispeft train CONFIG --launcher pytorch --out DIR."
        )
    if launcher == "pytorch" and not torch.cuda.is_available():
        distributed.init_process_group("gloo")  # mmengine's own way chooses a GPU first
        return
    from mmengine.dist import init_dist

    settings = (config.get("env_cfg") or {}).get("dist_cfg") or {}
    init_dist(launcher, **{"backend": "nccl", **settings})
