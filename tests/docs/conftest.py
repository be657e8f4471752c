"""Fixtures of the tests of the documentation."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import vispeft
from vispeft.core import method
from vispeft.storage import codecs


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Names of a module for the code of a page. Methods and codecs that it registers are forgotten afterwards."""
    vispeft.list_methods()  # fills the registry
    monkeypatch.setattr(method, "_METHODS", dict(method._METHODS))
    monkeypatch.setattr(codecs, "_CODECS", dict(codecs._CODECS))
    module = ModuleType("page_of_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their annotations up there
    return module.__dict__
