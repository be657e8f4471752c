"""The method that docs/add_a_method.md adds passes the conformance grid, as a package outside vispeft would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vispeft
from tests.conformance import test_grid as grid
from tests.conformance.cells import BACKBONES, Cell
from tests.docs.test_docs import ROOT, blocks, compiled
from vispeft.core.method import Method
from vispeft.errors import SiteError

MAIN = [
    pytest.param(name, marks=[] if name in ("vit", "swin") else [pytest.mark.slow])
    for name, backbone in BACKBONES.items()
    if backbone.grid
]


@pytest.fixture
def made(namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Method:
    """The configuration of the page's first block, in the grid's table of methods."""
    page = ROOT / "docs/add_a_method.md"
    exec(compiled(next(block for block in blocks(page) if block.language == "python"), page), namespace)
    method: Method = namespace["InputScale"](group=2)
    monkeypatch.setitem(grid.METHODS, "input_scale", method)
    return method


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("backbone", MAIN)
def test_the_example_passes_the_grid(backbone: str, tmp_path: Path) -> None:
    cell = Cell("input_scale", backbone)
    grid.test_identity_at_start(cell)
    grid.test_attach_and_detach_leave_no_trace(cell)
    grid.test_exactly_the_intended_tensors_train(cell)
    grid.test_merge_and_unmerge(cell)
    grid.test_two_adapters_switch_stack_and_go(cell)
    grid.test_equal_gradients_under_checkpointing(cell)
    grid.test_reduced_precision(cell)
    grid.test_other_image_sizes(cell, tmp_path / "sizes")
    grid.test_intermediates_agree_with_features(cell)
    checks = grid.TestReadOnly()
    with grid.adapt(cell) as adapted:
        checks.test_count_equals_the_closed_formula(adapted)
        checks.test_disabled_equals_the_base(adapted)
        checks.test_save_and_load_under_another_name(adapted, tmp_path)
        checks.test_copies_are_independent(adapted)


def test_the_example_refuses_a_group_that_does_not_divide(made: Method) -> None:
    with pytest.raises(SiteError, match="24 input channels"):
        vispeft.attach(Cell("input_scale", "vit").model(), type(made)(group=5))
