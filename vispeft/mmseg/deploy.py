"""Deployment: a segmentor whose backbone is a plain timm model again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mmengine.runner import save_checkpoint
from torch import nn

from vispeft.adapters.merge import MergeReport
from vispeft.errors import ConfigError, MergeError
from vispeft.mmseg.files import adapted_backbone

__all__ = ["merge"]

CONFIG, CHECKPOINT = "config.py", "model.pth"


def merge(model: nn.Module, out: str | Path | None = None) -> MergeReport:
    """Merge the adapter of a segmentor into its backbone.

    The outputs stay the same to rounding, and the backbone is a plain timm model, as fast as without an adapter. The
    layers' original tensors are kept outside the model, for ``model.backbone.bank.unmerge()``.

    Args:
        model: A segmentor, such as ``mmseg.apis.init_model`` gives.
        out: Folder for ``config.py`` and ``model.pth``, which ``init_model`` reads without an adapter and without
            pretrained weights. Needs the config that ``init_model`` leaves in the model. None writes nothing.

    Returns:
        Which layers changed, and the measured difference.

    Raises:
        ConfigError: If there is no adapter, no config to write, or one of the files exists.
        MergeError: If a layer has no plain form; nothing is changed then.

    Example:
        >>> model = init_model("runs/earth/1/config.py", "runs/earth/1/iter_4000.pth", device="cpu")
        >>> merge(model, "deployed")
    """
    bank: Any = adapted_backbone(model).bank
    if out is not None and getattr(model, "cfg", None) is None:
        raise ConfigError("merge(out=...) writes the config too, and this model has none. Make it with init_model.")
    taken = [path for name in (CONFIG, CHECKPOINT) if out is not None and (path := Path(out) / name).exists()]
    if taken:
        raise ConfigError(f"{taken[0]} exists already and is not overwritten. Choose another folder.")
    report: MergeReport = bank.merge()
    if out is None:
        return report
    if report.created or report.removed:
        bank.unmerge()
        listing = ", ".join((*report.created, *report.removed)[:3])
        raise MergeError(
            f"The merged backbone has other tensors than timm's model ({listing}), so no config can make it. Merge "
            "without out and keep the model as it is, or deploy the adapter itself."
        )
    _write(model, Path(out))
    return report


def _write(model: Any, folder: Path) -> None:
    """Write checkpoint and config of a merged segmentor."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.cfg)
    config.model.backbone.update(peft=None, pretrained=False, weights=None)
    meta = {"dataset_meta": getattr(model, "dataset_meta", None)}
    save_checkpoint({"state_dict": model.state_dict(), "meta": meta}, str(folder / CHECKPOINT))
    config.dump(str(folder / CONFIG))
