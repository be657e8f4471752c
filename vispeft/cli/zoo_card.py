"""The card of an adapter of a zoo, generated from its other files alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vispeft.cli.zoo_facts import better, gain
from vispeft.storage.files import ADAPTER_FILE, HEAD_FILE, JSON_FILE
from vispeft.zoo.index import METRICS

__all__ = ["base_fingerprint", "card", "figure_text"]


def figure_text(name: str, value: float) -> str:
    """Write a figure with its name.

    Args:
        name: The figure.
        value: Its value.
    """
    return f"{name} {value:.1%}" if name == "accuracy" else f"{name} {value:.3f}"


def base_fingerprint(header: Mapping[str, Any]) -> str:
    """Return one digest of the fingerprint of an adapter's base, to compare by eye.

    Args:
        header: Content of ``adapter.json``.
    """
    text = json.dumps(header["backbone"]["fingerprint"], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def card(folder: Path) -> str:
    """Write the card of an adapter.

    Args:
        folder: Its folder, with all files but the card.

    Returns:
        Markdown.
    """
    header = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    facts, name = metrics["zoo"], metrics["zoo"]["name"]
    given = {key: value for key, value in header["backbone"]["args"].items() if key != "num_classes"}
    call = ", ".join([repr(facts["backbone"]), *(f"{key}={value!r}" for key, value in given.items())])
    lines = [
        f"# {name}",
        "",
        f"An adapter for {facts['task']}: {header['method']['name']} on `{facts['backbone']}`, trained on "
        f"{facts['data']}.",
        "",
        "```python",
        "import vispeft",
        "",
        f'model = vispeft.zoo.create("{name}")  # backbone, adapter, head and preprocessing',
        f'bank = vispeft.load(vispeft.create_model({call}), "zoo:{name}")  # the adapter alone',
        "```",
        "",
        *_figures(facts, metrics),
        "",
        *_note(facts),
        f"**Trained by** `{metrics['command']}`, {metrics['epochs']} epochs, of which number {metrics['best_epoch']} "
        f"was the best on validation images; {metrics['seconds']['training']:.0f} s on {metrics['threads']} "
        f"thread(s) of a shared machine ({metrics['device']}), by {_versions(metrics['versions'])}. All settings: "
        "config.yaml.",
        "",
        f"**Data.** {facts['data']}; licence: {facts['data_license']}."
        + (f" To measure the adapter again, {facts['needs']} is needed." if facts["needs"] else ""),
        "",
        *_sizes(folder, header, metrics),
        "",
        f"**Base.** The adapter works on `{facts['backbone']}` with exactly the weights it was trained on (fingerprint "
        f"{base_fingerprint(header)}); any other base is refused.",
        "",
        f"**Limits.** {_limits(header, facts)}",
        "",
        f"**Licence.** {facts['license']}.",
        "",
    ]
    return "\n".join(lines)


def _figures(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """Make the table of the figures on the test images."""
    base, seeds = facts["baseline"], {str(metrics["seed"]): facts["figures"], **facts["seeds"]}
    heads = [
        "on the test images",
        f"seed {metrics['seed']} (this adapter)",
        *(f"seed {seed}" for seed in facts["seeds"]),
    ]
    heads += ["linear probe"] if base else []
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for figure in facts["figures"]:
        values = [found[figure] for found in seeds.values()] + ([base[figure]] if base else [])
        says = figure if better(figure) else f"{figure} (less is better)"
        lines.append(f"| {says} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    if base:
        lines += ["", f"Change over the linear probe: {gain(facts['figures'], base):+.1f} % of its figures on average."]
    return lines


def _note(facts: Mapping[str, Any]) -> list[str]:
    return [f"**Why it is here.** {facts['note']}", ""] if facts["note"] else []


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("vispeft", "torch", "timm") if name in versions)


def _sizes(folder: Path, header: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    counts = metrics["parameters"]
    head = folder / HEAD_FILE
    beside = counts.get("decoder") or counts["trainable_head"]
    lines = [
        "| size | parameters | bytes |",
        "|---|---:|---:|",
        f"| adapter | {counts['trainable']:,} | {(folder / ADAPTER_FILE).stat().st_size:,} |",
    ]
    if head.is_file():
        lines.append(f"| classifier or decoder | {beside:,} | {head.stat().st_size:,} |")
    kinds = sorted({entry["dtype"] for entry in header["tensors"].values() if entry["codec"] == "raw"})
    codecs = sorted({entry["codec"] for entry in header["tensors"].values() if entry["codec"] != "raw"})
    return [*lines, "", f"Tensors are stored as {', '.join([*kinds, *codecs])}."]


def _limits(header: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    names = header["class_names"] or []
    size = header["preprocessing"].get("size") or header["preprocessing"].get("input_size", [0, 0])[-2:]
    known = (
        f"It knows {len(names)} outputs ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''}) and nothing else"
    )
    if facts["task"] == "retrieval":
        known = "It places images that look alike near each other, and knows drawings of this kind alone"
    return (
        f"{known}; images are seen at {size[0]} x {size[1]} pixels. One seed was trained unless others are in the "
        "table, on little data and a tiny backbone: an example and a start for training, no product."
    )
