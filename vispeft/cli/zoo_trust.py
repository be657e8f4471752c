"""Adapters of others: what is compared before anything is built from their files.

A config decides how large a model is, so a hostile one could ask for any amount of memory. That of a pulled adapter has
to say the same as its ``adapter.json``, may set few arguments of the backbone and no large number, and its units are
compared with those that the method makes on the backbone, by shapes alone, before a task is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vispeft.adapters.attach import load
from vispeft.adapters.fitting import method_of
from vispeft.backbones.create import create_model
from vispeft.building.config_files import Node, read_config
from vispeft.building.methods import build_method, method_node
from vispeft.cli.config_keys import check_tree
from vispeft.cli.zoo_places import check_places
from vispeft.data.images import MAX_PIXELS
from vispeft.errors import ConfigError, FileError, brief, printable
from vispeft.storage.disk import read_regular
from vispeft.storage.files import read_encoded
from vispeft.storage.form import shown
from vispeft.storage.strict_json import parse_json
from vispeft.zoo.index import CONFIG, LARGEST_FILE, METRICS, ZooEntry

__all__ = ["check_foreign", "try_loading"]

LARGEST = 8192
"""Largest number in the settings of a task or its data: the widest decoder of this package has 512 channels."""
_LARGER: Mapping[str, int] = {
    "max_pixels": MAX_PIXELS,
    "value_range": 2**32,
    "ohem_min_kept": 2**32,
    **dict.fromkeys(("split_seed", "scene_seed"), 2**32),
}
"""Settings that may be larger, since nothing is made of their size; no images larger than by default are decoded."""
LONGEST = 1000
"""Longest list or text in the settings of a task or its data."""
_BACKBONE_ARGS: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("flexible_size", "pretrained", "dynamic_img_size", "strict_img_size", "always_partition"), (0, 1)),
    "drop_path_rate": (0, 1),
    "num_classes": (0, 100_000),
    "img_size": (1, 1024),
    "patch_size": (4, 64),
    "window_size": (1, 32),
    "embed_dim": (1, 384),
    "depth": (1, 16),
    "depths": (1, 16),
    "num_heads": (1, 32),
}
"""Arguments of a backbone that a pulled adapter may set, and their ranges: none makes a timm model much larger."""


def check_foreign(folder: Path, entry: ZooEntry) -> None:
    """Check the files of an adapter that was fetched; nothing is built from them.

    Args:
        folder: The adapter's folder.
        entry: Its entry in the index.

    Raises:
        FileError: If a file cannot be read, or they say different things.
        ConfigError: If its config has unknown keys or classes, or asks for what no pulled adapter may.
    """
    header, units, head = read_encoded(folder)
    for key, tensor in {**units, **head}.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise FileError(f"{key} of {folder} is not finite.")
    check_config(folder / CONFIG, header)
    metrics = parse_json(folder / METRICS, read_regular(folder / METRICS, LARGEST_FILE[METRICS]))
    if not isinstance(metrics, dict):
        raise FileError(f"{folder / METRICS} is {shown(metrics)}; keys with values are needed.")
    told = {"method": header["method"]["name"], "backbone": header["backbone"]["name"]}
    for key, value in told.items():
        if getattr(entry, key) != value:
            listed = shown(getattr(entry, key))
            raise FileError(f"The index says that {folder.name} has the {key} {listed}, and it has {shown(value)}.")


def check_config(path: Path, header: Mapping[str, Any]) -> Node:
    """Compare the config of a pulled adapter with its description.

    Args:
        path: The config.
        header: Content of its ``adapter.json``.

    Returns:
        The config.

    Raises:
        FileError: If they say different things.
        ConfigError: If it has unknown keys or classes, or asks for what no pulled adapter may.
    """
    tree = read_config(path)
    try:
        return _compared(path, tree, header)
    except ConfigError as error:  # some quote a value of the config on lines of its own
        raise ConfigError(f"The config of the adapter cannot be used: {printable(brief(error))}") from error


def _compared(path: Path, tree: Node, header: Mapping[str, Any]) -> Node:
    """Check keys, sizes, backbone and method of a config."""
    check_places(tree)
    check_tree(tree, str(path))
    if "model" not in tree or "data" not in tree:
        raise FileError(f"{path} has no sections model and data.")
    settings = tree["model"]["init_args"]
    _check_sizes(settings, "model")
    _check_sizes(tree["data"], "data")
    if settings.get("method") is None:
        raise FileError(f"{path} names no method.")
    if settings.get("weights") is not None:
        raise ConfigError(f"{path} names a file of weights, which a pulled adapter may not. Leave weights out.")
    base = header["backbone"]
    for args in (settings.get("backbone_args") or {}, base["args"]):
        if not isinstance(args, Mapping):
            raise FileError(f"{path} has backbone_args {shown(args)}; keys with values are needed.")
        _check_backbone(path, args)
    if settings.get("backbone") != base["name"] or ":" in str(base["name"]).removeprefix("zoo:"):
        raise FileError(
            f"{path} names the backbone {shown(settings.get('backbone'))}, and the adapter {shown(base['name'])}; one "
            "of timm or of the zoo is needed, the same in both."
        )
    method = build_method(method_node(settings["method"]))
    if not method.file_method().is_like(method_of(header)):
        raise FileError(f"{path} names another method than the adapter's {shown(header['method']['name'])}, or fields.")
    return tree


def _check_sizes(value: Any, place: str, largest: int = LARGEST) -> None:
    """Refuse numbers and lists that make a model, or a batch of images, large."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            _check_sizes(inside, f"{place}.{key}", _LARGER.get(key, LARGEST))
    elif isinstance(value, list | str):
        if len(value) > LONGEST:
            raise ConfigError(f"{place} has {len(value):,} parts; at most {LONGEST:,} are taken from a pulled adapter.")
        for inside in value if isinstance(value, list) else ():
            _check_sizes(inside, place, largest)
    elif isinstance(value, int | float) and not abs(value) <= largest:
        raise ConfigError(f"{place} is {shown(value)}; at most {largest:,} is taken from a pulled adapter.")


def _check_backbone(path: Path, args: Mapping[str, Any]) -> None:
    """Refuse arguments that would make a backbone large, or its images huge."""
    for key, value in args.items():
        if key == "global_pool" and value in ("", "avg", "token", "map", "max"):
            continue
        low, high = _BACKBONE_ARGS.get(key, (0, -1))
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int | float) and low <= number <= high for number in values) or len(values) > 8:
            allowed = f"numbers from {low} to {high}" if low <= high else "no value of it"
            raise ConfigError(
                f"{path}: its backbone is made with {shown(key)} {shown(value)}; {allowed} can be taken from a pulled "
                "adapter, since others could make a model of any size."
            )


def try_loading(folder: Path) -> None:
    """Load a pulled adapter on its bare backbone, before its config builds a task.

    Args:
        folder: The adapter's folder.

    Raises:
        VispeftError: If its units are not those of its method on this backbone, or the backbone is another one.
    """
    header, _, _ = read_encoded(folder)
    tree = check_config(folder / CONFIG, header)
    base = header["backbone"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tree.get("seed_everything", 0))  # decides about a backbone that is not pretrained
        load(create_model(base["name"], **base["args"]), folder)
