"""`vispeft report`: one file without code and without requests, and one clear error for what it cannot show."""

import base64
import io
import json
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from vispeft.cli import report
from vispeft.errors import ConfigError, FileError
from vispeft.viz.page import Picture
from vispeft.zoo import find_adapter

FILES = ("adapter.json", "adapter.safetensors", "head.safetensors")
HOSTILE = "<script>alert('x')</script>\"'&\u202e{{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.text, self.attributes = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def check_alone(self):
        """It asks for nothing and runs nothing."""
        assert not {"script", "iframe", "object", "embed", "form", "base"} & set(self.tags)
        assert not [name for name in self.attributes if name.startswith("on")]
        assert self.addresses
        assert not [address for address in self.addresses if not address.startswith(("data:", "#"))]


@pytest.fixture
def other(finished, tmp_path):
    """Make a copy of the finished run, with changes to its files."""

    def make(name, metrics=None, header=None, config=None):
        place = tmp_path / name
        shutil.copytree(finished, place)
        log = place / "logs/csv/metrics.csv"
        log.write_text("epoch,step,train/accuracy,validation/accuracy\n0,1,0.5,0.25\n1,2,0.75,0.5\n")
        for file, change in (("metrics.json", metrics), ("adapter/adapter.json", header)):
            values = json.loads((place / file).read_text())
            if change is not None:
                change(values)
                (place / file).write_text(json.dumps(values))
        if config is not None:
            (place / "config.yaml").write_text(config((place / "config.yaml").read_text()))
        return place

    return make


def test_a_run_is_one_page(finished, run_cli, tmp_path):
    result = run_cli("report", finished, "--out", tmp_path / "page.html")
    assert result.status == 0, result.err
    page = Page(tmp_path / "page.html")
    page.check_alone()
    metrics = json.loads((finished / "metrics.json").read_text())
    assert f"{metrics['test']['accuracy']:.4f}" in page.words
    assert metrics["command"] in page.words
    assert f"{sum(metrics['adapter_bytes'].values()):,}" in page.words
    assert "Confusion matrix of the test split" in page.words
    assert metrics["versions"]["torch"] in page.words
    kinds = [address.partition(";")[0] for address in page.addresses]
    assert kinds.count("data:image/png") == 2  # matrix and reliability
    assert kinds.count("data:image/svg+xml") > 2
    for address in page.addresses:
        if address.startswith("data:image/png"):
            Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).load()
    before = (tmp_path / "page.html").read_bytes()
    assert run_cli("report", finished, "--out", tmp_path / "page.html").status == 0  # an earlier report is replaced
    assert (tmp_path / "page.html").read_bytes() == before


def test_a_run_of_100_epochs_is_a_small_page(other, tmp_path):
    place = other("long")
    names = ["train/loss", "validation/loss", "validation/accuracy", *(f"validation/figure_{i}" for i in range(4))]
    rows = [",".join(["epoch", "step", *names])]
    rows += [",".join(map(str, [e, 9 * e, *(1 / (1 + e + i) for i in range(len(names)))])) for e in range(100)]
    (place / "logs/csv/metrics.csv").write_text("\n".join(rows))
    Image.effect_noise((800, 600), 90).convert("RGB").save(place / "plots/overlays_test.png")
    page = report.report(place, tmp_path / "page.html")
    assert page.stat().st_size < 3_000_000
    assert len(Page(page).addresses) > 8


def test_runs_are_compared(finished, other, run_cli, tmp_path):
    def better(metrics):
        metrics["test"]["accuracy"] = 0.9876
        metrics["parameters"]["trained"] = 12_345_678

    place = other("better", better)
    result = run_cli("report", finished, place, "--out", tmp_path / "page.html")
    assert result.status == 0, result.err
    page = Page(tmp_path / "page.html")
    page.check_alone()
    assert "2 runs" in page.words
    assert "12,345,678" in page.words
    assert "The largest figure of the test split is in bold" in page.words
    bold = (tmp_path / "page.html").read_text().split('<tr class="best">')[1].split("</tr>")[0]
    assert "0.9876" in bold
    assert "differs" not in page.words


def test_other_data_are_said(finished, other, tmp_path):
    place = other(
        "less", header=lambda header: header.update(class_names=["0", "1"]),
        config=lambda text: text.replace("batch_size: 256", "batch_size: 128\n    shots: 1"),
    )  # fmt: skip
    words = Page(report.report([finished, place], tmp_path / "page.html")).words
    assert f"data.shots differs: (not set) in {finished}; 1 in {place}." in words
    assert f"The runs have different classes: 10 outputs in {finished}; 2 outputs in {place}." in words
    assert "batch_size differs" not in words


