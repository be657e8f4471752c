"""LST: ladder side-tuning (Sung et al., NeurIPS 2022, arXiv 2206.06522).

The authors published it for language models only; the form for vision transformers is this project's, derived from
their code.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast

import torch
from timm.layers import LayerNorm
from timm.models._manipulate import checkpoint
from timm.models.swin_transformer import PatchMerging
from torch import Generator, Tensor, nn

from vispeft.backbones.pruning import prune
from vispeft.core.families import family_of
from vispeft.core.fields import check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.model_units import SideUnit
from vispeft.core.recipes import Recipe
from vispeft.core.sites import View, select
from vispeft.errors import ConfigError, SiteError
from vispeft.hosts.functional import linear
from vispeft.hosts.running import ENTRY, Rung, RunningHost

__all__ = ["LST", "Ladder"]

TEMPERATURE = 0.1
"""Divisor of the gates before the sigmoid; public code."""
SPREAD = 0.01
"""Initial standard deviation of the linear layers between the two widths; public code."""
BLOCK_SPREAD = 0.02
"""Initial standard deviation inside randomly initialised blocks; timm."""
TABLE = "relative_position_bias_table"
"""timm's name for the position bias of Swin's attention."""


class Ladder(SideUnit):
    """A narrow side network that reads the outputs of the backbone's blocks, one rung per block.

    With ``h`` the output of a block: ``s <- g s + (1 - g) (W h + b)`` with ``g = sigmoid(gate / 0.1)``, then the
    network's own block acts on ``s``. Initially ``s`` is a projection of the input of the backbone's first block; after
    the last rung it is normalised and projected back to the backbone's width.
    """

    def __init__(self, rungs: Sequence[Rung], blocks: Mapping[int, nn.Module], options: LST) -> None:
        """Allocate the network.

        Args:
            rungs: Its size at every block of the backbone.
            blocks: Its own blocks, keyed by the index of the backbone block they read.
            options: The method.
        """
        super().__init__()
        self.depth, self.reads = len(rungs), frozenset(blocks)
        self.detach_hidden = options.detach_hidden
        entry, last = rungs[0], rungs[-1]
        ends = [(below, above) for below, above in pairwise(rungs) if below.stage != above.stage]
        norm = partial(LayerNorm, eps=1e-5 if ends else 1e-6)  # as timm's Swin and ViT
        self.first = nn.Linear(entry.wide, entry.width)
        self.down = nn.ModuleDict({str(r.block): nn.Linear(r.wide, r.width) for r in rungs if r.block in blocks})
        self.gates = nn.ParameterDict({str(index): nn.Parameter(torch.empty(1)) for index in blocks})
        self.blocks = nn.ModuleDict({str(index): block for index, block in blocks.items()})
        self.merging = nn.ModuleDict({str(a.block): PatchMerging(b.width, a.width) for b, a in ends})
        levels = [below for below, _ in ends] if options.levels else []
        self.levels = nn.ModuleDict(
            {str(r.stage): nn.Sequential(norm(r.width), nn.Linear(r.width, r.wide)) for r in levels}
        )
        self.norm = norm(last.width)
        self.up = nn.Linear(last.width, last.wide)
        names = [name for name, _ in self.named_parameters()]
        self.no_decay = frozenset(name for name in names if name.endswith(TABLE))
        # The levels get a gradient only if intermediate features are requested.
        self.zero_gradient = frozenset(name for name in names if name.startswith("levels."))

    def reset(self, generator: Generator) -> None:
        """Initialise blocks and the layers between the widths, and set every gate to one half."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, 0.0, BLOCK_SPREAD, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif hasattr(module, TABLE):
                nn.init.trunc_normal_(getattr(module, TABLE), 0.0, BLOCK_SPREAD, generator=generator)
        levels = [level[1] for level in cast(Any, self.levels).values()]
        for layer in [self.first, *cast(Any, self.down).values(), *levels, self.up]:
            layer.weight.normal_(0.0, SPREAD, generator=generator)
        for gate in self.gates.values():
            gate.zero_()

    def climb(self, hidden: Mapping[int, Tensor], depth: int, checkpoints: bool) -> list[Tensor]:
        """Run the network and return its state (B, N, d) or (B, H, W, d) after each block of the backbone."""
        dtype = self.norm.weight.dtype
        state = linear(hidden[ENTRY], self.first.weight, self.first.bias).to(dtype)
        states = []
        for index in range(depth):
            if str(index) in self.merging:
                state = self.merging[str(index)](state)
            if index in self.reads:
                state = self._mix(state, hidden[index], str(index))
                block = self.blocks[str(index)]
                state = checkpoint(block, state) if checkpoints else block(state)
            states.append(state)
        return states

    def _mix(self, state: Tensor, hidden: Tensor, rung: str) -> Tensor:
        down = cast(nn.Linear, self.down[rung])
        taken = linear(hidden, down.weight, down.bias).to(state.dtype)
        return torch.lerp(taken, state, torch.sigmoid(self.gates[rung] / TEMPERATURE).to(state.dtype))

    def project_out(self, state: Tensor) -> Tensor:
        """Normalise a state of the last stage and project it to the backbone's width."""
        out: Tensor = self.up(self.norm(state))
        return out

    def stage_map(self, stage: int, state: Tensor) -> Tensor | None:
        """Project the state after an earlier stage to the backbone's width; None unless `LST.levels` is set."""
        key = str(stage)
        return self.levels[key](state) if key in self.levels else None

    def resize_with(self, blocks: Sequence[nn.Module]) -> None:
        """Copy input size and windows from Swin's blocks after a change of image size."""
        for index, block in cast(Any, self.blocks).items():
            base: Any = blocks[int(index)]
            block.set_input_size(base.input_resolution, base.window_size, base.always_partition)


