"""Adapters of segmentors as files: the adapter, the map reader and the decoder, nothing of the backbone.

The tensors have the names a Lightning `Segmentation` task gives them, and its FCN, SegFormer and UPer decoders have
those of mmsegmentation's heads, so a directory can be used by both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError, FileError
from vispeft.mmseg.backbone import VispeftBackbone
from vispeft.storage.files import check_tensors, read_decoder, read_encoded
from vispeft.zoo.adapters import find_adapter

__all__ = ["adapted_backbone", "backbones", "load_decoder", "save_adapter"]

_DECODERS = {"FCNHead": "fcn", "SegformerHead": "segformer", "UPerHead": "uper"}
"""Heads of mmsegmentation that exist as decoders of this project too."""


def backbones(model: nn.Module) -> dict[str, VispeftBackbone]:
    """Find the backbones of this plug-in in a model.

    Args:
        model: A segmentor, or a wrapper around one.

    Returns:
        Backbones by their names in the model.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, VispeftBackbone)}


def adapted_backbone(model: nn.Module) -> VispeftBackbone:
    """Find the one backbone of a segmentor that has an adapter.

    Args:
        model: The segmentor.

    Raises:
        ConfigError: If there is none, or several.
    """
    found = [backbone for backbone in backbones(model).values() if backbone.bank is not None]
    if len(found) != 1:
        raise ConfigError(f"One VispeftBackbone with an adapter is needed; this model has {len(found)}.")
    return found[0]


def save_adapter(model: nn.Module, path: str | Path, *, metrics: Mapping[str, Any] | None = None) -> None:
    """Write a segmentor's adapter with its map reader and decoder.

    Args:
        model: The segmentor; of its heads only ``decode_head`` is written, since the others only help training.
        path: The directory, created if missing.
        metrics: Its metrics, for ``adapter.json``; None if it was not measured.

    Raises:
        ConfigError: If it has no adapter.
        FileError: If the directory cannot be written.
    """
    backbone = adapted_backbone(model)
    bank: Any = backbone.bank
    known = getattr(model, "dataset_meta", None) or {}
    bank.annotate(
        class_names=known.get("classes"),
        preprocessing=_preprocessing(model, backbone),
        metrics={name: float(value) for name, value in (metrics or {}).items()},
        output=_output(model, backbone),
    )
    bank.save(path, decoder=_decoder_state(model))


def load_decoder(model: nn.Module, path: str | Path, classes: Sequence[str] | None = None) -> None:
    """Load the map reader and the decoder stored with an adapter into a segmentor.

    Args:
        model: The segmentor.
        path: The directory of the adapter, or of a run.
        classes: Names of the segmentor's classes, which have to be those of the decoder in their order; None takes them
            from its ``dataset_meta``, where they are known.

    Raises:
        ConfigError: If the decoder has other classes, or the same in another order.
        FileError: If there is none, or a tensor is missing, unknown, of another shape, or not finite.
    """
    folder = find_adapter(str(path))
    own = list(classes or (getattr(model, "dataset_meta", None) or {}).get("classes") or ())
    saved = list(read_encoded(folder)[0].get("class_names") or ())
    if own and saved and own != saved:
        other = "the same classes in another order" if sorted(own) == sorted(saved) else "other classes"
        raise ConfigError(
            f"The decoder in {path} has {other}: {', '.join(saved[:6])} there, {', '.join(own[:6])} here. Give the "
            "data its classes in its order, or train the decoder anew."
        )
    tensors = read_decoder(folder)
    if not tensors:
        raise FileError(f"{path} holds an adapter without a decoder. Train the decoder anew, or name another one.")
    parts = _decoder_state(model)
    try:
        check_tensors(parts, tensors)
    except FileError as error:
        made = (read_encoded(folder)[0].get("output") or {}).get("decoder")
        raise FileError(
            f"The decoder in {path} does not fit the segmentor: {error} It was made as {made}; give the decode_head "
            "the same channels, maps and classes."
        ) from error
    with torch.no_grad():
        for key, tensor in tensors.items():
            parts[key].copy_(tensor)


def _decoder_state(model: Any) -> dict[str, Tensor]:
    """Return the tensors outside the adapter that inference needs, under their names in files."""
    parts = {"reader": adapted_backbone(model).reader, "decoder": model.decode_head}
    if model.with_neck:
        parts["neck"] = model.neck
    return {f"{part}.{key}": tensor for part, module in parts.items() for key, tensor in module.state_dict().items()}


def _preprocessing(model: Any, backbone: VispeftBackbone) -> dict[str, Any] | None:
    """Return the normalisation of images; None if they were not RGB, which no other part of this project supports."""
    found = model.data_preprocessor
    if not getattr(found, "channel_conversion", False) or not getattr(found, "_enable_normalize", False):
        return None
    mean, std = (tuple(round(float(v) / 255, 6) for v in values.flatten()) for values in (found.mean, found.std))
    return replace(Preprocessing.of(backbone.model), mean=mean, std=std).to_dict()


def _output(model: Any, backbone: VispeftBackbone) -> dict[str, Any]:
    """Describe how outputs are read, as a Lightning task does."""
    cascade = isinstance(model.decode_head, nn.ModuleList)
    head, reader = model.decode_head[-1] if cascade else model.decode_head, backbone.reader
    name = type(head).__name__ if cascade else _DECODERS.get(type(head).__name__, type(head).__name__)
    levels = "taps" if reader.levels is None else "vitdet"
    args = {"channels": head.channels} if hasattr(head, "channels") else {}  # heads of mmdetection have none
    decoder = {"name": name, "args": args, "taps": list(reader.taps), "levels": levels}
    return {"target": "mask", "decoder": decoder, "ignore": head.ignore_index}
