"""Fixtures of the tests of `create_model`."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.backbones.small import tiny


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The weights of the small ViT in a safetensors file."""
    save_file(tiny().state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"
