"""The small backbones that ship with the project, for ``create_model("zoo:NAME")``.

Each is a folder of ``model_zoo/backbones`` with ``model.safetensors`` and ``config.json``, which names the timm
architecture, its constructor arguments, the preprocessing and the digest of the weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vispeft.errors import ConfigError, FileError, UnknownNameError
from vispeft.zoo.adapters import backbone_names, list_zoo_adapters
from vispeft.zoo.folder import ZOO_VARIABLE, zoo_folder

__all__ = ["ZooBackbone", "list_zoo_backbones", "read_zoo_backbone"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ZooBackbone:
    """A shipped backbone, as described by its config.json."""

    name: str
    """Its name, without ``zoo:``."""
    architecture: str
    """The timm architecture."""
    args: dict[str, Any]
    """Constructor arguments with which the architecture fits the weights."""
    overlay: dict[str, Any]
    """Entries that override timm's pretrained configuration: preprocessing, number of classes, no hub."""
    weights: Path
    """The weight file."""
    sha256: str
    """Digest of the weight file."""

    def verify(self) -> None:
        """Check the weight file against its digest.

        Raises:
            FileError: If the file is missing or has changed.
        """
        if not self.weights.is_file():
            raise FileError(f"zoo:{self.name} was asked for, but its {self.weights.name} is missing. Restore the file.")
        found = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        if found != self.sha256:
            raise FileError(
                f"zoo:{self.name} was asked for, but its {self.weights.name} is not the one its config.json describes: "
                f"sha256 {found[:12]}..., expected {self.sha256[:12]}.... The file was truncated or altered; restore "
                "it. (A clone without large files has a small text file in its place.)"
            )


def list_zoo_backbones() -> list[str]:
    """List the backbones that ship with the project.

    Returns:
        Their names, for ``create_model("zoo:NAME")``.
    """
    return backbone_names()


def read_zoo_backbone(name: str) -> ZooBackbone:
    """Read the description of a shipped backbone.

    Args:
        name: Its name, without ``zoo:``.

    Returns:
        The description.

    Raises:
        FileError: If there are no shipped backbones, or the description is damaged.
        UnknownNameError: If the zoo has no such backbone.
        ConfigError: If it is the name of an adapter.
    """
    known = list_zoo_backbones()
    place = zoo_folder() / "backbones"
    if not known:
        raise FileError(
            f"zoo:{name} was asked for, but there are no backbones in {place}. Unset the environment variable "
            f"{ZOO_VARIABLE} to use the packaged ones, or point it to a model_zoo folder."
        )
    if name not in known:
        _refuse_adapter(name)
        raise UnknownNameError("backbone of the zoo", name, known, f"They are in {place}.")
    folder = place / name
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return ZooBackbone(
            name=name,
            architecture=config["architecture"],
            args=dict(config["args"]),
            overlay=_overlay(name, config),
            weights=folder / WEIGHTS,
            sha256=config["sha256"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"The config.json of zoo:{name} cannot be used ({error!r}). Restore the file.") from error


def _refuse_adapter(name: str) -> None:
    """Say how an adapter of the zoo is used, where a backbone was asked for.

    Args:
        name: The name that was asked for.

    Raises:
        ConfigError: If it is the name of an adapter.
    """
    adapter = list_zoo_adapters().get(name)
    if adapter is not None:
        base = adapter.entry.backbone
        raise ConfigError(
            f"zoo:{name} is an adapter, and a backbone was asked for. Load it on its backbone: "
            f"vispeft.load(vispeft.create_model({base!r}), 'zoo:{name}'); or vispeft.zoo.create({name!r}) makes both, "
            "with the head and the preprocessing."
        )


def _overlay(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Convert a config.json to entries of timm's pretrained configuration."""
    seen = config["preprocessing"]
    return {
        "url": "",
        "hf_hub_id": None,
        "source": None,
        "tag": name,
        "input_size": tuple(seen["input_size"]),
        "test_input_size": None,
        "interpolation": seen["interpolation"],
        "crop_pct": seen["crop_pct"],
        "test_crop_pct": None,
        "mean": tuple(seen["mean"]),
        "std": tuple(seen["std"]),
        "num_classes": config["num_classes"],
        "license": config["license"],
    }
