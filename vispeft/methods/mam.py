"""MAM: mix-and-match adapter of a prefix and a scaled parallel bottleneck (He et al., ICLR 2022, arXiv 2110.04366)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import nn

from vispeft.core.fields import check_factor, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import View
from vispeft.errors import ConfigError
from vispeft.methods.adapter import Bottleneck, ParallelBottleneck
from vispeft.methods.prefix import check_network, prefix_count, prefix_items

__all__ = ["MAM"]


@register
@dataclass(frozen=True, kw_only=True)
class MAM(Method):
    """A short prefix in each attention and a scaled bottleneck parallel to each MLP.

    The bottleneck reads the residual stream before the MLP's norm, as in the authors' own pre-norm model, and starts at
    zero. The parts are those of `Prefix` and `Adapter`.
    """

    length: int = 16
    """Number of keys and values in each attention; 16 in the paper's GLUE runs, 30 in XSum."""
    bottleneck: int = 16
    """Hidden channels; 16 in the paper's GLUE runs, 512 in XSum."""
    scale: float = 2.0
    """Multiplier of the bottleneck; 2 in the paper's GLUE runs, 4 in XSum."""
    mid_dim: int | None = None
    """Hidden width of the MLP that generates keys and values during training; None for tables only."""
    prefix_dropout: float = 0.0
    """Fraction of the MLP's outputs dropped during training."""
    dropout: float = 0.0
    """Fraction of the bottleneck's hidden channels dropped during training."""
    reads: Literal["stream", "normed"] = "stream"
    """Input of the bottleneck: the residual stream, or the norm's output, as the paper's figure suggests."""

    name: ClassVar[str] = "mam"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.04366"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(length=16, bottleneck=16), FGVC.sized(length=16, bottleneck=16))
    default_roles: ClassVar[tuple[str, ...]] = ("attn.core", "mlp")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "length", "mid_dim", "bottleneck")
        check_share(self, "prefix_dropout", "dropout")
        check_factor(self, "scale")
        check_network(self, self.mid_dim, self.prefix_dropout)
        if self.roles not in (None, self.default_roles):
            raise ConfigError("MAM acts in the attention and beside the MLP; leave roles out. See Prefix and Adapter.")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put keys and values at each attention, and a bottleneck parallel to each MLP."""
        if self.reads == "normed":
            view.needs_norm_first("MAM(reads='normed')")
        sites = self.sites(view)
        attention = [site for site in sites if site.role == "attn.core"]
        yield from prefix_items(attention, view, self.length, self.mid_dim, self.prefix_dropout)
        for site in view.blocks_of(site for site in sites if site.role == "mlp"):
            shape = Bottleneck(width=site.out_features, middle=self.bottleneck, scale=self.scale, dropout=self.dropout)
            yield PlanItem(site, "adapter", partial(ParallelBottleneck, shape, "mlp", self.reads))

    def file_method(self) -> Method:
        """Return the method without the MLP: files hold its outputs, the tables."""
        return dataclasses.replace(self, mid_dim=None, prefix_dropout=0.0)

    def parameter_count(self, view: View) -> int:
        """Count the prefix, and ``2 m D + m + D`` per block."""
        sites = self.sites(view)
        attention = [site for site in sites if site.role == "attn.core"]
        widths = [site.out_features for site in sites if site.role == "mlp"]
        bottlenecks = sum((2 * self.bottleneck + 1) * width + self.bottleneck for width in widths)
        return prefix_count(attention, view, self.length, self.mid_dim) + bottlenecks
