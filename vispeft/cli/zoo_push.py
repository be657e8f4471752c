"""Sending an adapter to the Hugging Face Hub, with a model card, or to a zoo in a folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from timm.models import get_pretrained_cfg

from vispeft.building.config_files import read_config
from vispeft.errors import ConfigError
from vispeft.zoo.adapters import PREFIX, ZooAdapter
from vispeft.zoo.index import CARD, CONFIG, INDEX, LARGEST_INDEX, ZooEntry, read_index, write_index
from vispeft.zoo.install import held_zoo, put_in_place, staged

__all__ = ["model_card", "push_adapter"]

_TASKS = {
    "classification": "image-classification",
    "several labels": "image-classification",
    "segmentation": "image-segmentation",
    "retrieval": "image-feature-extraction",
}
"""The hub's words for tasks."""
_LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "unlicense", "isc"),
)
"""Licences by the hub's names (huggingface.co/docs/hub/repositories-licenses); it refuses a card with other ones."""


def push_adapter(adapter: ZooAdapter, target: str, *, private: bool = False) -> str:
    """Send an adapter, whose files are compared with their digests before.

    Args:
        adapter: The adapter.
        target: OWNER/NAME of a repository of the hub, or a folder (with a slash at its begin or end, or one that
            exists), which becomes a zoo if it is none.
        private: Whether a new repository is private.

    Returns:
        What others give `vispeft zoo pull`.

    Raises:
        FileError: If a file was changed, or the target cannot be written.
        ConfigError: If the target has another adapter of this name, or is neither.
    """
    adapter.verify()
    if os.path.isdir(target) or target.startswith(("/", ".")) or target.endswith("/"):
        _push_to_folder(adapter, Path(target))
        return f"{target} --adapter {adapter.entry.name}"
    if target.count("/") != 1:
        raise ConfigError(f"{target!r} is neither OWNER/NAME of a repository nor a folder, such as ./my_zoo.")
    return f"{target}@{_push_to_hub(adapter, target, private)}"


def _push_to_hub(adapter: ZooAdapter, repository: str, private: bool) -> str:
    """Add an adapter to those that a repository has, and return the commit."""
    from vispeft.zoo.hub import upload  # the hub's client takes a while to import

    entry = replace(adapter.entry, source=None, named_there=None)
    with tempfile.TemporaryDirectory() as made:
        parent, listed = _listed_there(repository, Path(made) / "cache")
        _check_other(repository, entry, listed)
        folder = Path(made) / "zoo"
        (folder / entry.name).mkdir(parents=True)
        _copy(adapter, folder / entry.name)
        write_index(folder, {**listed, entry.name: entry})
        text = (adapter.folder / CARD).read_text(encoding="utf-8")
        own = _has_own_weights(adapter.folder / CONFIG)
        page = model_card(entry, text, own_weights=own) + _others(repository, listed.keys() - {entry.name})
        (folder / "README.md").write_text(page, encoding="utf-8")
        return upload(folder, repository, f"Add the adapter {entry.name}", private, parent)


def _listed_there(repository: str, cache: Path) -> tuple[str | None, dict[str, ZooEntry]]:
    """Return the newest commit of a repository, and the adapters that its index lists."""
    from vispeft.zoo.hub import fetch_files, files_of

    found = files_of(repository)
    if found is None or INDEX not in found[1]:
        return (None if found is None else found[0]), {}
    return found[0], read_index(fetch_files(repository, found[0], {INDEX: LARGEST_INDEX}, cache, False))


def _others(repository: str, names: AbstractSet[str]) -> str:
    """List the other adapters of a repository."""
    lines = [f"* `vispeft zoo pull {repository} --adapter {name}`" for name in sorted(names)]
    return "\n".join(["", "Other adapters of this repository:", "", *lines, ""]) if lines else ""


def _check_other(zoo: Path | str, entry: ZooEntry, listed: Mapping[str, ZooEntry]) -> None:
    """Refuse to replace other content of the same name."""
    if entry.name in listed and not listed[entry.name].same_content(entry):
        raise ConfigError(f"{zoo} has an adapter {entry.name} already, with other content. Choose another place.")


def _push_to_folder(adapter: ZooAdapter, zoo: Path) -> None:
    """Copy an adapter into another zoo."""
    entry = replace(adapter.entry, source=None, named_there=None)
    with held_zoo(zoo), staged(zoo, entry.name) as folder:
        _check_other(zoo, entry, read_index(zoo))
        _copy(adapter, folder)
        put_in_place(zoo, folder, entry)


def _copy(adapter: ZooAdapter, folder: Path) -> None:
    """Copy the files of an adapter that its index lists, and nothing else that lies beside them."""
    for name in adapter.entry.files:
        shutil.copyfile(adapter.folder / name, folder / name)


def _has_own_weights(config: Path) -> bool:
    """Return whether the backbone of a config has other weights than those that timm fetches for its name."""
    model = read_config(config).get("model")
    settings = model.get("init_args") if isinstance(model, dict) else None
    if not isinstance(settings, dict):
        return False
    args = settings.get("backbone_args")
    return settings.get("weights") is not None or (isinstance(args, dict) and args.get("pretrained") is False)


def model_card(entry: ZooEntry, card: str, *, own_weights: bool = False) -> str:
    """Write the page of a repository of the hub: facts for machines, then the card.

    Args:
        entry: The adapter.
        card: Its card.
        own_weights: Whether the backbone has other weights than those that timm fetches for its name.

    Returns:
        Markdown that begins with YAML.
    """
    base = None if own_weights else _base_model(entry.backbone)
    known: dict[str, Any] = {
        "library_name": "vispeft",
        **_license(entry.license),
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "tags": ["vispeft", "timm", "adapter", entry.method],
        **_pipeline(entry),
    }
    how = f"Get it by `vispeft zoo pull` with the name of this repository, then `vispeft.zoo.create({entry.name!r})`."
    where = _found_at(entry.backbone, base, own_weights)
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n\n{card}\n{where}\n\n{how}\n"


def _license(stated: str) -> Mapping[str, str]:
    """Return a licence in the hub's words, or its name where the hub has none for it."""
    if stated == "not stated":
        return {"license": "unknown"}
    known = stated.lower().replace(" ", "-")
    return {"license": known} if known in _LICENSES else {"license": "other", "license_name": stated}


def _pipeline(entry: ZooEntry) -> Mapping[str, str]:
    return {"pipeline_tag": _TASKS[entry.task]} if entry.task in _TASKS else {}


def _base_model(backbone: str) -> str | None:
    """Return the repository of the hub from which timm fetches a backbone by default; None where there is none."""
    if backbone.startswith(PREFIX):
        return None
    try:
        known = get_pretrained_cfg(backbone)
    except (RuntimeError, ValueError):  # of a tag that this version of timm does not know
        return None
    return None if known is None or not known.hf_hub_id else str(known.hf_hub_id)


def _found_at(backbone: str, base: str | None, own_weights: bool) -> str:
    """Say where the base is found."""
    if backbone.startswith(PREFIX):
        place = f"model_zoo/backbones/{backbone.removeprefix(PREFIX)}"
        return f"The base, `{backbone}`, has no repository of its own: it comes with vispeft ({place})."
    unknown = "its weights are of a file or were drawn" if own_weights else "no repository has weights for it"
    where = f"{base} has weights for it" if base else unknown
    return f"The base is timm's `{backbone}` ({where}); the fingerprint above tells which weights it has to have."
