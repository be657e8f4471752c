"""Reading and writing of LoRA adapters in Hugging Face peft's file format.

peft saves a configuration, and tensors under the names of its wrapped model. Reading does not need peft.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vispeft.adapters.attach import attach
from vispeft.adapters.bank import AdapterBank
from vispeft.core.families import describe, unwrap
from vispeft.core.plan import Plan
from vispeft.core.sites import Site, View
from vispeft.errors import ConfigError, FileError, VispeftError, counted
from vispeft.interop.peft.tuners import changes_weight, import_peft
from vispeft.methods.lora import LoRA
from vispeft.storage.form import shown

__all__ = ["from_peft", "to_peft"]

_PREFIX = "base_model.model."
"""Prefix of tensor names in peft's files."""
_CONFIG, _TENSORS, _OLD_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
"""Name of a tensor of a LoRA: the layer's path, and the tensor."""
_DEFAULTS: dict[str, Any] = {"lora_alpha": 8, "lora_dropout": 0.0, "alpha_pattern": None}
"""Values of peft for fields that a file lacks."""

logger = logging.getLogger(__name__)


def from_peft(model: nn.Module, path: str | Path) -> AdapterBank:
    """Attach a LoRA adapter that peft saved for a timm model.

    Ranks and multipliers may differ between layers: smaller ranks are padded with zeros, and multipliers are folded
    into the second factor, so that the outputs are equal.

    Args:
        model: The timm model.
        path: Directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The model's bank; the adapter's method is `LoRA`, and a saved classifier becomes its classifier.

    Raises:
        FileError: If a file is missing or does not fit; then the model is unchanged.
        ConfigError: If it is not a plain LoRA on an unchanged base.
    """
    fields, tensors = _read(Path(path))
    view = describe(model)
    _check_plain_lora(fields)
    head = {n: t for n, t in tensors.items() if view.head_path and n.startswith(f"{view.head_path}.")}
    if any(_PART.fullmatch(name) for name in head):
        raise ConfigError(
            f"The adapter has LoRA at the classifier {view.head_path!r}, which belongs to the adapter here and trains "
            f"as a whole. Train it in peft with exclude_modules=[{view.head_path!r}], and modules_to_save="
            f"[{view.head_path!r}] if the classifier is to be trained."
        )
    layers = _layers({name: tensor for name, tensor in tensors.items() if name not in head})
    sites = {site.path: site for site in view.sites if site.kind == "linear" and site.rows is None}
    strange = [name for name in layers if name not in sites or sites[name].role == "head"]
    if strange or not layers:
        raise FileError(
            f"The adapter has LoRA at {', '.join(strange[:3]) or 'no layer'}, which is no linear layer of this "
            f"{view.family} model; those are called like {', '.join(list(sites)[:3])}."
        )
    method = _lora(fields, layers, view, sites)
    own = _own_tensors(fields, layers, method)
    own |= {f"head/{name.removeprefix(f'{view.head_path}.')}": tensor for name, tensor in head.items()}
    bank = attach(model, method, name=_free(model), verify=False)
    label = bank.active[-1]
    try:
        bank.load_state_dict(own, label)
    except VispeftError:
        bank.detach(label)
        raise
    return bank


def _lora(
    fields: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]], view: View, sites: Mapping[str, Site]
) -> LoRA:
    """Find the `LoRA` configuration with terms at exactly these layers.

    Args:
        fields: Fields of peft's configuration.
        layers: Tensors by layer.
        view: The model's description.
        sites: Its linear layers, by path.

    Returns:
        The method, with the largest of the layers' ranks.

    Raises:
        ConfigError: If the adapted layers differ between blocks.
    """
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
        many = counted(len(layers), "layer")
        raise ConfigError(
            f"The adapter has LoRA at {many}, and the roles {', '.join(roles)} in these blocks are at "
            f"{len(planned)}, for example {min(planned ^ set(layers))}. Adapters with another choice in each block "
            "cannot be converted; train them by PeftMethod."
        )
    return method


def _own_tensors(
    fields: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]], method: LoRA
) -> dict[str, Tensor]:
    """Convert peft's tensors to this project's: pad ranks with zeros, fold multipliers into the second factor."""
    own: dict[str, Tensor] = {}
    for name, entry in layers.items():
        a, b = entry["lora_A"], entry["lora_B"] * _scale(fields, name, entry["lora_A"].shape[0])
        own[f"{name}/lora.A"] = nn.functional.pad(a, (0, 0, 0, method.rank - len(a)))
        own[f"{name}/lora.B"] = nn.functional.pad(b, (0, method.rank - len(a)))
        if method.dora:
            own[f"{name}/lora.magnitude"] = entry["lora_magnitude_vector"]
    return own


