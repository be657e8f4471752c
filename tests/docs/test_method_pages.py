"""The generated pages of methods say what the code says now."""

from __future__ import annotations

import sys

import pytest

from tests.docs.test_docs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import method_pages


@pytest.fixture(scope="module")
def made():
    return method_pages.pages()


def test_pages_are_up_to_date(made):
    found = {path.name: path.read_text(encoding="utf-8") for path in method_pages.PAGES.glob("*.md")}
    stale = sorted(name for name in made.keys() | found.keys() if made.get(name) != found.get(name))
    assert not stale, f"run python benchmarks/method_pages.py: {', '.join(stale)}"


def test_formulas_equal_what_is_built(made):
    for name in method_pages.names():
        for line in made[f"{name}.md"].splitlines():
            if line.startswith(("| ViT-B/16 | ", "| Swin-B | ")) and line.count("|") == 5 and "refused" not in line:
                _, formula, built, _ = (cell.strip() for cell in line.strip("|").split("|"))
                assert formula == built, f"{name}: {line}"
    assert "| ViT-B/16 | 239,712 | 239,712 |" in made["hydra.md"]
    assert "| ViT-B/16 | 2,376,492 | 2,376,492 |" in made["lst.md"]


def test_every_method_was_measured_and_has_published_results_of_known_sources(made):
    for name in method_pages.names():
        assert "Not measured yet" not in made[f"{name}.md"], f"run python benchmarks/method_pages.py --measure ({name})"
    published = method_pages.yaml.safe_load((method_pages.PAGES / "published.yaml").read_text(encoding="utf-8"))
    assert set(published["results"]) <= set(method_pages.names())
    assert {e["source"] for entries in published["results"].values() for e in entries} <= set(published["sources"])


def test_what_was_not_run_is_marked_so(monkeypatch, tmp_path):
    monkeypatch.setattr(method_pages, "RESULTS", tmp_path)
    assert list(method_pages.own("ssf")) == ["Not run yet."]
