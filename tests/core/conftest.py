"""The small ViT that most tests of the core use, plain and with a saved adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.conformance.cells import Cell

VIT = Cell("ssf", "vit")


@pytest.fixture
def model() -> nn.Module:
    return VIT.model()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    VIT.attach(VIT.model()).save(tmp_path / "adapter")
    return tmp_path / "adapter"
