"""Porting of an adapter from its file alone, where the backbone that it was trained on is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vispeft.adapters.bank import AdapterBank
from vispeft.adapters.porting import Drift, Ported, check_drift
from vispeft.core.families import unwrap
from vispeft.errors import BaseMismatchError
from vispeft.storage.files import read_encoded
from vispeft.storage.fingerprint import fingerprint

__all__ = ["port_file"]


def port_file(model: nn.Module, path: str | Path, name: str | None = None) -> Ported:
    """Carry an adapter from its file to another checkpoint of the same architecture.

    The file has digests of the old weights: parts that are equal have no drift, that of the others is unknown.

    Args:
        model: The new backbone.
        path: The adapter's directory.
        name: Its name on the model; see `vispeft.load`.

    Returns:
        The bank of the new backbone, and what is known of the drift.

    Raises:
        BaseMismatchError: If the architecture is another one, or the adapter cannot be had without the old weights:
            SVFit, whose singular vectors are theirs, and copies of whole tensors.
    """
    header, _, _ = read_encoded(Path(path))
    with AdapterBank.opened(model) as bank:
        drift = _compared(header["backbone"]["fingerprint"], fingerprint(unwrap(model), bank.view))
        method = header["method"]["name"]
        if method in _NEED_OLD and drift.total != 0:
            raise BaseMismatchError(
                f"An adapter of {method} is a change of the old weights, and these are not there. Port it where they "
                "are: bank.port(model)."
            )
        notes = check_drift(drift, allow_drift=False)
        before = set(bank.names)
        bank.load(path, name, allow_base_mismatch=True)
        (label,) = set(bank.names) - before
        part = {"name": label, "method": method, "digest": header["digest"]}
        bank._entries[label].notes["made_of"] = {"how": "port", "parts": [part], "drift": str(drift)}
        bank._entries[label].notes.pop("metrics", None)
    return Ported(bank, label, method, drift, tuple(notes))


_NEED_OLD = frozenset({"svfit", "full", "bitfit", "norm_tuning"})
"""Methods whose tensors mean something on the old weights alone."""


def _compared(saved: Any, found: Any) -> Drift:
    """Compare two fingerprints part by part."""
    say = "This is another architecture, and an adapter is ported between checkpoints of one architecture alone"
    if saved["class"] != found["class"]:
        raise BaseMismatchError(f"{say}: the old backbone is a {saved['class']}, the new one a {found['class']}.")
    other = sorted(set(saved["parts"]) ^ set(found["parts"]))
    if other:
        raise BaseMismatchError(f"{say}: only one of the backbones has {other[0]}.")
    for key, value in saved["function"].items():
        if found["function"].get(key) != value:
            raise BaseMismatchError(
                f"{say}: {key} is {value} in the old one, {found['function'].get(key)} in the new one."
            )
    layers = {part: 0.0 if digests == found["parts"][part] else None for part, digests in saved["parts"].items()}
    return Drift(0.0 if None not in layers.values() else None, layers)
