"""Report and demo in Chromium: no other host is asked, no error is logged, and nothing is wider than a phone."""

import os
import shutil
import socket
from urllib.parse import urlsplit

import pytest
from PIL import Image

from vispeft.cli import report

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright (extra dev) is not installed")
WIDTHS = (1280, 390)
LOCAL = ("localhost", "127.0.0.1", "")


@pytest.fixture(scope="module")
def browser():
    """Chromium from the system; playwright's own would be fetched from a server."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("VISPEFT_NEEDS_CHROMIUM") == "1":
            pytest.fail("Chromium is missing, although apt could have installed it.")
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


class Watched:
    """A page in which every host but this machine is blocked."""

    def __init__(self, browser, width):
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.outside, self.errors = [], []
        self.page.route("**/*", self._pass)
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _pass(self, route):
        if urlsplit(route.request.url).hostname in (*LOCAL, None):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def check(self):
        assert self.outside == []
        assert self.errors == []
        wider = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wider <= 0, f"the page is {wider} pixels wider than the window"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report(browser, finished, tmp_path, width):
    copy = tmp_path / ("a long folder name without a place to break it " * 3).replace(" ", "_")
    shutil.copytree(finished, copy)
    page = report.report([finished, copy], tmp_path / "page.html")
    watched = Watched(browser, width)
    watched.page.goto(page.as_uri())
    broken = "[...document.images].filter(i => !i.naturalWidth || (i.complete === false)).length"
    assert watched.page.evaluate(broken) == 0
    assert watched.page.locator("img").count() > 8
    for details in watched.page.locator("details").all():
        details.evaluate("node => node.open = true")
    small = (
        "[...document.querySelectorAll('p, td, dd, pre')].filter(n => parseFloat(getComputedStyle(n).fontSize) < 12)"
    )
    assert watched.page.evaluate(f"{small}.length") == 0
    watched.check()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_demo(browser, finished, tmp_path, width):
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from vispeft.cli.demo import serve
    from vispeft.cli.demo_models import load_models

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Image.effect_noise((48, 40), 60).convert("RGB").save(tmp_path / "image.png")
    served = serve(load_models([str(finished)]), "127.0.0.1", port, wait=False)
    try:
        watched = Watched(browser, width)
        watched.page.goto(f"http://127.0.0.1:{port}")
        watched.page.wait_for_selector("input[type=file]", state="attached", timeout=90_000)
        watched.page.set_input_files("input[type=file]", tmp_path / "image.png")
        watched.page.get_by_text("probabilities").wait_for(timeout=90_000)
        watched.page.get_by_text("where the last block looks").wait_for(timeout=90_000)
        watched.check()
    finally:
        served.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_demo_of_tasks_with_pictures(browser, tmp_path, width):
    """Maps of several tasks and neighbours with long names: nothing is cut off, and nothing is wider than a phone."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from vispeft.cli.demo import serve
    from vispeft.cli.demo_models import load_models

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for number in range(6):
        folder = tmp_path / "gallery" / f"a label of many words {number}"
        folder.mkdir(parents=True)
        Image.effect_noise((48, 40), 60).convert("RGB").save(folder / "image.png")
    models = load_models(["zoo:scenes_mtlora", "zoo:emoji_lora"], str(tmp_path / "gallery"))
    served = serve(models, "127.0.0.1", port, wait=False)
    try:
        watched = Watched(browser, width)
        watched.page.goto(f"http://127.0.0.1:{port}")
        watched.page.wait_for_selector("input[type=file]", state="attached", timeout=90_000)
        watched.page.set_input_files("input[type=file]", next((tmp_path / "gallery").rglob("*.png")))
        watched.page.get_by_text("normals").first.wait_for(timeout=90_000)
        watched.check()
        watched.page.get_by_label("adapter").first.click()
        watched.page.get_by_role("option", name="zoo:emoji_lora", exact=True).click()
        watched.page.get_by_text("a label of many words 5").first.wait_for(timeout=90_000)
        cut = "[...document.querySelectorAll('.caption-label')].filter(n => n.scrollWidth > n.clientWidth).length"
        assert watched.page.evaluate(cut) == 0
        watched.check()
    finally:
        served.close()
