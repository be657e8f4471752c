"""What SSF, AdaptFormer and VQT cost in the host's time at least: timm's modules with only their operations added.

    python benchmarks/host_floor.py
    python benchmarks/host_floor.py --busy          # on a machine that does other work
    python benchmarks/host_floor.py --table         # writes the table in docs/benchmarks.md

The network and the step of benchmarks/host_time.py, under autocast. Rows without vispeft have the fewest operations of
PyTorch that were found, no choice among adapters and no checks. Writes results/host_floor.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import vispeft  # noqa: F401  (first: it makes torchvision importable where its library does not fit)

import torch  # isort: skip
import torch.nn.functional as F
from common import RESULTS, alternate, write, write_section
from host_time import BARS, FLOOR, Step, base, network, ratio
from timm.models.vision_transformer import Block
from torch import Tensor, nn

MIDDLE, SCALE, DROPOUT = 64, 0.1, 0.1
"""The defaults of `vispeft.AdaptFormer`."""


class ScaledLinear(nn.Linear):
    """A linear layer of SSF: product, scale and shift in float32, cast."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., out) from (..., in)."""
        y = F.linear(x, self.weight, self.bias)
        return torch.addcmul(self.shift, y.float(), self.scale).to(y.dtype)


class ScaledNorm(nn.LayerNorm):
    """A norm of SSF, with scale and shift in its weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shape of `x`."""
        bias = torch.addcmul(self.shift, self.scale, self.bias)
        return F.layer_norm(x, self.normalized_shape, self.scale * self.weight, bias, self.eps)


class Beside(Block):
    """A block with AdaptFormer's bottleneck beside its MLP."""

    def forward(self, x: Tensor, *args: Any, **arguments: Any) -> Tensor:
        """Compute the shape of `x`."""
        x = x + self.attn(self.norm1(x))
        hidden = F.dropout(F.relu(F.linear(x, self.down, self.down_bias)), DROPOUT)
        return x + self.mlp(self.norm2(x)) + F.linear(hidden, self.up, self.up_bias) * SCALE


class Bottleneck(torch.autograd.Function):
    """AdaptFormer's bottleneck as one node written by hand: six products, two sums, and the casts autocast makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
        """Compute the term, (..., width)."""
        kind = torch.bfloat16
        rows, down, up = x.reshape(-1, x.shape[-1]).to(kind), down.to(kind), up.to(kind)
        hidden = torch.addmm(down_bias.to(kind), rows, down.t()).relu_()
        hidden.mul_(torch.empty_like(hidden).bernoulli_(1 - DROPOUT))
        ctx.save_for_backward(rows, down, up, hidden)
        factor = SCALE / (1 - DROPOUT)
        return torch.addmm(up_bias.to(kind), hidden, up.t(), beta=SCALE, alpha=factor).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Compute all gradients."""
        rows, down, up, hidden = ctx.saved_tensors
        slopes = grad.reshape(rows.shape) * SCALE
        # What was dropped and what was not positive is zero in either case.
        back = torch.ops.aten.threshold_backward(torch.mm(slopes, up), hidden, 0).div_(1 - DROPOUT)
        of_up = torch.mm(slopes.t(), hidden).div_(1 - DROPOUT).float()
        of_down, of_x = torch.mm(back.t(), rows).float(), torch.mm(back, down).float().view(grad.shape)
        return of_x, of_down, back.sum(0, dtype=torch.float32), of_up, slopes.sum(0, dtype=torch.float32)


class BesideInOne(Beside):
    """The same block with `Bottleneck`."""

    def forward(self, x: Tensor, *args: Any, **arguments: Any) -> Tensor:
        """Compute the shape of `x`."""
        x = x + self.attn(self.norm1(x))
        term = IN_ONE(x, self.down, self.down_bias, self.up, self.up_bias)
        return x + self.mlp(self.norm2(x)) + term


IN_ONE = super(torch.autograd.Function, Bottleneck).apply


