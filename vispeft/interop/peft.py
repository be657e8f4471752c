"""Hugging Face peft: LoRA adapters in both directions, and any local tuner of peft as a method of this project.

peft replaces layers and renames their tensors; here its layers become units behind timm's own, so that models, files,
switching, merging and verification stay as they are. peft is optional and imported where it is used.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from vispeft.adapters.attach import attach
from vispeft.adapters.bank import AdapterBank
from vispeft.core.families import describe, unwrap
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.plan import Plan
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import SequentialUnit
from vispeft.errors import ConfigError, FileError, SiteError, VispeftError
from vispeft.methods.lora import LoRA

__all__ = ["PeftMethod", "PeftUnit", "from_peft", "to_peft"]

logger = logging.getLogger(__name__)

LOCAL = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "IA3", "MISS", "FOURIERFT", "C3A", "HIRA", "DELORA", "GRALORA")
"""Tuners that keep everything of a layer in that layer, and whose layer is a linear map."""
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
"""Starts of peft's LoRA that change the frozen weight itself, so that an adapter fits no plain model."""
_ROLES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_PREFIX = "base_model.model."
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER = "default"


def _peft() -> ModuleType:
    """Import peft.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            f"Hugging Face peft could not be imported ({error}). Install the extra: vispeft[peft]."
        ) from error


# ----------------------------------------------------------------------------------------------- any local tuner


class _Given(nn.Linear):
    """The layer below a tuner: for the present input it gives what the host computed, for others it computes."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = cast(nn.Parameter, weight), cast(nn.Parameter, bias)
        self.pair: tuple[Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Compute (..., out)."""
        if self.pair is not None and input is self.pair[0]:
            return self.pair[1]
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class PeftUnit(SequentialUnit):
    """A layer of peft behind a linear layer of timm, whose tensors it looks at and does not own."""

    identity_at_start = False

    def __init__(self, config: Mapping[str, Any], path: str, layer: nn.Linear) -> None:
        """Make peft's layer.

        Args:
            config: Fields of peft's configuration.
            path: The layer's path in the model, to which patterns in the configuration apply.
            layer: The frozen layer.
        """
        super().__init__()
        self.config, self.path = config, path
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        assert weight is not None
        # Some tuners look at values while they are made, so also the shapes of a plan are found with real ones.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            self.tuner = self._make(weight, bias)

    def _make(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        base = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="cpu" if weight.is_meta else "meta")
        if not weight.is_meta:
            base.weight, base.bias = cast(nn.Parameter, weight), cast(nn.Parameter, bias)
        place = holder = nn.Module()
        *parents, leaf = self.path.split(".")
        for name in parents:
            place.add_module(name, place := nn.Module())
        place.add_module(leaf, base)
        states = [(parameter, parameter.requires_grad) for parameter in (weight, bias) if parameter is not None]
        peft = _peft()
        fields = {**copy.deepcopy(dict(self.config)), "target_modules": re.escape(self.path)}
        peft.inject_adapter_in_model(peft.get_peft_config(fields), holder, _ADAPTER)
        for parameter, trains in states:
            parameter.requires_grad_(trains)
        tuner = holder.get_submodule(self.path)
        # The base stays out of the unit's tensors: it is frozen, and in the model already.
        del tuner._modules["base_layer"]
        tuner.__dict__["base_layer"] = _Given(weight, bias)
        for module in list(tuner.modules()):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not parameter.requires_grad:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach())
        return tuner

    def reset(self, generator: Generator) -> None:
        """Copy the start values of a layer that peft makes anew, from a seed of the generator."""
        seed, base = int(torch.randint(0, 2**31 - 1, (), generator=generator)), self.tuner.__dict__["base_layer"]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            fresh = self._make(base.weight, base.bias)
        self.tuner.load_state_dict(fresh.state_dict())

    def follow(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute (..., out) by peft's own code."""
        base = self.tuner.__dict__["base_layer"]
        base.pair = (x, y)
        try:
            return self.tuner(x)
        finally:
            base.pair = None

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Read the weight off what peft's layer makes of the unit vectors."""
        rows = self._with(weight, None, torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))
        return rows.T.to(weight.dtype)

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Read the bias off what peft's layer makes of zeros."""
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
    """A tuner of Hugging Face peft at linear layers, attached, saved, merged and verified like every method.

    Layers are chosen by the configuration's ``target_modules`` (a regular expression or endings of paths, as in peft)
    or, without it, by roles. The classifier is the adapter's own in any case.
    """

    config: Any = field(default_factory=lambda: {"peft_type": "LORA", "r": 8, "lora_alpha": 8})
    """A configuration of peft, such as ``peft.LoHaConfig(r=4)``, or its fields with ``peft_type``."""

    name: ClassVar[str] = "peft"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB, FGVC)
    default_roles: ClassVar[tuple[str, ...]] = _ROLES

    def __post_init__(self) -> None:
        """Check the fields, and bring the configuration into plain values."""
        super().__post_init__()
        peft = _peft()
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
        if fields.get("modules_to_save"):
            raise ConfigError(
                f"PeftMethod: modules_to_save={fields['modules_to_save']} was given; the classifier belongs to the "
                "adapter here and trains as it is. Leave it out."
            )
        if fields.get("bias", "none") != "none":
            raise ConfigError(f"PeftMethod: bias={fields['bias']!r} trains the base in place. Leave it at 'none'.")
        if _changes_weight(fields):
            raise ConfigError(
                f"PeftMethod: init_lora_weights={fields['init_lora_weights']!r} changes the frozen weight, so that the "
                "adapter would fit no other copy of the model. vispeft.LoRA(start='pissa') does not."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one layer of peft behind each chosen layer."""
        for site in self.sites(view):
            layer = cast(nn.Linear, model.get_submodule(site.path))
            yield PlanItem(site, "peft", partial(PeftUnit, self.config, site.path, layer))

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
        config = _peft().get_peft_config(copy.deepcopy(self.config))
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
        """Count what peft makes for layers of these shapes; its tuners have formulas of their own."""
        count = 0
        for site in self.sites(view):
            with torch.device("meta"):
                layer = nn.Linear(site.in_features, site.out_features, bias="bias" in view.tensors.get(site.path, {}))
                unit = PeftUnit(self.config, site.path, layer)
            count += sum(prod(tensor.shape) for tensor in unit.parameters())
        return count


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into what it does."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", None) or str(value)


def _changes_weight(fields: Mapping[str, Any]) -> bool:
    start = fields.get("init_lora_weights")
    return isinstance(start, str) and start.startswith(_WEIGHT_CHANGING)


# --------------------------------------------------------------------------------------------- LoRA, both directions


def from_peft(model: nn.Module, path: str | Path) -> AdapterBank:
    """Attach a LoRA adapter that peft saved for a timm model.

    Layers may have ranks and multipliers of their own: smaller ones are filled up with zeros, and multipliers are
    written into the second factor, so that outputs stay equal.

    Args:
        model: The timm model.
        path: Directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The model's bank; the adapter is one of `LoRA`, and a saved classifier is its head.

    Raises:
        FileError: If a file is missing or does not fit; the model is unchanged then.
        ConfigError: If it is no LoRA that a plain timm model can have.
    """
    fields, tensors = _read(Path(path))
    view = describe(model)
    _check_plain_lora(fields)
    head = {n: t for n, t in tensors.items() if view.head_path and n.startswith(f"{view.head_path}.")}
    layers = _layers({name: tensor for name, tensor in tensors.items() if name not in head})
    sites = {site.path: site for site in view.sites if site.kind == "linear" and site.rows is None}
    strange = [name for name in layers if name not in sites or sites[name].role == "head"]
    if strange or not layers:
        raise FileError(
            f"The adapter has LoRA at {', '.join(strange[:3]) or 'no layer'}, which is no linear layer of this "
            f"{view.family} model; those are called like {', '.join(list(sites)[:3])}."
        )
    roles = tuple(dict.fromkeys(sites[name].role for name in layers))
    blocks = {sites[name].block for name in layers}
    inside = None if None in blocks or len(blocks) == view.depth else tuple(sorted(cast("set[int]", blocks)))
    rank = max(entry["lora_A"].shape[0] for entry in layers.values())
    dora = bool(fields.get("use_dora"))
    method = LoRA(
        rank=rank, alpha=rank, dropout=0.0 if dora else fields["lora_dropout"], dora=dora, roles=roles, blocks=inside
    )
    planned = {site.path for site in method.sites(view)}
    if planned != set(layers):
        raise ConfigError(
            f"The adapter has LoRA at {len(layers)} layers, and the roles {', '.join(roles)} in these blocks are at "
            f"{len(planned)}, for example {min(planned ^ set(layers))}. Adapters with another choice in each block "
            "cannot be converted; train them by PeftMethod."
        )
    own: dict[str, Tensor] = {}
    for name, entry in layers.items():
        a, b = entry["lora_A"], entry["lora_B"] * _scale(fields, name, entry["lora_A"].shape[0])
        own[f"{name}/lora.A"] = nn.functional.pad(a, (0, 0, 0, rank - len(a)))
        own[f"{name}/lora.B"] = nn.functional.pad(b, (0, rank - len(a)))
        if dora:
            own[f"{name}/lora.magnitude"] = entry["lora_magnitude_vector"]
    own |= {f"head/{name.removeprefix(f'{view.head_path}.')}": tensor for name, tensor in head.items()}
    bank = attach(model, method, name=_free(model), verify=False)
    label = bank.active[-1]
    try:
        bank.load_state_dict(own, label)
    except VispeftError:
        bank.detach(label)
        raise
    return bank


def to_peft(bank: AdapterBank, path: str | Path, name: str | None = None) -> None:
    """Write a LoRA adapter as peft does, for ``PeftModel.from_pretrained`` on the same timm model.

    Terms at slices of a fused layer become one term of the whole layer, of the sum of their ranks.

    Args:
        bank: The bank.
        path: The directory; it must not exist or be empty.
        name: The adapter; may be left out where there is only one active.

    Raises:
        ConfigError: If the adapter is none that peft's LoRA can hold, or the directory is not empty.
    """
    plan, place = bank.plan(name), Path(path)
    method = plan.method
    if not isinstance(method, LoRA) or method.bits < 32 or method.head_bits < 32:
        raise ConfigError(f"to_peft writes LoRA adapters of full precision; this one is {method}.")
    if place.exists() and any(place.iterdir()):
        raise ConfigError(f"{place} is not empty, and nothing is overwritten. Choose another directory.")
    if method.dora and any(item.site.rows is not None for item in plan):
        raise ConfigError("peft's DoRA changes all rows of a layer, and this adapter has slices of a fused layer.")
    written, ranks = _terms(plan, bank.stored_tensors(name))
    head = {key.removeprefix("head/"): t for key, t in bank.state_dict(name).items() if key.startswith("head/")}
    place_of_head = bank.view.head_path
    written |= {f"{_PREFIX}{place_of_head}.{key}": tensor for key, tensor in head.items()}
    scale = method.scale
    config = _peft().LoraConfig(
        r=max(ranks.values()),
        lora_alpha=scale * max(ranks.values()),
        lora_dropout=method.dropout if method.dropout_place == "input" else 0.0,
        use_dora=method.dora,
        target_modules="|".join(re.escape(layer) for layer in ranks),
        rank_pattern={re.escape(layer): rank for layer, rank in ranks.items()},
        alpha_pattern={re.escape(layer): scale * rank for layer, rank in ranks.items()},
        modules_to_save=[place_of_head] if head else None,
        inference_mode=True,
    )
    place.mkdir(parents=True, exist_ok=True)
    save_file({key: t.detach().cpu().contiguous().clone() for key, t in written.items()}, place / _TENSORS)
    config.save_pretrained(place)


def _terms(plan: Plan, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Put the terms of each layer side by side, under peft's names; gives them and their ranks."""
    written: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole = {site.path: site.out_features for item in plan for site in [item.site] if site.rows is None}
    for item in plan:
        site = item.site
        a, b = tensors[f"{item.key}.A"], tensors[f"{item.key}.B"]
        if site.rows is not None:
            rows = whole.setdefault(site.path, 3 * site.out_features)
            b = nn.functional.pad(b, (0, 0, site.rows.start, rows - site.rows.stop))
        base = f"{_PREFIX}{site.path}"
        for key, tensor, axis in ((f"{base}.lora_A.weight", a, 0), (f"{base}.lora_B.weight", b, 1)):
            written[key] = torch.cat([written[key], tensor], axis) if key in written else tensor
        ranks[site.path] = ranks.get(site.path, 0) + len(a)
        if f"{item.key}.magnitude" in tensors:
            written[f"{base}.lora_magnitude_vector"] = tensors[f"{item.key}.magnitude"]
    return written, ranks


def _read(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a directory of peft: the configuration, and tensors by the names of the plain model."""
    for name in (_CONFIG, _TENSORS):
        if not (place / name).is_file():
            raise FileError(f"{place} holds no {name}; peft's save_pretrained writes {_CONFIG} and {_TENSORS}.")
    try:
        fields = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(place / _TENSORS)
    except Exception as error:
        raise FileError(f"{place} cannot be read as an adapter of peft ({error}).") from error
    return fields, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _check_plain_lora(fields: Mapping[str, Any]) -> None:
    """Refuse what is no LoRA beside an unchanged weight."""
    if fields.get("peft_type") != "LORA":
        raise ConfigError(f"from_peft reads LoRA; this adapter is {fields.get('peft_type')}. Train it by PeftMethod.")
    if _changes_weight(fields):
        raise ConfigError(
            f"init_lora_weights={fields['init_lora_weights']!r} changed the frozen weight, so the file alone does not "
            "say what was trained. Save it in peft with path_initial_model_for_weight_conversion, which makes it plain."
        )
    for name, plain in (("bias", "none"), ("fan_in_fan_out", False), ("lora_bias", False), ("use_qalora", False)):
        if fields.get(name, plain) != plain:
            raise ConfigError(f"from_peft reads plain LoRA; this adapter has {name}={fields[name]!r}.")


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort peft's tensors by layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name)
        if found is None or (tensor.ndim > 2):
            raise FileError(f"{name} ({tuple(tensor.shape)}) is no part of a LoRA at a linear layer.")
        layers.setdefault(found[1], {})[found[2]] = tensor
    for name, entry in layers.items():
        if not {"lora_A", "lora_B"} <= set(entry):
            raise FileError(f"{name} has {', '.join(entry)} alone; lora_A and lora_B are needed.")
    return layers


def _scale(fields: Mapping[str, Any], path: str, rank: int) -> float:
    """Compute the multiplier of a layer as peft does."""
    patterns = fields.get("alpha_pattern") or {}
    own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), None)
    alpha = fields["lora_alpha"] if own is None else own
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def _free(model: nn.Module) -> str:
    bank = AdapterBank.of(unwrap(model))
    taken = [] if bank is None else bank.names
    return next(name for name in ("default", *(f"peft{i}" for i in range(len(taken) + 1))) if name not in taken)
