"""The hook: prints the trainable parts, saves adapter and decoder separately, keeps checkpoints small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import master_only
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmseg.models.decode_heads import UPerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import HOOKS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vispeft.core.modes import evaluating
from vispeft.errors import ConfigError, counted
from vispeft.mmseg.backbone import VispeftBackbone
from vispeft.mmseg.files import backbones, load_decoder, save_adapter
from vispeft.zoo.adapters import ADAPTER

__all__ = ["VispeftHook", "check_batches", "check_segmentor"]


@HOOKS.register_module()
class VispeftHook(Hook):
    """Save adapters from mmengine's Runner and keep its checkpoints small.

    ``<work_dir>/adapter`` always belongs to the newest checkpoint, and ``<work_dir>/adapter_best`` to the one that
    ``CheckpointHook(save_best=...)`` found best; where that chooses by several metrics, to ``adapter_best_<metric>``.
    All hold the decoder too. Where an ``EMAHook`` averages the weights, the average is saved.
    """

    # After EMAHook (50), which swaps averages in and out, and after CheckpointHook (90), which selects the best.
    priority = "LOWEST"

    def __init__(self, slim: bool = True, decoder: str | None = None) -> None:
        """Store the settings.

        Args:
            slim: Leave the frozen tensors out of mmengine's checkpoints. They come back from the config's ``model``
                and ``weights``, and are compared with those of the training when a checkpoint is loaded. Random ones
                (``pretrained=False``) stay.
            decoder: Directory of an adapter whose decoder training starts from.
        """
        self.slim, self.decoder = slim, decoder
        self._best: dict[str, str] = {}

    def before_train(self, runner: Any) -> None:
        """Check backbone, heads and data against each other, print the trainable parts, and load the decoder.

        Raises:
            ConfigError: If there is no backbone of this plug-in, or one of the three does not fit the others.
            FileError: If the decoder is missing or does not fit.
        """
        model = _unwrapped(runner.model)
        found = backbones(model)
        if not found:
            raise ConfigError("VispeftHook is in custom_hooks, and the model has no VispeftBackbone. Drop the hook.")
        classes = runner.train_dataloader.dataset.metainfo.get("classes")
        check_segmentor(model, classes)
        check_batches(model, runner.train_dataloader)
        for name, backbone in found.items():
            report = "no adapter; all of it trains" if backbone.bank is None else f"\n{backbone.bank.report()}"
            runner.logger.info(f"{name}: {report}")
        self._best = _best_checkpoints(runner)
        # mmengine may be told to resume where there is no checkpoint yet.
        if self.decoder is not None and not (runner._resume and runner._has_loaded):
            load_decoder(model, self.decoder, classes)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Save the adapter, and remove the frozen tensors from the checkpoint."""
        _save(runner, ADAPTER)
        if not self.slim:
            return
        for name, backbone in backbones(_unwrapped(runner.model)).items():
            for part, prefix in (("state_dict", f"{name}."), ("ema_state_dict", f"module.{name}.")):
                backbone.slim(checkpoint.get(part, {}), prefix)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Save the adapter again if this validation is the best so far."""
        best = _best_checkpoints(runner)
        for suffix, path in best.items():
            if path != self._best.get(suffix):
                _save(runner, f"{ADAPTER}_best{suffix}", metrics)
        self._best = best

    def after_train(self, runner: Any) -> None:
        """Save the final adapter."""
        _save(runner, ADAPTER)


def _best_checkpoints(runner: Any) -> dict[str, str]:
    """Paths of the best checkpoints, by the suffix `CheckpointHook` adds to ``best_ckpt``: none, or one per metric."""
    info = runner.message_hub.runtime_info
    found = {key.removeprefix("best_ckpt"): path for key, path in info.items() if key.startswith("best_ckpt")}
    return {suffix.replace("/", "_"): path for suffix, path in found.items()}


@master_only
def _save(runner: Any, name: str, metrics: Mapping[str, float] | None = None) -> None:
    """Write the adapter of the trained model, or of its average."""
    averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    model = averages[0] if averages else _unwrapped(runner.model)
    if any(backbone.bank is not None for backbone in backbones(model).values()):
        model.dataset_meta = runner.train_dataloader.dataset.metainfo
        save_adapter(model, Path(runner.work_dir) / name, metrics=metrics)


def _unwrapped(model: Any) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def check_segmentor(model: Any, classes: Sequence[str] | None) -> None:
    """Refuse heads that cannot read the backbone's maps, or whose classes differ from the data's.

    Args:
        model: The segmentor.
        classes: Names of the data's classes; None where they are not known.

    Raises:
        ConfigError: If a head does not fit; the message lists all problems.
    """
    heads = _heads("decode_head", model.decode_head)
    if model.with_auxiliary_head:
        heads |= _heads("auxiliary_head", model.auxiliary_head)
    found = []
    for name, head in heads.items():
        # Heads of mmdetection, such as Mask2Former's, use other attributes for the maps they read.
        if isinstance(model.backbone, VispeftBackbone) and not model.with_neck and isinstance(head, BaseDecodeHead):
            found += _unreadable(name, head, model.backbone)
        if classes is not None and len(classes) != head.num_classes:
            known = counted(len(classes), "class", "classes")
            found.append(f"{name}.num_classes is {head.num_classes}, and the data have {known}")
    if not found and _behind_the_heads(model, list(heads.values())):
        found.append(
            "no head reads the backbone's last map, and units of the adapter behind the other maps cannot train: let "
            "out_indices end with the last map that is read"
        )
    if found:
        raise ConfigError(f"The config does not fit together: {'; '.join(found)}. Correct it there.")


def check_batches(model: Any, loader: Any) -> None:
    """Refuse batches in which a BatchNorm of a head sees one value per channel, which fails in the middle of training.

    Args:
        model: The segmentor.
        loader: The loader of the training data.

    Raises:
        ConfigError: If the smallest batch is too small; the message names the setting.
    """
    fewest = _fewest(loader)
    if fewest > 1 or not isinstance(model.backbone, VispeftBackbone) or model.with_neck:
        return
    size = getattr(model.data_preprocessor, "size", None) or (2 * model.backbone.reader.divisor,) * 2
    heads = _heads("decode_head", model.decode_head)
    if model.with_auxiliary_head:
        heads |= _heads("auxiliary_head", model.auxiliary_head)
    found = [name for name, head in heads.items() if isinstance(head, BaseDecodeHead) and _one_value(model, head, size)]
    if found:
        raise ConfigError(
            f"A training batch of each epoch has {fewest} image, and {', '.join(found)} needs 2 for its BatchNorm, "
            "which would see one value per channel. Set train_dataloader.drop_last, or another "
            "train_dataloader.batch_size."
        )


def _fewest(loader: Any) -> int:
    """Return the number of images in the smallest training batch of one process."""
    size = int(loader.batch_size or 1)
    if isinstance(loader.sampler, InfiniteSampler) or loader.drop_last:
        return size
    return len(loader.sampler) % size or size


def _one_value(model: Any, head: Any, size: Sequence[int]) -> bool:
    """Whether a BatchNorm in a head sees one value per channel for one image of this height and width."""
    seen: list[int] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].numel() // inputs[0].shape[1])

    norms = [module for module in head.modules() if isinstance(module, _BatchNorm)]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    backbone = model.backbone
    maps = [
        next(head.parameters()).new_zeros(1, channels, -(-size[0] // stride), -(-size[1] // stride))
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    try:
        with evaluating(head), torch.no_grad():
            head(maps)  # in evaluation, where one value is no error and no statistics move
    except Exception:  # a head of mmdetection, or of the user's own, with another call: nothing is known about it
        return False
    finally:
        for handle in handles:
            handle.remove()
    return 1 in seen


def _heads(name: str, module: nn.Module) -> dict[str, Any]:
    """List a head, or several in a row (cascades, auxiliary ones), by name."""
    if isinstance(module, nn.ModuleList):
        return {f"{name}[{index}]": head for index, head in enumerate(module)}
    return {name: module}


def _behind_the_heads(model: Any, heads: Sequence[Any]) -> bool:
    """Whether an adapter acts after the last map that is read."""
    backbone = model.backbone
    known = isinstance(backbone, VispeftBackbone) and all(isinstance(head, BaseDecodeHead) for head in heads)
    if not known or model.with_neck or backbone.reader.levels is not None or backbone.bank is None:
        return False
    count = len(backbone.channels)
    trains = any(parameter.requires_grad for parameter in backbone.model.parameters())
    return trains and all(index % count != count - 1 for head in heads for index in _read_by(head))


def _read_by(head: Any) -> list[int]:
    """List the maps a head of mmsegmentation reads."""
    return list(head.in_index) if isinstance(head.in_index, (list, tuple)) else [head.in_index]


def _unreadable(name: str, head: Any, backbone: VispeftBackbone) -> list[str]:
    """Say why a head cannot read a backbone's maps, if so."""
    several = isinstance(head.in_index, (list, tuple))
    chosen = _read_by(head)
    count = len(backbone.channels)
    if any(not -count <= index < count for index in chosen):
        return [f"{name}.in_index is {head.in_index}, and the backbone gives {count} maps"]
    widths: Any = [backbone.channels[index] for index in chosen]
    given = sum(widths) if head.input_transform == "resize_concat" else widths if several else widths[0]
    wanted = list(head.in_channels) if isinstance(head.in_channels, (list, tuple)) else head.in_channels
    if wanted != given:
        return [f"{name}.in_channels is {wanted}, and the backbone's maps have {given}"]
    strides = [backbone.strides[index] for index in chosen]
    if isinstance(head, UPerHead) and any(fine >= coarse for fine, coarse in pairwise(strides)):
        return [
            f"{name} needs a pyramid, and the maps of a plain ViT have one size (strides {strides}): give the "
            "backbone levels='vitdet', or take another head"
        ]
    return []
