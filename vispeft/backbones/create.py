"""Make a backbone: `timm.create_model`, plus local weight files, shipped backbones, and errors that say what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vispeft.backbones.swin import AnySizeSwinBlock, make_any_size
from vispeft.backbones.swinv2 import AnySizeSwinV2Block
from vispeft.errors import BackboneError, ConfigError, FileError, UnknownNameError
from vispeft.resources import resource_folder

__all__ = ["create_model", "list_zoo_backbones", "zoo_folder"]

ZOO_VARIABLE = "VISPEFT_ZOO"
"""Environment variable that names another ``model_zoo`` folder than the packaged one."""

ANSWER_SECONDS = 5.0
"""How long a hub may take to answer at all before it counts as out of reach."""

_DYNAMIC = {"dynamic_img_size": True}
# The mask is computed per forward, the window stays as built, and feature maps smaller than a window are padded: what
# the original Swin code and mmsegmentation do. `set_input_size` would change the window.
_WINDOWED = {"strict_img_size": False, "always_partition": True}
_FLEXIBLE: dict[str, dict[str, bool]] = {
    "timm.models.beit": _DYNAMIC,
    "timm.models.deit": _DYNAMIC,
    "timm.models.eva": _DYNAMIC,
    "timm.models.swin_transformer": _WINDOWED,
    "timm.models.swin_transformer_v2": _WINDOWED,
    "timm.models.vision_transformer": _DYNAMIC,
}
"""Per file of timm, the constructor arguments under which its models take images of any size."""

# Where timm looks on a hub, in its order.
_HUB_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def create_model(
    name: str,
    *,
    pretrained: bool = True,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    flexible_size: bool = False,
    **timm_args: Any,
) -> nn.Module:
    """Create a timm model, from a hub, from a local file or from the backbones that ship with the project.

    A local file is loaded by timm itself, so position embeddings are resized and the layouts timm knows are
    converted; every tensor of the backbone must be found. Only the classifier may differ: where another class count is
    asked for than the file has, it starts afresh.

    Args:
        name: A name `timm.create_model` takes, or ``zoo:NAME`` for a backbone of ``model_zoo/backbones``.
        pretrained: Whether to load weights. False gives random ones.
        num_classes: Outputs of the classifier; 0 for none. None keeps what the weights have.
        weights: A local file with the weights: ``.safetensors``, a PyTorch file (``.pth``, ``.pt``, ``.bin``, ``.tar``;
            tensors only, code in it is refused), or ``.npz`` for families timm converts from it.
        flexible_size: Whether the model is to take images of any size, not only the one it is built for.
        **timm_args: Further arguments of `timm.create_model`, such as ``img_size`` or ``drop_path_rate``.

    Returns:
        The model, a plain timm one, in training mode as timm leaves it.

    Raises:
        UnknownNameError: If timm or the zoo has no such model; near names are listed.
        BackboneError: If weights do not fit, are not available, or the family cannot take images of any size.
        FileError: If the weight file is missing, damaged or altered.
        ConfigError: If arguments contradict each other.

    Example:
        >>> model = create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10)
        >>> model.num_classes
        10
    """
    if weights is not None and not pretrained:
        raise ConfigError("weights= was given together with pretrained=False. Drop one: a file is there to be loaded.")
    asked = dict(timm_args)
    if num_classes is not None:
        asked["num_classes"] = num_classes
    if flexible_size:
        asked["flexible_size"] = True
    if not pretrained:
        asked["pretrained"] = False
    source: dict[str, Any] = {"name": name, "args": _json_values(asked)}

    if name.startswith("zoo:"):
        backbone = _read_zoo(name.removeprefix("zoo:"))
        architecture, arguments = backbone.architecture, {**backbone.args, **timm_args}
        overlay = {**backbone.overlay, **(timm_args.get("pretrained_cfg_overlay") or {})}
    else:
        backbone, architecture, arguments = None, name, dict(timm_args)
        overlay = dict(timm_args.get("pretrained_cfg_overlay") or {})
        _check_name(architecture)
    arguments.pop("pretrained_cfg_overlay", None)
    if flexible_size:
        arguments = {**_flexible_args(name, architecture), **arguments}

    if weights is not None:
        file = Path(weights)
        source["weights"] = file.name
        model = _from_file(name, architecture, file, num_classes, arguments, overlay)
    elif backbone is not None and pretrained:
        backbone.verify()
        model = _from_file(name, architecture, backbone.weights, num_classes, arguments, overlay)
    elif pretrained:
        model = _from_hub(architecture, num_classes, arguments, overlay)
    else:
        model = _build(architecture, False, num_classes, arguments, overlay)
    if flexible_size:
        make_any_size(model, {own.timm_block: own for own in (AnySizeSwinBlock, AnySizeSwinV2Block)})
    model.__dict__["_vispeft_source"] = source
    return model


# ----------------------------------------------------------------------------------------------------- building


def _build(
    architecture: str,
    pretrained: bool,
    num_classes: int | None,
    arguments: Mapping[str, Any],
    overlay: Mapping[str, Any],
) -> nn.Module:
    """Call timm, and say which argument it did not know.

    Args:
        architecture: A name timm takes.
        pretrained: Whether timm is to load weights.
        num_classes: Outputs of the classifier; None for timm's own.
        arguments: Further arguments.
        overlay: Entries that replace those of timm's description of the weights.

    Returns:
        The model.

    Raises:
        ConfigError: If the model takes no argument of a name that was given.
    """
    given = dict(arguments)
    if num_classes is not None:
        given["num_classes"] = num_classes
    try:
        return timm.create_model(
            architecture, pretrained=pretrained, pretrained_cfg_overlay=dict(overlay) or None, **given
        )
    except TypeError as error:
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[2] not in given:
            raise
        raise ConfigError(
            f"{architecture} was asked for with {unknown[2]}={given[unknown[2]]!r}, but timm's {unknown[1]} takes no "
            "such argument. Drop it, or correct its name after timm's documentation of that class."
        ) from error


def _check_name(name: str) -> None:
    """Refuse a name timm does not know.

    Args:
        name: An architecture, with or without a tag of weights, or a name with a source such as ``hf-hub:``.

    Raises:
        UnknownNameError: If there is no such architecture, or no such tag of it.
    """
    if ":" in name:
        place, _, path = name.partition(":")
        if place not in ("hf-hub", "hf_hub", "local-dir"):
            raise UnknownNameError("source of a model", f"{place}:", ["zoo:", "hf-hub:", "local-dir:"])
        if place == "local-dir" and not (Path(path) / "config.json").is_file():
            raise FileError(f"{name} was asked for, but there is no config.json in {path}.")
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = "Names are listed by timm.list_models('*vit*'); a shipped backbone is asked for as zoo:NAME."
        raise UnknownNameError("backbone", name, timm.list_models(), hint)
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UnknownNameError(f"pretrained tag of {architecture}", tag, tags)


def _flexible_args(name: str, architecture: str) -> dict[str, bool]:
    """Look up how a family takes images of any size.

    Args:
        name: The name the user gave, for the message.
        architecture: A name timm takes.

    Returns:
        Constructor arguments.

    Raises:
        BackboneError: If the family cannot, or the architecture is only known to a hub.
    """
    if ":" in architecture:
        raise BackboneError(
            f"{name} was asked for with flexible_size=True, but its family is known only once it is loaded. Give the "
            "argument of its class instead: dynamic_img_size=True for a ViT, strict_img_size=False and "
            "always_partition=True for a Swin."
        )
    module = timm.models.model_entrypoint(architecture.partition(".")[0]).__module__
    if module not in _FLEXIBLE:
        families = ", ".join(sorted(m.removeprefix("timm.models.") for m in _FLEXIBLE))
        raise BackboneError(
            f"{name} was asked for with flexible_size=True, but models of {module} have no stated way to take images "
            f"of any size; {families} have. Give the size with img_size=, or take another backbone."
        )
    return _FLEXIBLE[module]


def _json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what can be written to a file as it is.

    Args:
        values: Arguments by name.

    Returns:
        Those that JSON can hold, with tuples as lists; local places are left out.
    """
    kept = {}
    for key, value in values.items():
        if key in ("cache_dir", "checkpoint_path", "pretrained_cfg_overlay"):
            continue
        try:
            kept[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return kept


# -------------------------------------------------------------------------------------------------- local files


def _from_file(
    name: str,
    architecture: str,
    file: Path,
    num_classes: int | None,
    arguments: Mapping[str, Any],
    overlay: Mapping[str, Any],
) -> nn.Module:
    """Build a model and have timm load a local file into it, every backbone tensor of it.

    timm stops looking for missing tensors as soon as the class count differs from that of the weights. So the model is
    built with the file's count, loaded strictly, and given another classifier afterwards.

    Args:
        name: The name the user gave, for messages.
        architecture: A name timm takes.
        file: The weights.
        num_classes: Outputs of the classifier; None keeps the file's.
        arguments: Further arguments of `timm.create_model`.
        overlay: Entries that replace those of timm's description of the weights.

    Returns:
        The model.

    Raises:
        FileError: If the file cannot be read.
        BackboneError: If it does not fit the model.
    """
    if ":" in architecture:
        raise BackboneError(
            f"{name} was asked for with weights={file.name!r}, but a name with a source brings its own weights. Give "
            "the name of the architecture, without hf-hub: or local-dir:."
        )
    if not file.is_file():
        found = "it is a directory" if file.is_dir() else "there is no such file"
        raise FileError(f"weights={str(file)!r} was given for {name}, but {found}.")
    entries = {**overlay, "file": str(file), "custom_load": False}
    if file.suffix == ".npz":
        return _from_npz(name, architecture, file, num_classes, arguments, {**entries, "custom_load": True})

    # `local-dir` and `hf-hub` names are refused above, so timm has a description of this architecture.
    described = timm.get_pretrained_cfg(architecture)
    found_classes = _classes_in(file, described.classifier if described else None)
    # Without a classifier timm can find by name, the file has none, or timm converts it from another layout.
    counts = [found_classes] if found_classes is not None else [0, described.num_classes if described else 1000]
    failure: Exception | None = None
    for count in counts:
        try:
            model = _build(architecture, True, count, arguments, {**entries, "num_classes": count})
        except (RuntimeError, KeyError, ValueError, AttributeError) as error:
            failure = failure or error
            continue
        _rename_file(model, file)
        if num_classes is not None and num_classes != count:
            _renew_classifier(model, num_classes)
        return model
    raise BackboneError(
        f"{file.name} was asked to be loaded into {name}, but its tensors do not fit: {_brief(failure)} Give the file "
        "that belongs to this architecture, or the constructor arguments it was made with (such as img_size, "
        "patch_size, embed_dim, global_pool)."
    ) from failure


def _from_npz(
    name: str,
    architecture: str,
    file: Path,
    num_classes: int | None,
    arguments: Mapping[str, Any],
    overlay: Mapping[str, Any],
) -> nn.Module:
    """Load the original JAX weights of a family timm can convert.

    Args:
        name: The name the user gave, for messages.
        architecture: A name timm takes.
        file: The ``.npz`` file.
        num_classes: Outputs of the classifier; None for timm's own.
        arguments: Further arguments of `timm.create_model`.
        overlay: Entries that replace those of timm's description of the weights.

    Returns:
        The model.

    Raises:
        BackboneError: If the file does not fit, or timm has no conversion for the family.
    """
    try:
        model = _build(architecture, True, num_classes, arguments, overlay)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise BackboneError(
            f"{file.name} was asked to be loaded into {name}, but timm could not convert it: {_brief(error)} An .npz "
            "file must be the original release of this architecture; other weights go into a .safetensors file."
        ) from error
    _rename_file(model, file)
    return model


def _rename_file(model: nn.Module, file: Path) -> None:
    """Keep the name of the weight file in timm's description, not the place it had on this machine.

    Args:
        model: The loaded model.
        file: The weight file.
    """
    described = getattr(model, "pretrained_cfg", None)
    if isinstance(described, dict):
        described["file"] = file.name


def _renew_classifier(model: nn.Module, num_classes: int) -> None:
    """Put a fresh classifier on a model, with the start timm gives to one in its transformers.

    Args:
        model: A timm model; changed in place.
        num_classes: Outputs; 0 for none.
    """
    model.reset_classifier(num_classes)  # type: ignore[operator]
    if isinstance(getattr(model, "_model_args", None), dict):
        model._model_args = {**model._model_args, "num_classes": num_classes}  # type: ignore[dict-item,assignment]
    classifier = model.get_classifier()  # type: ignore[operator]
    for part in classifier if isinstance(classifier, tuple) else (classifier,):
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _classes_in(file: Path, classifier: str | tuple[str, ...] | None) -> int | None:
    """Read from a file how many classes its classifier has.

    Args:
        file: A ``.safetensors`` or PyTorch file.
        classifier: timm's name, or names, for the classifier of this architecture.

    Returns:
        The count; None when no classifier is found.

    Raises:
        FileError: If the file cannot be read, or holds more than tensors.
    """
    own = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    keys = [f"{part}.weight" for part in dict.fromkeys((*own, "head", "head.fc"))]
    shapes = _shapes_in(file)
    for key in keys:
        # The classifier's weight has two axes (or is a 1 x 1 convolution); a norm called `head.norm` has one.
        if len(shapes.get(key, ())) >= 2:
            return shapes[key][0]
    return None


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of the tensors of a file.

    Args:
        file: A ``.safetensors`` or PyTorch file.

    Returns:
        Shape by name, under the names timm will see.

    Raises:
        FileError: If the file cannot be read, or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        tensors = timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:  # safetensors, pickle and zip readers share no base class
        raise FileError(
            f"The weights in {file.name} cannot be read: {_brief(error)} The file must be a whole .safetensors, a "
            "PyTorch file that holds tensors only, or .npz."
        ) from error
    shapes = {key: tuple(value.shape) for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    if not shapes:
        raise FileError(f"{file.name} holds no tensors under the names timm looks at (state_dict, model, or none).")
    return shapes


def _brief(error: BaseException | None) -> str:
    """Shorten an error's text to what fits into a message.

    Args:
        error: The error.

    Returns:
        Its text on one line, ending in a full stop.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > 400:
        text = text[:400].rsplit(" ", 1)[0] + " ..."
    return text if text.endswith(".") else text + "."


# --------------------------------------------------------------------------------------------------------- zoo


@dataclass(frozen=True, kw_only=True)
class _ZooBackbone:
    """A shipped backbone, as its config.json describes it."""

    name: str
    """Its name, without ``zoo:``."""
    architecture: str
    """The timm architecture."""
    args: dict[str, Any]
    """Constructor arguments that make the architecture what the weights need."""
    overlay: dict[str, Any]
    """Its part of timm's description: preprocessing, class count, no place on a hub."""
    weights: Path
    """The weight file."""
    sha256: str
    """Digest of it."""

    def verify(self) -> None:
        """Compare the weight file with its digest.

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


def zoo_folder() -> Path:
    """Find the folder of shipped models.

    Returns:
        The folder the environment variable ``VISPEFT_ZOO`` names, which need not exist, or the package's own.

    Raises:
        FileError: If the package is installed without its data.
    """
    named = os.environ.get(ZOO_VARIABLE)
    return Path(named).expanduser() if named else resource_folder("model_zoo")


def list_zoo_backbones() -> list[str]:
    """List the backbones that ship with the project.

    Returns:
        Their names, for ``create_model("zoo:NAME")``.
    """
    return sorted(path.parent.name for path in zoo_folder().glob("backbones/*/config.json"))


def _read_zoo(name: str) -> _ZooBackbone:
    """Read the description of a shipped backbone.

    Args:
        name: Its name, without ``zoo:``.

    Returns:
        The description.

    Raises:
        FileError: If there is no zoo, or the description is damaged.
        UnknownNameError: If the zoo has no such backbone.
    """
    known = list_zoo_backbones()
    place = zoo_folder() / "backbones"
    if not known:
        raise FileError(
            f"zoo:{name} was asked for, but there are no backbones in {place}. Unset the environment variable "
            f"{ZOO_VARIABLE} to use the packaged ones, or point it to a model_zoo folder."
        )
    if name not in known:
        raise UnknownNameError("backbone of the zoo", name, known, f"They are in {place}.")
    folder = place / name
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        seen = config["preprocessing"]
        overlay = {
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
        return _ZooBackbone(
            name=name,
            architecture=config["architecture"],
            args=dict(config["args"]),
            overlay=overlay,
            weights=folder / "model.safetensors",
            sha256=config["sha256"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"The config.json of zoo:{name} cannot be used ({error!r}). Restore the file.") from error


# --------------------------------------------------------------------------------------------------------- hubs


def _from_hub(
    architecture: str, num_classes: int | None, arguments: Mapping[str, Any], overlay: Mapping[str, Any]
) -> nn.Module:
    """Have timm fetch the weights, after finding out whether it can.

    The hub's client tries for the better part of a minute before it gives up, and then names neither the model nor a
    way out. So the hub is asked for a sign of life first; without one, a copy in the client's cache is used.

    Args:
        architecture: A name timm takes, with or without a tag or a source.
        num_classes: Outputs of the classifier; None for that of the weights.
        arguments: Further arguments of `timm.create_model`.
        overlay: Entries that replace those of timm's description of the weights.

    Returns:
        The model.

    Raises:
        BackboneError: If there are no weights, or they can neither be fetched nor be found in the cache.
    """
    place, _, repository = architecture.partition(":")
    if place == "local-dir" or "pretrained_cfg" in arguments or {"file", "url", "hf_hub_id"} & set(overlay):
        return _build(architecture, True, num_classes, arguments, overlay)
    cache_dir = arguments.get("cache_dir")
    if repository:
        if not _answers(_hub_probe):
            cached = _cached(repository, "config.json", cache_dir)
            if cached is None:
                raise _out_of_reach(architecture, repository)
            return _build(f"local-dir:{cached.parent}", True, num_classes, arguments, overlay)
        return _fetch(architecture, repository, num_classes, arguments, overlay)

    described = timm.get_pretrained_cfg(architecture)
    if described is None or not described.has_weights:
        tags = timm.list_models(f"{architecture}.*", pretrained=True)
        other = f" Pretrained are {', '.join(tags)}." if tags else ""
        raise BackboneError(
            f"{architecture} was asked for with pretrained weights, but timm knows of none.{other} Give a local file "
            "with weights=, or pretrained=False for random weights."
        )
    if described.file:
        return _build(architecture, True, num_classes, arguments, overlay)
    if described.hf_hub_id:
        where = described.hf_hub_id
        if not _answers(_hub_probe):
            files = (described.hf_hub_filename,) if described.hf_hub_filename else _HUB_FILES
            cached = next((path for file in files if (path := _cached(where, file, cache_dir))), None)
            if cached is None:
                raise _out_of_reach(architecture, where)
            found = {"file": str(cached), "custom_load": bool(described.custom_load) and cached.suffix == ".npz"}
            model = _build(architecture, True, num_classes, arguments, {**overlay, **found})
            _rename_file(model, cached)
            return model
    else:
        where = str(described.url)
        folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
        if not (folder / where.rsplit("/", 1)[-1]).is_file() and not _answers(lambda: _url_probe(where)):
            raise _out_of_reach(architecture, where)
    return _fetch(architecture, where, num_classes, arguments, overlay)


def _fetch(
    architecture: str,
    where: str,
    num_classes: int | None,
    arguments: Mapping[str, Any],
    overlay: Mapping[str, Any],
) -> nn.Module:
    """Have timm fetch weights from a hub that answers.

    Args:
        architecture: A name timm takes.
        where: The repository or address, for the message.
        num_classes: Outputs of the classifier; None for that of the weights.
        arguments: Further arguments of `timm.create_model`.
        overlay: Entries that replace those of timm's description of the weights.

    Returns:
        The model.

    Raises:
        BackboneError: If the connection or the hub failed.
    """
    try:
        return _build(architecture, True, num_classes, arguments, overlay)
    except OSError as error:  # the base of every error of the hub's client, and of urllib's
        raise _out_of_reach(architecture, where, _brief(error)) from error


def _out_of_reach(architecture: str, where: str, reason: str = "") -> BackboneError:
    """Compose the error for weights that cannot be had.

    Args:
        architecture: What was asked for.
        where: The repository or address.
        reason: What the client said.

    Returns:
        The error.
    """
    zoo = list_zoo_backbones()
    shipped = f" Without a network there is also {', '.join('zoo:' + name for name in zoo)}." if zoo else ""
    name = architecture.partition(":")[2] or architecture
    # A repository's last part begins with the architecture's name; its dot separates the tag.
    plain = name.rsplit("/", 1)[-1].partition(".")[0]
    return BackboneError(
        f"{architecture} was asked for with pretrained weights; they are at {where}, which cannot be reached, and no "
        f"copy is in the cache.{' The client said: ' + reason if reason else ''} On a machine with a network, fetch "
        f"its model.safetensors (or .pth), bring the file here, and pass it: create_model({plain!r}, "
        f"weights='model.safetensors'). pretrained=False gives random weights.{shipped}"
    )


def _cached(repository: str, file: str, cache_dir: str | Path | None) -> Path | None:
    """Look for a file in the cache of the hub's client, without any connection.

    Args:
        repository: Owner and name, with ``@revision`` where one is pinned.
        file: Name of the file.
        cache_dir: Another place of the cache.

    Returns:
        The file; None when it is not there.
    """
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    found = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision or None)
    return Path(found) if isinstance(found, str) else None


def _answers(probe: Callable[[], None]) -> bool:
    """Find out whether a server answers, in bounded time.

    Args:
        probe: Asks the server; raises when it does not answer.

    Returns:
        Whether it did.
    """
    outcome: list[bool] = []

    def ask() -> None:
        try:
            probe()
        except Exception:  # whatever went wrong, the server cannot be used
            outcome.append(False)
        else:
            outcome.append(True)

    # Looking up a name obeys no timeout of the client's, so the question is asked in a thread that may be left alone.
    thread = threading.Thread(target=ask, name="vispeft-hub-probe", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS + 1)
    return bool(outcome and outcome[0])


def _hub_probe() -> None:
    """Ask the hub for a sign of life; any answer counts, also one that refuses."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        raise OSError("the hub's client was told to stay offline")
    get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)


def _url_probe(url: str) -> None:
    """Ask a web server for a sign of life; any answer counts, also one that refuses.

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
