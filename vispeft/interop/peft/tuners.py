"""Local tuners of Hugging Face peft as methods of this project.

peft replaces layers and renames their tensors. Here its layers become units after timm's own, so that models, files,
switching, merging and verification work as usual.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor, nn

from vispeft.core.families import frozen_tensor
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import SequentialUnit
from vispeft.errors import ConfigError, SiteError

__all__ = ["LOCAL", "REFUSED", "PeftMethod", "PeftUnit", "changes_weight", "import_peft"]

LOCAL = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "IA3", "MISS", "FOURIERFT", "C3A", "HIRA", "DELORA", "GRALORA")
"""Supported tuners: each layer is independent of other layers, and is a linear map."""
_SHARING = "it shares tensors between layers, which peft's own injection does not support either"
_PROMPTS = "it needs a model of transformers; see vispeft.VPT and vispeft.Prefix"
_IN_STEP = "it has to be told of every training step, which no trainer does for it"
REFUSED = {
    **dict.fromkeys(("VERA", "PVERA", "VBLORA", "RANDLORA", "UNILORA", "TINYLORA", "LILY", "FROD"), _SHARING),
    **dict.fromkeys(
        ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT"), _PROMPTS
    ),
    "ADALORA": _IN_STEP,
    "LN_TUNING": "it fails on models with norms that have no parameters; see vispeft.NormTuning",
    "SHIRA": "the places of its numbers are drawn at random and are in no state dict",
    "ROAD": "its groups do not divide the widths of most backbones",
    "OSF": "it trains nearly all of the weights; see vispeft.Full",
}
"""Tuners that do not work on timm models or not inside another trainer, with the reason."""
_WEIGHT_CHANGING = ("pissa", "olora", "orthogonal", "corda", "loftq", "lora_ga")
"""Initialisations of peft's LoRA that change the frozen weight, so that an adapter does not fit the plain model."""
_ROLES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_ADAPTER = "default"
_RESULT = "_vispeft_result"
"""Attribute of a tensor: the result that the host has computed for it."""