def to_peft(bank: AdapterBank, path: str | Path, name: str | None = None) -> None:
    """Save a LoRA adapter in peft's format, for ``PeftModel.from_pretrained`` on the same timm model.

    Terms at slices of a fused layer become one term of the whole layer, whose rank is the sum of theirs.

    Args:
        bank: The bank.
        path: The directory; it must be empty or not exist.
        name: The adapter; may be left out if only one acts.

    Raises:
        ConfigError: If peft's LoRA cannot represent the adapter, or the directory is not empty.
    """
    plan, place = bank.plan(name), Path(path)
    method = plan.method
    if not isinstance(method, LoRA) or method.bits < 32 or method.head_bits < 32:
        raise ConfigError(f"to_peft writes LoRA adapters of full precision; this one is {method}.")
    if bank.tasks(name):
        raise ConfigError(
            f"The adapter has tasks ({', '.join(bank.tasks(name))}), and peft's format holds one LoRA for each layer. "
            "Attach one adapter for each task."
        )
    if place.exists() and any(place.iterdir()):
        raise ConfigError(f"{place} is not empty, and nothing is overwritten. Choose another directory.")
    if method.dora and any(item.site.rows is not None for item in plan):
        raise ConfigError("peft's DoRA changes all rows of a layer, and this adapter has slices of a fused layer.")
    written, ranks = _terms(plan, bank.stored_tensors(name))
    head = {key.removeprefix("head/"): t for key, t in bank.state_dict(name).items() if key.startswith("head/")}
    place_of_head = bank.view.head_path
    written |= {f"{_PREFIX}{place_of_head}.{key}": tensor for key, tensor in head.items()}
    scale = method.scale
    config = import_peft().LoraConfig(
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
    notes = [key for key, value in bank.notes(name).items() if value is not None]
    if notes:
        logger.warning("peft's format has no place for %s; bank.save writes them.", ", ".join(notes))


def _terms(plan: Plan, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Concatenate the terms of each layer, under peft's names; return them and the ranks by layer."""
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
    """Read a peft directory: the configuration, and tensors by their names in the plain model."""
    if (place / _OLD_TENSORS).is_file() and not (place / _TENSORS).is_file():
        raise FileError(
            f"{place} holds {_OLD_TENSORS}, which older versions of peft wrote and which may run code. Write it anew "
            f"with a present one: PeftModel.from_pretrained(model, ...).save_pretrained(...) gives {_TENSORS}."
        )
    for name in (_CONFIG, _TENSORS):
        if not (place / name).is_file():
            raise FileError(f"{place} holds no {name}; peft's save_pretrained writes {_CONFIG} and {_TENSORS}.")
    try:
        fields = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(place / _TENSORS)
    except Exception as error:
        raise FileError(f"{place} cannot be read as an adapter of peft ({error}).") from error
    wanted = {"lora_alpha": (int, float), "lora_dropout": (int, float), "alpha_pattern": (dict, type(None))}
    if not isinstance(fields, dict):
        raise FileError(f"{place / _CONFIG} holds no mapping of fields.")
    for key, kinds in wanted.items():
        if fields.get("peft_type") == "LORA" and not isinstance(fields.setdefault(key, _DEFAULTS[key]), kinds):
            raise FileError(f"{place / _CONFIG}: {key} is {shown(fields[key])}, which peft's LoRA does not have.")
    return fields, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _check_plain_lora(fields: Mapping[str, Any]) -> None:
    """Raise on adapters that are not a plain LoRA with an unchanged frozen weight."""
    if fields.get("peft_type") != "LORA":
        raise ConfigError(f"from_peft reads LoRA; this adapter is {fields.get('peft_type')}. Train it by PeftMethod.")
    if changes_weight(fields):
        raise ConfigError(
            f"init_lora_weights={fields['init_lora_weights']!r} changed the frozen weight, so the file alone is "
            "not the adapter. Save it in peft with path_initial_model_for_weight_conversion, which makes it plain."
        )
    for name, plain in (("bias", "none"), ("fan_in_fan_out", False), ("lora_bias", False), ("use_qalora", False)):
        if fields.get(name, plain) != plain:
            raise ConfigError(f"from_peft reads plain LoRA; this adapter has {name}={fields[name]!r}.")


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group peft's tensors by layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _PART.fullmatch(name)
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
