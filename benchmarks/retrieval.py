"""Time and memory of exact retrieval scores against faiss's flat search, at the size of Stanford Online Products.

    python benchmarks/retrieval.py                    # all 60,000 queries, some minutes for each round
    python benchmarks/retrieval.py --queries 4096     # fewer queries in the same gallery
    python benchmarks/retrieval.py --table            # writes the table into docs/metric_learning.md

60,000 vectors of 512 dimensions and length one, in classes of 2 to 12 as in SOP, R@1, 10, 100, 1000 and MAP@R, two
threads. faiss (extra ``search``) looks for the 1,000 nearest by `IndexFlatIP`, and computes no scores from them. Ours
and faiss's take turns in one process. ``random`` are vectors without classes, among which few neighbours are relevant;
in ``clustered`` the nearest ones are, so that MAP@R has more to do. Peak memory is that of a process of its own, above
the embeddings and the libraries, and needs Linux. Writes results/retrieval.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Threads of both sides that wait for each other sleep: else their waiting counts as processor time on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import vispeft  # noqa: F401  (first: it makes torchvision importable where its library does not fit)

import torch  # isort: skip
from common import RESULTS, alternate, write, write_section
from torch import Tensor
from torch.nn import functional as F

from vispeft.metrics import RetrievalScores
from vispeft.metrics.retrieval import BOTH, GALLERY

NAME = "retrieval"
COUNT, WIDTH = 60_000, 512
SMALLEST, LARGEST = 2, 12
"""Images of a class: those of SOP's 22,634 classes."""
KS = (1, 10, 100, 1000)
KINDS = ("random", "clustered")
NOISE = 0.05
"""Standard deviation of the noise in each direction around a class's centre of length one."""
TIME_BAR, MEMORY_BAR = 1.5, 1.5 * 2**30
"""Largest time relative to faiss's, and bytes of memory."""


def make(kind: str, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw embeddings (count, width) of length one and their labels (count,), in random order."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(SMALLEST, LARGEST + 1, (count // SMALLEST,), generator=generator)
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)[:count]
    labels = labels[torch.randperm(count, generator=generator)]
    embeddings = torch.randn(count, width, generator=generator)
    if kind == "clustered":
        centres = F.normalize(torch.randn(len(sizes), width, generator=generator))
        for part, own in zip(embeddings.split(4096), labels.split(4096), strict=True):
            part.mul_(NOISE).add_(centres[own])
    embeddings /= embeddings.norm(dim=1, keepdim=True)  # in place: the peak of memory is to be that of the scores
    return embeddings, labels


def measure_ours(embeddings: Tensor, labels: Tensor, queries: int) -> dict[str, float]:
    """Compute the scores of the first queries in the gallery of all."""
    metric = RetrievalScores(ks=KS)
    roles = torch.full_like(labels, GALLERY)
    roles[:queries] = BOTH
    metric.update(embeddings, labels, roles)
    return {name: float(value) for name, value in metric.compute().items()}


def search_faiss(index: Any, embeddings: Tensor, queries: int) -> Tensor:
    """Find the nearest of the first queries: indices (queries, K)."""
    return torch.from_numpy(index.search(embeddings[:queries].numpy(), max(KS))[1])


