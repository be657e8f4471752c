"""The fingerprint of a base: the identity of the frozen weights an adapter was trained on.

It covers all parameters and persistent buffers except the classifier and tensors whose shape depends on the image size
or the number of input channels. It has one part per block, so that a mismatch can be located and a truncated model
(``features_only``) recognised. Each part has a digest of its values in float32 and of their roundings to bfloat16 and
float16, so that a model in reduced precision is recognised as the same one. Position tensors and the input layer are
listed separately: they must agree where the shapes are equal, and may differ in shape.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vispeft.core.families import base_class
from vispeft.core.sites import View
from vispeft.core.units import Unit
from vispeft.errors import BaseMismatchError

__all__ = ["absent_parts", "base_tensors", "check_fingerprint", "fingerprint", "function_of", "pool_of"]

T = TypeVar("T")
R = TypeVar("R")
_HALVES = {"bfloat16", "float16"}
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def base_tensors(
    model: nn.Module, head: str | None, replaced: Mapping[str, Tensor | None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of the base, without units and without classifiers.

    Args:
        model: The timm model, adapted or not.
        head: Path of the classifier.
        replaced: For a merged model, the original tensors by name; None for those that merging created.

    Yields:
        Name in a plain timm state dict and tensor, in the model's order.
    """
    replaced = replaced or {}

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            full = f"{path}{name}"
            tensor = replaced.get(full, tensor)
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield full, tensor
        for name, child in module.named_children():
            if not isinstance(child, Unit) and name not in ("adapters", "adapter_heads") and f"{path}{name}" != head:
                yield from walk(child, f"{path}{name}.")

    yield from walk(model, "")


def fingerprint(model: nn.Module, view: View, replaced: Mapping[str, Tensor | None] | None = None) -> dict[str, Any]:
    """Compute the fingerprint of a model's frozen weights.

    Args:
        model: The timm model, adapted or not.
        view: Its description.
        replaced: For a merged model, the original tensors by name.

    Returns:
        Plain values, for ``adapter.json``.
    """
    parts, bound, dtype = _group(model, view, replaced)
    digests = dict(zip(parts, _in_threads(_digests, parts.values()), strict=True))
    return {
        "function": function_of(model, view),
        "class": view.model_class,
        "dtype": str(dtype).removeprefix("torch."),
        "parts": digests,
        "bound": {
            name: {"shape": list(tensor.shape), "digests": _digests([(name, tensor)])} for name, tensor in bound.items()
        },
    }


def check_fingerprint(
    saved: Mapping[str, Any], model: nn.Module, view: View, replaced: Mapping[str, Tensor | None] | None = None
) -> None:
    """Raise if a model's frozen weights do not match a fingerprint.

    Args:
        saved: The result of `fingerprint` when the adapter was saved.
        model: The timm model.
        view: Its description.
        replaced: For a merged model, the original tensors by name.

    Raises:
        BaseMismatchError: If class, tensors or weights differ; the message names the first parts that do.
    """
    if saved["class"] != view.model_class:
        raise BaseMismatchError(
            f"The adapter was trained on a {saved['class']}, and this model is a {view.model_class}. "
            "Load it on the backbone named in its adapter.json."
        )
    parts, bound, dtype = _group(model, view, replaced)
    unknown = [part for part in parts if part not in saved["parts"]]
    # A model without a classifier may be truncated; one with a classifier must have all parts.
    cut = len(parts) < len(saved["parts"])
    if unknown or (cut and not (_has_no_classifier(model, view) and _is_prefix(parts, saved["parts"]))):
        missing = [part for part in saved["parts"] if part not in parts]
        raise BaseMismatchError(
            f"The adapter was trained on another architecture: this model has {_some(unknown) or 'nothing'} beyond it "
            f"and lacks {_some(missing) or 'nothing'}. Create the backbone with the arguments in its adapter.json."
        )
    _check_function(saved["function"], function_of(model, view))
    present = "float32" if dtype in (torch.float32, torch.float64) else str(dtype).removeprefix("torch.")
    levels = _levels(saved["dtype"], present)
    verdicts = _in_threads(lambda part: _agrees(parts[part], saved["parts"][part], levels), parts)
    different = [part for part, same in zip(parts, verdicts, strict=True) if not same]
    for name, tensor in bound.items():
        entry = saved["bound"].get(name)
        if entry and entry["shape"] == list(tensor.shape) and not _agrees([(name, tensor)], entry["digests"], levels):
            different.append(name)
    if different:
        raise BaseMismatchError(
            f"The adapter was trained on other weights: {len(different)} of {len(parts) + len(bound)} parts of this "
            f"model differ, first {_some(different)}. {_other_rounding(saved['dtype'], present)}Load the same "
            "pretrained weights, or pass allow_base_mismatch=True if you know that they are close enough."
        )


