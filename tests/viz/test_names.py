"""Names of classes in pictures, tables and on the terminal: brackets, dollars, other scripts, any length."""

import io
import logging
import warnings
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from matplotlib.text import Text

from vispeft.cli.common import PlainConsole, run_tool
from vispeft.cli.evaluation import class_table
from vispeft.errors import ConfigError, printable_lines
from vispeft.viz import bars, confusion_matrix, names, overlay_grid, predicted_against_true
from vispeft.viz.names import drawn_names, settings_for

ODD = ["[red]x", "[/b]", "$a_1$", "a$", "", "x" * 300, "_under", "a\nb\x1b[2J", "\ud800", "é", "猫", "ねこ"]


@pytest.fixture(autouse=True)
def _fresh():
    names._say_lost.cache_clear()


def test_names_without_letters_in_any_font_are_numbers_and_that_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(names, "_fonts", lambda letters: ((), frozenset("猫ねこ") & letters))
    with caplog.at_level(logging.WARNING, logger="vispeft"):
        assert drawn_names(["cat", "猫", "a ねこ"]) == ["cat", "#1", "#2"]
        drawn_names(["cat", "猫", "a ねこ"])
    assert len(caplog.records) == 1
    assert "letters of 猫, a ねこ, so pictures show 2 names as a number" in caplog.text


def test_fonts_that_have_the_letters_are_added(monkeypatch):
    held = {"plain.ttf": frozenset("abc"), "cjk.ttf": frozenset("猫"), "boxes.ttf": frozenset("abc猫ね")}
    fonts = [
        matplotlib.font_manager.FontEntry(fname=file, name=name)
        for file, name in (("plain.ttf", "Plain"), ("cjk.ttf", "Some CJK"), ("boxes.ttf", "Last Resort"))
    ]
    monkeypatch.setattr(names, "_has", lambda file: held.get(file, frozenset("abc")))
    monkeypatch.setattr(names, "fontManager", SimpleNamespace(ttflist=fonts))
    names._fonts.cache_clear()
    try:
        assert settings_for(["abc", "猫"])["font.family"][-1] == "Some CJK"
        assert names._fonts(frozenset("猫ね")) == (("Some CJK",), frozenset("ね"))
    finally:
        names._fonts.cache_clear()


def test_short_forms():
    shown = drawn_names([*ODD[:10]])
    assert shown[:4] == ["[red]x", "[/b]", "$a_1$", "a$"]
    assert shown[4] == "(empty)"
    assert len(shown[5]) == 36
    assert shown[6:] == [" _under", "a\\nb\\x1b[2J", "\\ud800", "é"]


def test_pictures_of_odd_names_need_no_warning(tmp_path, monkeypatch):
    drawn = []
    seen = Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, *a, **k: (drawn.append(self.get_text()), seen(self, *a, **k))[1])
    count = len(ODD)
    figures = {name: None if index % 3 == 0 else index / count for index, name in enumerate(ODD)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_matrix(torch.eye(count) * torch.arange(count)[:, None], ODD, tmp_path / "a.png")
        bars(figures, {name: figures[name] for name in ODD[:5]}, tmp_path / "b.png", label="IoU", mark_label="share")
        predicted_against_true(torch.rand(4, count), torch.rand(4, count), ODD, tmp_path / "c.png")
        image, mask = torch.zeros(3, 12, 12, dtype=torch.uint8), torch.arange(144).reshape(12, 12) % count
        overlay_grid([image], [mask], [mask], None, ODD, tmp_path / "d.png")
    assert {"$a_1$", "[/b]", " _under", "(empty)", "not measured"} <= set(drawn)


def test_pictures_of_values_that_are_not_finite(tmp_path):
    nan = float("nan")
    path = predicted_against_true(torch.tensor([[nan], [1.0]]), torch.ones(2, 1), ["a"], tmp_path / "a.png")
    other = predicted_against_true(torch.tensor([[1.0]]), torch.ones(1, 1), ["a"], tmp_path / "b.png")
    assert path.read_bytes() == other.read_bytes()
    assert bars({"a": None}, {}, tmp_path / "c.png", label="IoU", mark_label="share").is_file()


def test_tables_and_lines_hold_names_as_they_are():
    console = PlainConsole()
    console.file, console.width = io.StringIO(), 100
    console.print(class_table({"test_accuracy_per_class": dict.fromkeys(ODD, 0.5) | {"none": None}}))
    console.print("runs/exp[/b] :smile: [red]x", soft_wrap=True)
    text = console.file.getvalue()
    for wanted in ("[red]x", "[/b]", "$a_1$", "\\x1b[2J", "\\ud800", "猫", "runs/exp[/b] :smile: [red]x"):
        assert wanted in text
    assert "\x1b[2J" not in text
    assert text.count("0.5000") == len(ODD)


def test_messages_reach_any_terminal(monkeypatch):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii")

    def fail(argv):
        raise ConfigError("class 猫\x1b[2J is not known")

    monkeypatch.setattr("sys.stderr", terminal)
    assert run_tool(fail, []) == 2
    terminal.flush()
    assert written.getvalue() == b"error: class \\u732b\\x1b[2J is not known\n"
    assert printable_lines("a\tb\nc é 猫 \u202e") == "a\tb\nc é 猫 \\u202e"