def recall(indices: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute R@K from faiss's neighbours, for a comparison of results; the query may be the last of them."""
    hits = (labels[indices] == labels[: len(indices), None]) & (indices != torch.arange(len(indices))[:, None])
    return {f"recall@{k}": float(hits[:, : k + 1].any(1).double().mean()) for k in KS if k < max(KS)}


def resident(kind: str) -> int:
    """Give the resident memory of this process in bytes: `VmRSS`, that of now, or `VmHWM`, the largest so far.

    It is read from Linux's /proc: `ru_maxrss` of a new process begins with the peak of the process that started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{kind}:")).split()[1])


def memory(kind: str, args: argparse.Namespace) -> int:
    """Measure the peak above embeddings and libraries, in bytes, in this process."""
    embeddings, labels = make(kind, args.count, args.width)
    measure_ours(embeddings[:50], labels[:50], 50)  # loads what is loaded at the first use
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets VmHWM back to VmRSS (man 5 proc)
    measure_ours(embeddings, labels, args.queries)
    return resident("VmHWM") - before


def in_a_process(kind: str, args: argparse.Namespace) -> int:
    """Measure memory in a process of its own, whose peak nothing earlier has raised."""
    settings = [f"--{key}={getattr(args, key)}" for key in ("count", "width", "queries", "threads")]
    command = [sys.executable, __file__, "--alone", kind, *settings]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one kind of embeddings: seconds of both, memory of ours, and the figures."""
    import faiss

    faiss.omp_set_num_threads(args.threads)
    embeddings, labels = make(kind, args.count, args.width)
    index = faiss.IndexFlatIP(args.width)
    index.add(embeddings.numpy())
    found: dict[str, Any] = {}
    processor: dict[str, list[float]] = {"ours": [], "faiss": []}

    def ours() -> None:
        began = time.process_time()
        found["figures"] = measure_ours(embeddings, labels, args.queries)
        processor["ours"].append(time.process_time() - began)

    def theirs() -> None:
        began = time.process_time()
        found["indices"] = search_faiss(index, embeddings, args.queries)
        processor["faiss"].append(time.process_time() - began)

    seconds = alternate({"ours": ours, "faiss": theirs}, args.rounds, warmup=0)
    middle = {name: statistics.median(values) for name, values in processor.items()}
    differences = [abs(value - found["figures"][key]) for key, value in recall(found["indices"], labels).items()]
    return {
        "kind": kind,
        "seconds": seconds,
        "ratio": seconds["ours"]["median"] / seconds["faiss"]["median"],
        "processor_seconds": middle,
        "processor_ratio": middle["ours"] / middle["faiss"],
        "peak_bytes": in_a_process(kind, args),
        "figures": found["figures"],
        "largest_difference": max(differences),
    }


def verdict(row: dict[str, Any]) -> str:
    """Say whether the bars are met."""
    fast = "within" if row["ratio"] <= TIME_BAR else "BAR MISSED: above"
    small = "within" if row["peak_bytes"] <= MEMORY_BAR else "BAR MISSED: above"
    return (
        f"{row['kind']}: {row['ratio']:.2f} times faiss, {fast} {TIME_BAR} (processor time "
        f"{row['processor_ratio']:.2f}); {row['peak_bytes'] / 2**30:.2f} GiB, {small} {MEMORY_BAR / 2**30:.2f} GiB"
    )


def table_lines() -> Iterator[str]:
    """Make the section of docs/metric_learning.md from the results."""
    found = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    asked = f"{found['queries']:,} queries in {found['count']:,} x {found['width']}"
    yield (
        f"| {asked}, {found['machine']['threads']} threads, median of {found['rounds']} | seconds | faiss, seconds | "
        f"ratio (bar {TIME_BAR}) | of processor seconds | "
        f"peak above embeddings, GiB (bar {MEMORY_BAR / 2**30:.2f}) |"
    )
    yield "|---|--:|--:|--:|--:|--:|"
    for row in found["rows"]:
        ours, theirs = (row["seconds"][name]["median"] for name in ("ours", "faiss"))
        cells = (ours, theirs, row["ratio"], row["processor_ratio"], row["peak_bytes"] / 2**30)
        yield " | ".join([f"| {row['kind']}", *(f"{cell:.2f}" for cell in cells)]) + " |"
    yield ""
    yield (
        f"Measured with a load of {found['load']:.1f} on {found['processors']} processors, ours and faiss in turns. "
        "All figures: [benchmarks/results/retrieval.json](../benchmarks/results/retrieval.json)."
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=COUNT, help="number of queries; default: %(default)s")
    parser.add_argument("--count", type=int, default=COUNT, help="number of embeddings; default: %(default)s")
    parser.add_argument("--width", type=int, default=WIDTH, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--alone", choices=KINDS, help="measure memory in this process; write nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    args.queries = min(args.queries, args.count)
    torch.set_num_threads(args.threads)
    if args.table:
        write_section(NAME, table_lines(), page="metric_learning")
        return
    if args.alone:
        print(memory(args.alone, args))
        return
    rows = []
    for kind in args.kinds:
        rows.append(measure(kind, args))
        print(verdict(rows[-1]), flush=True)
        settings = {"count": args.count, "width": args.width, "queries": args.queries, "rounds": args.rounds}
        state = {"load": os.getloadavg()[0], "processors": os.cpu_count()}
        write(NAME, {**settings, **state, "rows": rows})


if __name__ == "__main__":
    main()