def function_of(model: nn.Module, view: View) -> dict[str, Any]:
    """Describe the parts of a model's function that its weights do not determine: pooling, heads, activations, norms.

    Args:
        model: The timm model.
        view: Its description.

    Returns:
        Plain values.
    """
    kinds: dict[str, set[str]] = defaultdict(set)
    roles = {site.path: site.role for site in view.sites if site.kind in ("norm", "block") and not site.inside}
    heads = [int(module.num_heads) for site in view.at("attn") if (module := model.get_submodule(site.path))]  # type: ignore[arg-type]
    for path, module in model.named_modules():
        role = roles.get(path, "")
        if role == "mlp.act":
            detail = module.extra_repr()
            kinds[role].add(base_class(module).__name__ + (f"({detail})" if detail else ""))
        elif role not in ("", "block"):
            kinds[role].add(f"{base_class(module).__name__} {getattr(module, 'eps', '')}".strip())
    return {**{kind: sorted(values) for kind, values in sorted(kinds.items())}, "heads": heads, "pool": pool_of(model)}


def pool_of(model: nn.Module) -> str:
    """Return how a model currently pools before its classifier."""
    return str(getattr(model, "global_pool", ""))


def _check_function(saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for key in saved:
        # Pooling belongs to the classifier and is checked with it; a truncated model lacks its last parts.
        if key == "pool" or key not in found or found[key] in (saved[key], ["Identity"]):
            continue
        if key == "heads" and found[key] == saved[key][: len(found[key])]:
            continue
        raise BaseMismatchError(
            f"The adapter was trained on a backbone whose {key} is {saved[key]}; here it is "
            f"{found[key]}. Create the backbone with the arguments in its adapter.json."
        )


def _has_no_classifier(model: nn.Module, view: View) -> bool:
    return view.head_path is None or base_class(model.get_submodule(view.head_path)) is nn.Identity


def absent_parts(saved: Mapping[str, Any], model: nn.Module, view: View) -> list[str]:
    """List the parts of the full model that a truncated one lacks.

    Args:
        saved: The fingerprint of the full model.
        model: The timm model.
        view: Its description.

    Returns:
        Paths in the full model.
    """
    parts, _, _ = _group(model, view, None)
    return [part for part in saved["parts"] if part not in parts]


def _is_prefix(parts: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Return whether only the last parts of the saved model are missing, as in a truncated model."""
    return list(parts) == [part for part in saved if part in parts] and len(parts) > 1


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _levels(saved: str, present: str) -> list[str]:
    """List the precisions in which two models may agree, the exact one first.

    Two float32 models agree exactly, or after rounding if one of them holds values rounded earlier (marked ``!``). A
    model in reduced precision is compared in that precision.
    """
    if "float32" == saved == present:
        return ["float32", "bfloat16!", "float16!"]
    if saved in ("float32", "float64"):
        return [present]
    # A model cast from one reduced precision to the other agrees in the second.
    return [saved, present] if present in _HALVES else [saved]


def _other_rounding(saved: str, present: str) -> str:
    """Return why models of two reduced precisions differ; empty for other ones."""
    if saved == present or not {saved, present} <= _HALVES:
        return ""
    return (
        f"It was saved on weights in {saved}, and these are in {present}: both are roundings, and neither tells the "
        f"other. On weights in {saved} or float32 it can be compared. "
    )


def _in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call a function for every item, in two threads: hashing and conversions release Python's lock.

    The first thread starts alone. After a fork PyTorch makes its own pool anew, and two threads that do so at once
    meet one that is not there.
    """
    with ThreadPoolExecutor(2) as pool:
        pool.submit(torch.get_num_threads).result()
        return list(pool.map(work, items))


def _agrees(tensors: list[tuple[str, Tensor]], saved: Mapping[str, str], levels: list[str]) -> bool:
    for level in levels:
        precision = level.rstrip("!")
        if level.endswith("!") and not all(_is_rounded(tensor, _PRECISIONS[precision]) for _, tensor in tensors):
            continue
        if _digest(tensors, precision) == saved[precision]:
            return True
    return False


def _is_rounded(tensor: Tensor, dtype: torch.dtype) -> bool:
    return not tensor.is_floating_point() or bool((tensor.to(dtype) == tensor).all())


def _group(
    model: nn.Module, view: View, replaced: Mapping[str, Tensor | None] | None
) -> tuple[dict[str, list[tuple[str, Tensor]]], dict[str, Tensor], torch.dtype]:
    blocks = [site.key for site in view.at("block")]
    parts: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    bound: dict[str, Tensor] = {}
    dtype = torch.float32
    for name, tensor in base_tensors(model, view.head_path, replaced):
        if tensor.is_floating_point():
            dtype = tensor.dtype
        name = view.whole_name(name)
        if name.rsplit(".", 1)[-1] in view.size_bound or name in view.input_bound:
            bound[name] = tensor
            continue
        block = next((path for path in blocks if name.startswith(f"{path}.")), None)
        parts[block or name.rpartition(".")[0] or name].append((name, tensor))
    return dict(parts), bound, dtype


def _digests(tensors: list[tuple[str, Tensor]]) -> dict[str, str]:
    return {precision: _digest(tensors, precision) for precision in _PRECISIONS}


def _digest(tensors: list[tuple[str, Tensor]], precision: str) -> str:
    """Hash names, shapes and values; 64 bits of sha256 suffice to distinguish checkpoints."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        value = tensor.detach()
        if value.is_floating_point():
            value = value.to(torch.float32).to(_PRECISIONS[precision])
        raw = value.cpu().contiguous()
        digest.update(raw.view(torch.uint8).numpy().data if raw.ndim else str(raw.item()).encode())
    return digest.hexdigest()[:16]
