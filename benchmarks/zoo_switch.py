"""Eight adapters on one backbone: the bytes that each costs, and the milliseconds of choosing another one.

    python benchmarks/zoo_switch.py

Writes results/zoo_switch.json. The adapters of the zoo for zoo:vit_tiny are held at once; where there are fewer than
eight, some are loaded twice. Bytes are those of all tensors in the process, each storage counted once, so that a hidden
copy of the backbone would show. Times are of `set_active`, of `using`, and, to compare, of predicting one image: the
median by the clock, and the largest by the processor, since other processes may stop this one at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from common import write
from torch import nn

import vispeft
from vispeft.zoo import list_zoo_adapters

BACKBONE, HELD = "zoo:vit_tiny", 8


def tensor_bytes() -> int:
    """Count the bytes of all tensors that the process holds, each storage once."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            with contextlib.suppress(RuntimeError):  # one of a compiler, which has no bytes
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def own_bytes(model: nn.Module, name: str) -> int:
    """Count the bytes of an adapter's units and of its classifier, with what they keep of their file.

    Args:
        model: The backbone that holds it.
        name: The adapter.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    held = [tensor.untyped_storage() for key, tensor in tensors if f".{name}." in f".{key}."]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def held_at_once(model: nn.Module, sources: Sequence[str]) -> tuple[Any, list[dict[str, Any]]]:
    """Load adapters on one backbone, and count what each costs.

    Args:
        model: The backbone.
        sources: What `vispeft.load` takes, one for each adapter.

    Returns:
        The bank, and for each adapter its source, its name, its own bytes, and by how many the process grew.
    """
    bank, rows = None, []
    for number, source in enumerate(sources, start=1):
        before = tensor_bytes()
        bank = vispeft.load(model, source, name=f"adapter{number}")
        grown = tensor_bytes() - before
        rows.append({"source": source, "own_bytes": own_bytes(model, f"adapter{number}"), "grown_bytes": grown})
    return bank, rows


def switches(bank: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Time choosing the next adapter, over and over.

    Args:
        bank: The bank.
        rounds: Choices that are timed.

    Returns:
        Milliseconds of `set_active` and of `using`: the median, and the largest of the processor.
    """

    def use(name: str) -> None:
        with bank.using(name):
            pass

    actions: dict[str, Callable[[str], Any]] = {"set_active": bank.set_active, "using": use}
    names, found = itertools.cycle(bank.names), {}
    for kind, action in actions.items():
        found[kind] = summary(milliseconds(action, next(names)) for _ in range(rounds))
    return found


def milliseconds(action: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Time one call, by the clock and by the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    action(*arguments)
    return 1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - processor)


def summary(times: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Return the median by the clock and the largest by the processor."""
    clock, processor = zip(*times, strict=True)
    return {"median": statistics.median(clock), "largest_of_the_processor": max(processor)}


@torch.inference_mode()
def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    given = parser.parse_args()
    known = [f"zoo:{name}" for name, found in list_zoo_adapters().items() if found.entry.backbone == BACKBONE]
    model = vispeft.create_model(BACKBONE).eval()
    backbone = sum(t.nbytes for t in model.state_dict().values())
    bank, rows = held_at_once(model, list(itertools.islice(itertools.cycle(known), HELD)))
    image = torch.zeros(1, 3, *model.patch_embed.img_size)
    times = switches(bank, given.rounds)
    times["predict one image"] = summary(milliseconds(model, image) for _ in range(5))
    write("zoo_switch", {"backbone_bytes": backbone, "adapters": rows, "milliseconds": times})
    print(*rows, times, sep="\n")


if __name__ == "__main__":
    main()
