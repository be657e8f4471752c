"""What the benchmarks share: alternating timing, saved-activation counting, and a JSON with a birth certificate."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def alternate(
    steps: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Time steps in turn, A B C A B C, so that a drifting machine is the same for all.

    Args:
        steps: What to time, by name.
        rounds: Counted rounds.
        warmup: Rounds before them.
        clock: Tells the seconds.

    Returns:
        Median, minimum and maximum seconds by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        for name, step in steps.items():
            start = clock()
            step()
            if number >= warmup:
                seconds[name].append(clock() - start)
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in seconds.items()
    }


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Count the bytes of distinct storages saved for backward, parameters and the input excluded.

    Args:
        model: The model.
        images: Its input.

    Returns:
        Bytes saved by one forward pass.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), images]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    del out
    return sum(sizes.values())


def write(name: str, results: dict[str, Any]) -> Path:
    """Write a benchmark's results with the command, the versions and the machine they come from.

    Args:
        name: Name of the file, without its ending.
        results: Plain values.

    Returns:
        The file.
    """
    import timm

    record = {
        "command": " ".join(["python", str(Path(sys.argv[0]).name), *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "gpu": _gpu()},
        **results,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def write_section(name: str, lines: Iterable[str], page: str | None = None) -> None:
    """Put generated lines between their marks in a page of the documentation.

    Args:
        name: Name of the section, as its marks have it.
        lines: Lines of Markdown.
        page: Name of the page without its ending; None for ``benchmarks``.
    """
    path = PAGE if page is None else PAGE.with_stem(page)
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(before + "\n".join([begin, "", *lines, "", end]) + after, encoding="utf-8")


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
