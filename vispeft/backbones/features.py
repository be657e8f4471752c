"""The view of timm's ``features_only`` models of Swin: the same stages under other paths, without a classifier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

from timm.models._features import FeatureListNet
from torch import Tensor, nn

from vispeft.backbones.swin import NOT_IN_SWIN, SWIN, Generation, stage_sites, swin_stem_sites
from vispeft.backbones.swinv2 import SWINV2
from vispeft.core.families import Family, base_class, parameter_sizes, register_family
from vispeft.core.sites import View
from vispeft.errors import BackboneError
from vispeft.hosts.model import UNITS
from vispeft.hosts.stages import StageModelHost

__all__ = ["describe_features"]


def describe_features(model: nn.Module) -> View:
    """Describe a `FeatureListNet` with the stages of a Swin.

    Sites have their paths in this model and their names in the full model, so that adapters can be moved between the
    two.

    Args:
        model: The model.

    Returns:
        Its view.

    Raises:
        BackboneError: If it has other parts.
    """
    children = dict(model.named_children())
    names = [name for name in children if name.startswith("layers_")]
    stages = [children[name] for name in names]
    generation = _generation(stages)
    patch_embed = cast(Any, children["patch_embed"])
    aliases = {name: name.replace("_", ".") for name in names}
    here = {there: name for name, there in aliases.items()}
    sites = []
    for site in [*swin_stem_sites(patch_embed), *stage_sites(stages, generation)]:
        first = ".".join(site.path.split(".")[:2])
        path = site.path.replace(first, here[first], 1) if first in here else site.path
        consumers = tuple(reader.replace(first, here[first], 1) for reader in site.consumers)
        owner = None if site.owner is None else site.owner.replace(first, here[first], 1)
        sites.append(replace(site, path=path, alias=site.path, consumers=consumers, owner=owner))
    blocks = [site for site in sites if site.role == "block"]
    return View(
        family=generation.family,
        model_class=generation.model_class.__name__,
        sites=tuple(sites),
        widths=tuple(block.out_features for block in blocks),
        stages=tuple(tuple(cast(int, b.block) for b in blocks if b.stage == stage) for stage in range(len(stages))),
        heads=tuple(block.attn.num_heads for layer in stages for block in cast(Any, layer).blocks),
        num_prefix_tokens=0,
        layout="NHWC",
        head_path=None,
        tensors=parameter_sizes(model, None),
        drop_path_paths=tuple((f"{b.path}.drop_path1", f"{b.path}.drop_path2") for b in blocks),
        size_bound=generation.size_bound,
        input_bound=("patch_embed.proj.weight",),
        aliases=aliases,
        patch_size=patch_embed.patch_size,
        img_size=patch_embed.img_size,
        in_chans=patch_embed.proj.in_channels,
        global_pool="",
        not_here={**NOT_IN_SWIN, "final_norm": "features_only leaves it out", "head": "features_only leaves it out"},
    )


def _generation(stages: list[nn.Module]) -> Generation:
    for generation in (SWIN, SWINV2):
        if stages and base_class(stages[0]) is generation.stage_class:
            return generation
    found = ", ".join(sorted({base_class(stage).__name__ for stage in stages})) or "no stages"
    raise BackboneError(f"Of features_only models, those of Swin and SwinV2 are supported; this one has {found}.")


class FeatureListHost(StageModelHost):
    """An adapted `FeatureListNet`. timm runs all of its children as layers, so `items` hides those of vispeft."""

    return_layers: dict[str, str]
    grad_checkpointing: bool
    global_pool = ""

    def stages(self) -> list[Any]:
        """Return timm's stages."""
        return [child for name, child in self.items() if name.startswith("layers_")]

    def checkpoints(self) -> bool:
        """Return whether activation checkpointing is on."""
        return self.grad_checkpointing or super().checkpoints()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the maps of the chosen stages."""
        if not self.runs_itself():
            self.check_size(x)
            return super().forward(x)
        names = [name for name, _ in self.items() if name.startswith("layers_")]
        levels = dict(zip(names, self.run(x).stages, strict=True))
        return [self.shown(levels[name]) for name in self.return_layers]

    def items(self) -> Iterable[tuple[str, nn.Module]]:
        """Iterate over timm's own children."""
        return [(name, child) for name, child in self._modules.items() if child is not None and name != UNITS]


register_family(
    Family(
        name="features",
        classes=(FeatureListNet,),
        describe=describe_features,
        host=FeatureListHost,
        examples="swin_* and swinv2_* with features_only=True",
    )
)
