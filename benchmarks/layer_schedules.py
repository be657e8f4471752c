"""Count what a training step keeps while a schedule leaves the adapters of some blocks out.

    python benchmarks/layer_schedules.py

For each method: bytes of activations kept for the backward pass by the step of an ordinary training and, averaged over
draws, by steps of `SampledLayers` with its released share of the blocks; and bytes of optimiser state after one step.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import vispeft  # noqa: E402, I001 - before timm
import timm  # noqa: E402
import torch  # noqa: E402
from common import saved_bytes, write  # noqa: E402
from vispeft.tasks import SampledLayers  # noqa: E402
from vispeft.tasks.layer_schedules import layers_of  # noqa: E402

MODEL = "vit_tiny_patch16_224"
"""192 wide, 12 blocks."""
BATCH, DRAWS = 2, 8
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
METHODS = {
    "lora": vispeft.LoRA(rank=8, roles=LINEARS),
    "adapter_plus": vispeft.AdapterPlus(),
}


def measure(method: vispeft.Method) -> dict[str, Any]:
    """Measure one method."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL)
    bank = vispeft.attach(model, method, verify=False)
    model.train()
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    schedule = SampledLayers()
    schedule.layers = layers_of(bank, "SampledLayers")
    count = max(1, int(schedule.share * len(schedule.layers)))
    whole = step(model, bank, images)
    kept, lowest = [], []
    for draw in range(DRAWS):
        chosen = schedule.drawn(draw, count, torch.zeros(len(schedule.layers)))
        for index, (tensors, _) in enumerate(schedule.layers):
            for tensor in tensors:
                tensor.requires_grad_(index in chosen)
        kept.append(step(model, bank, images))
        lowest.append(chosen[0])
    shares = [part["activations"] / whole["activations"] for part in kept]
    return {
        "blocks": count,
        "whole": whole,
        "activations": {"mean": statistics.mean(shares), "least": min(shares), "most": max(shares)},
        "state": statistics.mean(part["state"] / whole["state"] for part in kept),
        "lowest": lowest,
        "shares": shares,
    }


def step(model: torch.nn.Module, bank: Any, images: torch.Tensor) -> dict[str, int]:
    """Count the bytes that a step keeps for its backward pass, and those of the optimiser's state behind it."""
    kept = saved_bytes(model, images)
    optimizer = torch.optim.AdamW(bank.parameter_groups(1e-4, 0.0))
    model.zero_grad(set_to_none=True)
    model(images).square().mean().backward()
    optimizer.step()
    state = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t))
    return {"activations": kept, "state": state}


def main() -> None:
    """Measure all methods and write the results."""
    methods = {}
    for name, method in METHODS.items():
        methods[name] = measure(method)
        print(name, methods[name]["activations"], methods[name]["state"], flush=True)
    write("layer_schedules", {"model": MODEL, "batch": BATCH, "draws": DRAWS, "methods": methods})


if __name__ == "__main__":
    main()
