"""The documentation as a site: no warning, nothing from outside, and short ways to what one seeks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_browser import WIDTHS, Watched, browser  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("mkdocs", reason="the extra docs is not installed")


class Site(HTMLParser):
    """What a page loads, and its links with their text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loads = tag in ("script", "img", "iframe", "source") or (tag == "link" and given.get("rel") != "canonical")
        address = given.get("src") or (given.get("href") if tag == "link" else None)
        if loads and address:
            self.loaded.append(address)
        if tag == "a" and given.get("href"):
            self._open.append(str(given["href"]))
            self.links.append((self._open[-1], ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self.links:
            address, text = self.links[-1]
            self.links[-1] = (address, text + data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in strict mode."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # Material's word on a later MkDocs
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return place


@pytest.mark.slow
def test_it_asks_for_nothing_outside(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        for address in Site(page).loaded:
            assert not address.startswith(("http:", "https:", "//")), f"{page.relative_to(site)} loads {address}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert "url(http" not in text.replace('"', "")
        assert "@import" not in text


@pytest.mark.slow
def test_own_tiles_with_dinov3_and_lora_are_two_clicks_away(site: Path) -> None:
    """One from the start page, in fact, and the page names the config."""
    links = [address for address, text in Site(site / "index.html").links if "DINOv3" in text and "LoRA" in text]
    assert "recipes/tiles_and_masks.html" in links
    assert "segmentation/folder" in (site / "recipes/tiles_and_masks.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_the_front_page_in_a_browser(site: Path, browser: Any, width: int) -> None:  # noqa: F811 - the fixture
    """Opened from the folder, as the command leaves it: no error, and nothing else is asked for."""
    watched = Watched(browser, width)
    watched.page.goto((site / "index.html").as_uri())
    watched.page.wait_for_load_state("networkidle")
    figure = watched.page.locator("img.wide")
    figure.scroll_into_view_if_needed()
    assert figure.bounding_box()["width"] >= 550, "its words would be too small to read"
    watched.check()


@pytest.mark.slow
def test_the_search_of_the_site_that_is_served(site: Path, browser: Any) -> None:  # noqa: F811 - the fixture
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        watched = Watched(browser, max(WIDTHS))
        watched.page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        watched.page.locator("input.md-search__input").fill("DINOv3")
        watched.page.locator(".md-search-result__item").first.wait_for(timeout=60_000)
        watched.check()
        server.shutdown()


@pytest.mark.slow
def test_files_of_the_repository_have_pages(site: Path) -> None:
    page = site / "repository/configs/method/ssf.yaml.html"
    assert "vispeft.SSF" in page.read_text(encoding="utf-8")
    assert (site / "repository/model_zoo/backbones/vit_tiny/CARD.html").is_file()