class Queries(nn.Module):
    """VQT with one query per block: the trunk without gradients, and each query through its block's frozen layers."""

    def __init__(self) -> None:
        """Make the network, the queries, and a classifier of all their outputs."""
        super().__init__()
        self.trunk = base().requires_grad_(False)
        depth, width = len(self.trunk.blocks), self.trunk.embed_dim
        self.queries = nn.ParameterList(torch.randn(1, 1, width) for _ in range(depth))
        self.classifier = nn.Linear(depth * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores (B, classes)."""
        trunk, rows = self.trunk, []
        with torch.no_grad():
            x = trunk._pos_embed(trunk.patch_embed(images))
        for block, query in zip(trunk.blocks, self.queries, strict=True):
            attn, width = block.attn, x.shape[-1]
            with torch.no_grad():
                q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
                x = x + attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
                x = x + block.mlp(block.norm2(x))
            asked = F.linear(block.norm1(query), attn.qkv.weight[:width], attn.qkv.bias[:width])
            asked = asked.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            row = query + attn.proj(F.scaled_dot_product_attention(asked, k, v).transpose(1, 2).flatten(2))
            rows.append((row + block.mlp(block.norm2(row))).flatten(1))
        return self.classifier(torch.cat(rows, 1))


def ssf() -> nn.Module:
    """Make the network with SSF's operations in every block."""
    model = base().requires_grad_(False)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            width = len(module.weight)
            module.scale, module.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
            module.__class__ = ScaledLinear if isinstance(module, nn.Linear) else ScaledNorm
    return model


def adaptformer(kind: type[Block]) -> nn.Module:
    """Make the network with AdaptFormer's operations in every block."""
    model = base().requires_grad_(False)
    for block in model.blocks:
        width = model.embed_dim
        block.down, block.up = nn.Parameter(torch.randn(MIDDLE, width)), nn.Parameter(torch.zeros(width, MIDDLE))
        block.down_bias, block.up_bias = nn.Parameter(torch.zeros(MIDDLE)), nn.Parameter(torch.zeros(width))
        block.__class__ = kind
    return model


NAME = "host_floor"
ROWS = {"ssf": ("ssf",), "adaptformer": ("adaptformer", "adaptformer in one node"), "vqt": ("vqt",)}
"""The rows with nothing but operations, by method."""


def table_lines() -> Iterator[str]:
    """Make the section of docs/benchmarks.md from the results."""
    record = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    seconds, clock = record["seconds"], "CPU time" if record["arguments"]["busy"] else "time on the wall"
    yield f"| operations alone, autocast ({clock}) | of the floor | vispeft in the same run | bar |"
    yield "|---|--:|--:|--:|"
    for method, names in ROWS.items():
        for name in names:
            alone, ours = (ratio(seconds, row, FLOOR) for row in (name, f"vispeft's {method}"))
            yield f"| {name} | {alone:.2f} | {ours:.2f} | {BARS['autocast'][method, FLOOR]:.1f} |"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="counted steps of each row")
    parser.add_argument("--busy", action="store_true", help="count the seconds this process computes")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    if args.table:
        write_section(NAME, table_lines())
        return
    torch.set_num_threads(1)
    clock: Callable[[], float] = time.process_time if args.busy else time.perf_counter
    made = {"ssf": ssf(), "adaptformer": adaptformer(Beside), "adaptformer in one node": adaptformer(BesideInOne)}
    made["vqt"] = Queries()
    models = {FLOOR: network(FLOOR), **{name: model.train() for name, model in made.items()}}
    models |= {f"vispeft's {name}": network(name) for name in ("ssf", "adaptformer", "vqt")}
    seconds = alternate({name: Step(model, True) for name, model in models.items()}, args.rounds, 3, clock)
    for name in models:
        print(f"{name}: {ratio(seconds, name, FLOOR):.2f} of the floor")
    print(f"written to {write(NAME, {'arguments': vars(args), 'seconds': seconds}).name}")


if __name__ == "__main__":
    main()
