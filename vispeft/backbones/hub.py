"""Weights from a hub: the check that it responds, the client's cache, and the download by timm.

The hub's client retries for most of a minute before it fails, with an error that names neither the model nor a remedy.
So the hub is probed first; if it does not respond, a copy in the client's cache is used.
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import nn

from vispeft.backbones.request import Request
from vispeft.backbones.weights import forget_folder
from vispeft.errors import BackboneError, brief
from vispeft.zoo.backbones import list_zoo_backbones

__all__ = ["build_from_hub"]

ANSWER_SECONDS = 5.0
"""Timeout in seconds after which a hub counts as unreachable."""

# The files timm looks for on a hub, in its order.
_HUB_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def build_from_hub(request: Request) -> nn.Module:
    """Build a model with weights that timm downloads or that are in the cache.

    Args:
        request: The model.

    Returns:
        The model.

    Raises:
        BackboneError: If there are no weights, or they can neither be downloaded nor found in the cache.
    """
    place, _, repository = request.architecture.partition(":")
    elsewhere = "pretrained_cfg" in request.arguments or {"file", "url", "hf_hub_id"} & set(request.overlay)
    if place == "local-dir" or elsewhere:
        return request.build(pretrained=True)
    if repository:
        return _build_from_repository(request, repository)

    described = timm.get_pretrained_cfg(request.architecture)
    if described is None or not described.has_weights:
        tags = timm.list_models(f"{request.architecture}.*", pretrained=True)
        other = f" Pretrained are {', '.join(tags)}." if tags else ""
        raise BackboneError(
            f"{request.architecture} was asked for with pretrained weights, but timm knows of none.{other} Give a "
            "local file with weights=, or pretrained=False for random weights."
        )
    if described.file:
        return request.build(pretrained=True)
    if described.hf_hub_id:
        return _build_from_description(request, str(described.hf_hub_id), described)
    return _build_from_address(request, str(described.url))


def _build_from_repository(request: Request, repository: str) -> nn.Module:
    """Build a model whose architecture is also described on the hub (``hf-hub:OWNER/NAME``)."""
    if _answers(_probe_hub):
        return _fetch(request, repository)
    cached = _cached(request, repository, "config.json")
    if cached is None:
        raise _out_of_reach(request, repository)
    return replace(request, architecture=f"local-dir:{cached.parent}").build(pretrained=True)


def _build_from_description(request: Request, repository: str, described: timm.models.PretrainedCfg) -> nn.Module:
    """Build a timm model whose pretrained configuration locates the weights on the hub."""
    if _answers(_probe_hub):
        return _fetch(request, repository)
    files = (described.hf_hub_filename,) if described.hf_hub_filename else _HUB_FILES
    cached = next((path for file in files if (path := _cached(request, repository, file))), None)
    if cached is None:
        raise _out_of_reach(request, repository)
    found = {"file": str(cached), "custom_load": bool(described.custom_load) and cached.suffix == ".npz"}
    model = replace(request, overlay={**request.overlay, **found}).build(pretrained=True)
    forget_folder(model, cached)
    return model


def _build_from_address(request: Request, url: str) -> nn.Module:
    """Build a timm model whose weights are a file on a web server; torch caches downloaded files."""
    cache_dir = request.arguments.get("cache_dir")
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / url.rsplit("/", 1)[-1]).is_file() and not _answers(lambda: _probe_address(url)):
        raise _out_of_reach(request, url)
    return _fetch(request, url)


def _fetch(request: Request, where: str) -> nn.Module:
    """Download weights by timm from a server that responds.

    Args:
        request: The model.
        where: The repository or address, for the error message.

    Returns:
        The model.

    Raises:
        BackboneError: If the connection or the server failed.
    """
    try:
        return request.build(pretrained=True)
    except OSError as error:  # the base class of all errors of the hub's client and of urllib
        raise _out_of_reach(request, where, brief(error)) from error


def _out_of_reach(request: Request, where: str, reason: str = "") -> BackboneError:
    """Create the error for weights that cannot be obtained.

    Args:
        request: The model.
        where: The repository or address.
        reason: The error of the client.

    Returns:
        The error.
    """
    architecture = request.architecture
    zoo = list_zoo_backbones()
    shipped = f" Without a network there is also {', '.join('zoo:' + name for name in zoo)}." if zoo else ""
    name = architecture.partition(":")[2] or architecture
    # A repository's last part starts with the architecture's name; a dot separates the tag.
    plain = name.rsplit("/", 1)[-1].partition(".")[0]
    return BackboneError(
        f"{architecture} was asked for with pretrained weights; they are at {where}, which cannot be reached, and no "
        f"copy is in the cache.{' The client said: ' + reason if reason else ''} On a machine with a network, fetch "
        f"its model.safetensors (or .pth), bring the file here, and pass it: create_model({plain!r}, "
        f"weights='model.safetensors'). pretrained=False gives random weights.{shipped}"
    )


def _cached(request: Request, repository: str, file: str) -> Path | None:
    """Look for a file in the cache of the hub's client, without a connection.

    Args:
        request: The model; its ``cache_dir`` argument sets another cache directory.
        repository: Owner and name, with ``@revision`` if one is pinned.
        file: Name of the file.

    Returns:
        The file; None if it is not cached.
    """
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    cache_dir = request.arguments.get("cache_dir")
    found = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision or None)
    return Path(found) if isinstance(found, str) else None


def _answers(probe: Callable[[], None]) -> bool:
    """Check within bounded time whether a server responds.

    Args:
        probe: Sends a request; raises if the server does not respond.

    Returns:
        Whether it responds.
    """
    outcome: list[bool] = []

    def ask() -> None:
        try:
            probe()
        except Exception:  # on any error the server cannot be used
            outcome.append(False)
        else:
            outcome.append(True)

    # Name resolution ignores the client's timeouts, so the request runs in a daemon thread that may be abandoned.
    thread = threading.Thread(target=ask, name="vispeft-hub-probe", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS + 1)
    return bool(outcome and outcome[0])


def _probe_hub() -> None:
    """Send a request to the hub; any response counts, also an error status."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        raise OSError("the hub's client was told to stay offline")
    get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)


def _probe_address(url: str) -> None:
    """Send a request to a web server; any response counts, also an error status.

    Args:
        url: The address of a weight file.
    """
    if not url.startswith(("http://", "https://")):
        raise OSError(f"{url} is no web address")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS):
            return
    except urllib.error.HTTPError:
        return
