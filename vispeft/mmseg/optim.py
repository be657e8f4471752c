"""The optimiser's groups: the rules of the units for the backbone, mmengine's for everything else."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from vispeft.adapters.bank import AdapterBank
from vispeft.errors import ConfigError
from vispeft.mmseg.backbone import VispeftBackbone

__all__ = ["VispeftOptimWrapperConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VispeftOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, adapted to adapters.

    Tensors of an adapter are grouped by `AdapterBank.parameter_groups`: units say which of them do not decay and which
    learn faster. Frozen tensors are in no optimiser. Of ``paramwise_cfg``, an entry of ``custom_keys`` whose key is
    part of the backbone's own name (``backbone``) multiplies rate and decay of the whole adapter; keys for tensors
    inside it (``norm``) do not affect it. Outside the adapter everything is as documented by mmengine.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        """Check the config.

        Args:
            optim_wrapper_cfg: The optimiser's wrapper, with the optimiser in ``optimizer``.
            paramwise_cfg: mmengine's rules.

        Raises:
            ConfigError: If the optimiser has no learning rate, which units may ask for a multiple of.
        """
        # mmengine handles single parameters only if there is a rule; this one is its default.
        super().__init__(optim_wrapper_cfg, {"bypass_duplicate": False, **(paramwise_cfg or {})})
        if self.base_lr is None:
            raise ConfigError("optim_wrapper.optimizer has no lr, and adapters need one to start from. Give lr=...")

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Add the groups of a module and of everything in it.

        Args:
            params: The groups so far; changed in place.
            module: The module.
            prefix: Its name in the model.
            is_dcn_module: Whether it stands inside a deformable convolution.
        """
        if not isinstance(module, VispeftBackbone) or module.bank is None:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        params.extend(self._adapter_groups(module.bank, prefix))
        super().add_params(params, module.reader, f"{prefix}.reader", is_dcn_module)

    def _adapter_groups(self, bank: AdapterBank, name: str) -> list[dict[str, Any]]:
        """Return the groups of an adapter, under the rule for the backbone's name, if there is one."""
        rules = self.paramwise_cfg.get("custom_keys", {})
        matching = sorted((key for key in rules if key in name), key=lambda key: (-len(key), key))
        rule = rules[matching[0]] if matching else {}
        decay = 1.0 if self.base_wd is None else self.base_wd
        groups = bank.parameter_groups(self.base_lr * rule.get("lr_mult", 1.0), decay * rule.get("decay_mult", 1.0))
        for group in groups:
            if self.base_wd is None and group["weight_decay"]:
                del group["weight_decay"]  # the optimiser's own default
        return groups