def import_peft() -> ModuleType:
    """Import peft, which is optional.

    Returns:
        The package.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            f"Hugging Face peft could not be imported ({error}). Install the extra: vispeft[peft]."
        ) from error


class _Given(nn.Linear):
    """The frozen layer inside a tuner: it returns the host's result for the current input, and computes any other."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = cast(nn.Parameter, weight), cast(nn.Parameter, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Compute (..., out)."""
        given: Tensor | None = getattr(input, _RESULT, None)
        if given is not None:
            return given
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class PeftUnit(SequentialUnit):
    """A peft layer after a timm linear layer, whose tensors it refers to but does not own."""

    identity_at_start = False

    def __init__(self, config: Mapping[str, Any], path: str, layer: nn.Linear) -> None:
        """Create peft's layer.

        Args:
            config: Fields of peft's configuration.
            path: The layer's path in the model, matched by patterns in the configuration.
            layer: The frozen layer.
        """
        super().__init__()
        self.config, self.path = config, path
        weight, bias = frozen_tensor(layer, "weight"), frozen_tensor(layer, "bias")
        assert weight is not None
        # Some tuners read values when created, so even the shapes of a plan are found with real tensors.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            self.tuner = self._make(weight, bias)

    def _make(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        out_features, in_features = weight.shape
        device = "cpu" if weight.is_meta else "meta"
        base = nn.Linear(in_features, out_features, bias=bias is not None, device=device)
        if not weight.is_meta:
            base.weight, base.bias = cast(nn.Parameter, weight), cast(nn.Parameter, bias)
        place = holder = nn.Module()
        *parents, leaf = self.path.split(".")
        for name in parents:
            place.add_module(name, place := nn.Module())
        place.add_module(leaf, base)
        states = [(parameter, parameter.requires_grad) for parameter in (weight, bias) if parameter is not None]
        peft = import_peft()
        fields = {**copy.deepcopy(dict(self.config)), "target_modules": re.escape(self.path)}
        peft.inject_adapter_in_model(peft.get_peft_config(fields), holder, _ADAPTER)
        for parameter, trains in states:
            parameter.requires_grad_(trains)
        tuner = holder.get_submodule(self.path)
        # The base is not among the unit's tensors: it is frozen, and already in the model.
        del tuner._modules["base_layer"]
        tuner.__dict__["base_layer"] = _Given(weight, bias)
        for module in list(tuner.modules()):
            for name, tensor in list(module._parameters.items()):
                if tensor is not None and not tensor.requires_grad:
                    del module._parameters[name]
                    module.register_buffer(name, tensor.detach())
        return tuner

    def reset(self, generator: Generator) -> None:
        """Copy the initial values of a new peft layer, created with a seed from the generator."""
        seed, base = int(torch.randint(0, 2**31 - 1, (), generator=generator)), self.tuner.__dict__["base_layer"]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            fresh = self._make(base.weight, base.bias)
        self.tuner.load_state_dict(fresh.state_dict())

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute (..., out) by peft's own code."""
        # The host's result travels with the input: in the module, it would meet those of other threads.
        seen = x.view_as(x)
        setattr(seen, _RESULT, y)
        try:
            out: Tensor = self.tuner(seen)
        finally:
            setattr(seen, _RESULT, None)  # autograd may keep the input, and need not keep the result with it
        return out

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Compute the weight from the outputs of peft's layer for the unit vectors."""
        rows = self._with(weight, None, torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))
        return rows.T.to(weight.dtype)

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Compute the bias from the output of peft's layer for a zero input."""
        frozen = self.tuner.__dict__["base_layer"].weight.detach().to(bias.dtype)
        return self._with(frozen, bias, bias.new_zeros(1, frozen.shape[1]))[0].to(bias.dtype)

    def _with(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """Run a copy of peft's layer, in the weight's precision, on another frozen layer."""
        base = self.tuner.__dict__.pop("base_layer")
        try:
            tuner = copy.deepcopy(self.tuner).to(weight.dtype).eval()
        finally:
            self.tuner.__dict__["base_layer"] = base
        tuner.__dict__["base_layer"] = _Given(weight, bias)
        return tuner(x)


@register
@dataclass(frozen=True, kw_only=True)
class PeftMethod(Method):
    """A tuner of Hugging Face peft at linear layers; attached, saved, merged and verified like every method.

    Layers are chosen by the configuration's ``target_modules`` (a regular expression or path endings, as in peft) or,
    without it, by roles. The classifier is always the adapter's own.
    """

    config: Any = field(default_factory=lambda: {"peft_type": "LORA", "r": 8, "lora_alpha": 8})
    """A configuration of peft, such as ``peft.LoHaConfig(r=4)``, or its fields with ``peft_type``."""

    name: ClassVar[str] = "peft"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB, FGVC)
    default_roles: ClassVar[tuple[str, ...]] = _ROLES

    def __post_init__(self) -> None:
        """Check the fields, and convert the configuration to plain values."""
        super().__post_init__()
        peft = import_peft()
        try:
            given = self.config if isinstance(self.config, peft.PeftConfig) else peft.get_peft_config(dict(self.config))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"PeftMethod(config={self.config!r}): peft does not take it ({error}).") from error
        fields = json.loads(json.dumps(given.to_dict(), default=_plain))
        object.__setattr__(self, "config", fields)
        kind = fields["peft_type"]
        if kind not in LOCAL:
            reason = REFUSED.get(kind, "it was not tried on timm models")
            raise ConfigError(f"PeftMethod: {kind} is refused: {reason}. Tuners that work: {', '.join(LOCAL)}.")
        self._check_fields(fields)

    def _check_fields(self, fields: Mapping[str, Any]) -> None:
        if self.roles is not None and fields.get("target_modules"):
            raise ConfigError("PeftMethod: roles and target_modules both choose layers; give one of them.")
        if isinstance(fields.get("target_modules"), str):
            try:
                re.compile(fields["target_modules"])
            except re.error as error:
                raise ConfigError(
                    f"PeftMethod: target_modules={fields['target_modules']!r} is no regular expression ({error})."
                ) from error
        if fields.get("modules_to_save"):
            raise ConfigError(
                f"PeftMethod: modules_to_save={fields['modules_to_save']} was given; the classifier belongs to the "
                "adapter here and trains as it is. Leave it out."
            )
        if fields.get("bias", "none") != "none":
            raise ConfigError(f"PeftMethod: bias={fields['bias']!r} trains the base in place. Leave it at 'none'.")
        if fields.get("megatron_config"):
            # peft imports the module that megatron_core names, and these fields come from adapter files, too.
            raise ConfigError("PeftMethod: megatron_config makes peft import a module by its name. Leave it out.")
        if changes_weight(fields):
            raise ConfigError(
                f"PeftMethod: init_lora_weights={fields['init_lora_weights']!r} changes the frozen weight, so that the "
                "adapter would fit no other copy of the model. vispeft.LoRA(start='pissa') does not."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Plan one peft layer after each chosen layer."""
        for site in self.sites(view):
            layer = cast(nn.Linear, model.get_submodule(site.path))
            self._check_ranks(max(site.in_features, site.out_features))
            yield PlanItem(site, "peft", partial(PeftUnit, self.config, site.path, layer))

    def _check_ranks(self, width: int) -> None:
        """Refuse ranks above the width of a layer, which peft would allocate before any shape is compared."""
        ranks = {"r": self.config.get("r"), **(self.config.get("rank_pattern") or {})}
        for name, rank in ranks.items():
            if isinstance(rank, int) and rank > width:
                raise ConfigError(f"PeftMethod: {name}={rank} is above the {width} features of a layer.")

    def sites(self, view: View) -> list[Site]:
        """Choose the layers by ``target_modules``, or by roles."""
        found = self._targets(view) if self.config.get("target_modules") else super().sites(view)
        for site in found:
            if site.kind != "linear" or site.rows is not None or site.role == "head":
                raise SiteError(
                    f"PeftMethod acts on whole linear layers of the backbone; {site.key!r} ({site.role}) is none. In "
                    "target_modules, endings such as 'proj' and 'all-linear' match more than meant: write 'attn.proj'."
                )
            if site.reads_weight:
                raise SiteError(
                    f"This {view.family} model reads the weight of {site.path} and does not call it, so a layer of "
                    "peft would train nothing there. Leave it out, or use vispeft.LoRA."
                )
        return found

    def _targets(self, view: View) -> list[Site]:
        tuners = importlib.import_module("peft.tuners.tuners_utils")
        config = import_peft().get_peft_config(copy.deepcopy(self.config))
        sites = [site for site in view.sites if site.rows is None and site.path]
        found = [site for site in sites if tuners.check_target_module_exists(config, site.path)]
        paths = {site.path: site for site in found if site.kind == "linear" or site.kind == "conv"}
        chosen = [site for site in paths.values() if self.blocks is None or site.block in self._indices(view)]
        if not chosen:
            raise SiteError(f"target_modules={self.config['target_modules']!r} matches no linear layer of this model.")
        return chosen

    def _indices(self, view: View) -> set[int]:
        return {index % view.depth for index in self.blocks or ()}

    def parameter_count(self, view: View) -> int:
        """Count the parameters peft creates for layers of these shapes, since each tuner has its own formula."""
        count = 0
        for site in self.sites(view):
            with torch.device("meta"):
                layer = nn.Linear(site.in_features, site.out_features, bias="bias" in view.tensors.get(site.path, {}))
                unit = PeftUnit(self.config, site.path, layer)
            count += sum(prod(tensor.shape) for tensor in unit.parameters())
        return count


def _plain(value: Any) -> Any:
    """Convert a value that JSON does not support."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", None) or str(value)


def changes_weight(fields: Mapping[str, Any]) -> bool:
    """Return whether a peft LoRA's initialisation changes the frozen weight, so that it does not fit the plain model.

    Args:
        fields: Fields of peft's configuration.
    """
    start = fields.get("init_lora_weights")
    return isinstance(start, str) and start.startswith(_WEIGHT_CHANGING)