@register
@dataclass(frozen=True, kw_only=True)
class LST(Method):
    """A narrow side network that reads the blocks of a backbone run without gradients, which saves memory.

    Its blocks are those of the backbone's family (pre-norm, biases, GELU, no layer scale) with the width divided by
    `reduction` and as many heads as the backbone, or the largest smaller number that divides the width. Its output is
    pooled like the backbone's and goes to the classifier without the backbone's last norm. On Swin it has its own
    windows, position bias tables and patch merging. On Eva its blocks use no rotary embedding: their input already
    carries positions.

    Intermediate features are those of the side network. On a ViT or Eva every level passes the last norm and the last
    projection. On Swin the maps of earlier stages are the frozen backbone's unless `levels` is set.
    """

    reduction: int = 8
    """Divisor of the backbone's width."""
    start: Literal["magnitude", "random"] = "magnitude"
    """Initialisation of its blocks: ``magnitude`` (pruned from the backbone by weight magnitude) or ``random``."""
    per_head: bool = True
    """Prune every head by the same fraction; if False, heads mix, as in most of the public code."""
    levels: bool = False
    """Train a norm and a projection after every stage but the last, for dense tasks on Swin."""
    detach_hidden: bool = True
    """Run the backbone without gradients; if False, adapters inside the backbone can train together with this one."""

    name: ClassVar[str] = "lst"
    paper: ClassVar[str] = "https://arxiv.org/abs/2206.06522"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=3e-3,
            weight_decay=0.03,
            fields={"reduction": 8},
            source="language, and images with text: AdamW 3e-3, weight decay 0.03 (ylsung/Ladder-Side-Tuning 1798e82)",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("tokens",)
    cacheable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "reduction")
        if self.roles not in (None, ("tokens",)):
            raise ConfigError(
                "LST runs beside the whole model; leave roles out, and choose the blocks it reads by blocks=[...]."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put the whole network at the model's tokens, as one unit."""
        host = family_of(model).host
        if not (issubclass(host, RunningHost) and host.takes_side):
            what = f"{view.family} wrapped for its features" if view.aliases else view.family
            raise SiteError(
                f"LST has no stated form for {what}. It stands beside blocks that normalise first (ViT, Eva, Swin), in "
                "a whole model; for maps take forward_intermediates of that. Elsewhere use AdaptFormer, LoRA or SSF."
            )
        rungs = self.rungs(view)
        paths = {cast(int, site.block): site.path for site in select(view, ("block",), self.blocks)}
        start = partial(_pruned, view, model, rungs, set(paths), self.per_head) if self.start == "magnitude" else None
        for site in view.at("tokens"):
            yield PlanItem(site, "lst", partial(_build, model, host, rungs, paths, self), start=start)

    def rungs(self, view: View) -> tuple[Rung, ...]:
        """Compute the network's size at every block of a backbone.

        Args:
            view: The backbone's description.

        Raises:
            ConfigError: If the network would have fewer than two channels: the norm of one channel is always zero.
        """
        if min(view.widths) // self.reduction < 2:
            raise ConfigError(
                f"LST(reduction={self.reduction}) leaves {min(view.widths) // self.reduction} of {min(view.widths)} "
                f"channels, and a norm needs two. Use at most reduction={min(view.widths) // 2} on this model."
            )
        hidden = {site.block: site.in_features for site in view.at("mlp.fc2")}
        stage_of = {block: stage for stage, blocks in enumerate(view.stages) for block in blocks}
        rungs = []
        for block, (wide, heads) in enumerate(zip(view.widths, view.heads, strict=True)):
            width = wide // self.reduction
            fitting = next(number for number in range(min(heads, width), 0, -1) if width % number == 0)
            rungs.append(Rung(block, stage_of[block], wide, width, fitting, hidden[block] * width // wide))
        return tuple(rungs)

    def parameter_count(self, view: View) -> int:
        """Count, on a ViT with an MLP ratio of 4: ``(1+|S|)(Dd+d) + |S|(12d^2+13d) + |S| + 2d + dD + D``."""
        rungs = self.rungs(view)
        chosen = {site.block for site in select(view, ("block",), self.blocks)}
        entry, last = rungs[0], rungs[-1]
        count = entry.wide * entry.width + entry.width
        for rung in (rung for rung in rungs if rung.block in chosen):
            d, inner = rung.width, rung.hidden
            block = 4 * d + 4 * d * d + 4 * d + 2 * d * inner + inner + d
            count += rung.wide * d + d + 1 + block + _table_entries(view, rung)
        for below, above in pairwise(rungs):
            if below.stage != above.stage:
                count += 8 * below.width + 4 * below.width * above.width
                count += 2 * below.width + below.width * below.wide + below.wide if self.levels else 0
        return count + 2 * last.width + last.width * last.wide + last.wide

    def frozen_outputs(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Compute the outputs of the blocks that are read, and the input of the first block."""
        host = cast(RunningHost, model)
        unit = host.side()
        assert unit is not None
        hidden = host.read_hidden(unit, images, frozenset(), unit.depth)
        return {f"block{index}": tensor for index, tensor in hidden.items()}

    def from_outputs(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> Tensor:
        """Run the network and the classifier on the result of `frozen_outputs`."""
        host: Any = model
        unit = host.side()
        hidden = {int(name.removeprefix("block")): tensor for name, tensor in outputs.items()}
        return cast(Tensor, host.forward_head(host.features_beside(unit, hidden)))

    def frozen_fields(self) -> dict[str, Any]:
        """Return the blocks that are read."""
        return {"blocks": self.blocks}


def _table_entries(view: View, rung: Rung) -> int:
    """Count the relative position bias of a block of the network, which has one row per relative position."""
    owner = next((site.path for site in view.at("rel_pos") if site.block == rung.block), None)
    whole = 0 if owner is None else view.tensors[owner][TABLE]
    return whole // view.heads[rung.block] * rung.heads


def _build(
    model: nn.Module,
    host: type[RunningHost],
    rungs: Sequence[Rung],
    paths: Mapping[int, str],
    options: LST,
) -> Ladder:
    blocks = {r.block: host.side_block(model.get_submodule(paths[r.block]), r) for r in rungs if r.block in paths}
    return Ladder(rungs, blocks, options)


def _pruned(
    view: View, model: nn.Module, rungs: Sequence[Rung], chosen: Container[int], per_head: bool
) -> dict[str, Tensor]:
    """Prune initial values of blocks and norms; the walk also passes blocks that are not read."""
    found = prune(view, model, rungs, per_head)
    return {n: value for n, value in found.items() if not n.startswith("blocks.") or int(n.split(".")[1]) in chosen}
