"""A method added from outside the package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.core.method import PlanItem
from vispeft.core.units import AffineUnit

VIT = Cell("ssf", "vit")


class Offset(AffineUnit):
    """A shift alone, with a scale fixed at one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(width), persistent=False)
        self.shift = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        self.shift.zero_()


@vispeft.register
@dataclass(frozen=True, kw_only=True)
class ToyOffset(vispeft.Method):
    """The whole of a new method."""

    name: ClassVar[str] = "toy_offset"
    default_roles: ClassVar[tuple[str, ...]] = ("norm1", "attn.proj")

    def items(self, view, model):
        for site in self.sites(view):
            yield PlanItem(site, "offset", partial(Offset, site.out_features))

    def parameter_count(self, view):
        return sum(site.out_features for site in self.sites(view))


def test_a_method_from_outside_does_everything(tmp_path: Path) -> None:
    assert "toy_offset" in vispeft.list_methods()
    model, images = VIT.model(), VIT.images()
    wanted = model(images)
    bank = vispeft.attach(model, vispeft.method("toy_offset"))
    assert torch.allclose(model(images), wanted, atol=1e-6)
    assert bank.report().trainable == ToyOffset().parameter_count(bank.view) == 2 * 2 * 24
    move(bank, "default")
    adapted = model(images)
    bank.save(tmp_path)
    again = VIT.model()
    vispeft.load(again, tmp_path)
    assert torch.equal(again(images), adapted)
    bank.merge()
    assert torch.allclose(model(images), adapted, atol=1e-5)