def test_names_are_text_and_never_code(other, tmp_path):
    def change(metrics):
        metrics["test_accuracy_per_class"] = {HOSTILE: 0.5}
        metrics["versions"][HOSTILE] = HOSTILE
        metrics["test"][HOSTILE] = metrics["validation"][HOSTILE] = 0.25
        metrics["adapter_bytes"][HOSTILE] = 3

    def header(values):
        values["class_names"] = [HOSTILE] * 10
        values["method"]["fields"][HOSTILE] = HOSTILE
        values["method"]["name"] = values["backbone"]["name"] = HOSTILE

    places = [
        other(name, change, header, lambda text: f"# vispeft train {HOSTILE}\n{text}") for name in ("a <b>", "c</td>")
    ]
    (places[0] / "logs/csv/metrics.csv").write_text(
        f'epoch,step,"validation/{HOSTILE.replace(chr(34), "")}",validation/accuracy\n0,1,2.0,1.0\n'
    )
    page = Page(report.report(places, tmp_path / "page.html"))
    page.check_alone()
    assert "<script>alert('x')</script>\"'&\\u202e{{ 7 * 7 }}" in page.words
    assert page.words.count("a <b>") > 2
    assert "b" not in page.tags
    for address in page.addresses:
        if address.startswith("data:image/svg"):
            assert b"<script" not in base64.b64decode(address.partition(",")[2])


def test_an_adapter_of_the_zoo_has_its_name_and_not_its_folder(tmp_path):
    page = report.report(["zoo:digits_ssf", "zoo:digits_lora"], tmp_path / "page.html").read_text()
    assert "1. ssf, zoo:digits_ssf" in page
    assert str(find_adapter("zoo:digits_ssf").parent) not in page


def test_a_run_without_its_log_and_pictures_is_shown(other, tmp_path, caplog):
    place = other("bare")
    shutil.rmtree(place / "logs")
    (place / "plots/reliability.png").write_bytes(b"\x89PNG broken")
    (place / "plots/confusion_matrix.png").unlink()
    words = Page(report.report(place, tmp_path / "page.html")).words
    assert "There is no log beside its figures, as in the zoo." in words
    assert "There are no pictures of its test split." in words
    assert "reliability.png could not be read" in caplog.text


def test_a_run_of_an_earlier_version_is_shown(other, tmp_path):
    place = other("early", lambda metrics: [metrics.pop(key) for key in ("parameters", "adapter_bytes", "versions")])
    words = Page(report.report(place, tmp_path / "page.html")).words
    assert "trained parameters unknown" in words
    stored = sum((place / "adapter" / name).stat().st_size for name in FILES)
    assert f"bytes of the adapter's files {stored:,}" in words


def test_what_cannot_be_shown_is_refused(finished, other, run_cli, tmp_path):
    out = tmp_path / "page.html"

    def refused(*arguments):
        result = run_cli("report", *arguments, "--out", out)
        assert result.status == 2
        assert not out.exists()
        return result.err

    stopped = other("stopped")
    shutil.rmtree(stopped / "adapter")
    error = refused(stopped)
    assert "stopped is no finished run: adapter/adapter.json is missing" in error
    assert f"vispeft train --resume {stopped} goes on, and --finish {stopped} takes its best epoch" in error
    (tmp_path / "empty").mkdir()
    assert "empty is no finished run: config.yaml, metrics.json, adapter/adapter.json is missing" in refused(
        tmp_path / "empty"
    )
    assert "There is no run directory" in refused(tmp_path / "none")
    assert "was given twice" in refused(finished, finished)
    task = other("task", config=lambda text: text.replace("tasks.Classification", "tasks.MultiLabel"))
    error = refused(finished, task)
    assert f"2 different tasks (Classification: {finished}; MultiLabel: {task})" in error
    broken = other("broken", lambda metrics: metrics.update(test=[]))
    assert "Its entry 'test' is" in refused(finished, broken)


def test_other_files_are_not_overwritten(finished, tmp_path):
    page = tmp_path / "notes.html"
    page.write_text("my notes")
    with pytest.raises(ConfigError, match="is no report, and is not overwritten"):
        report.report(finished, page)
    assert page.read_text() == "my notes"
    with pytest.raises(ConfigError, match="a folder; give a file"):
        report.report(finished, tmp_path)
    with pytest.raises(FileError, match="could not be made"):
        report.report(finished, page / "inside" / "page.html")


def test_wide_pictures_stay_legible_on_a_narrow_screen():
    widths = {700: 640, 1152: 922, 2000: 1000}
    assert {width: Picture(source="", title="", width=width).narrowest for width in widths} == widths
