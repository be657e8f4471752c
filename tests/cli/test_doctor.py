import contextlib
import io
import os

import pytest

from tests.data.faults import ERRORS, NAMES, WARNINGS, plant
from tests.data.published import (
    Painter,
    make_ade20k,
    make_cityscapes,
    make_context,
    make_fgvc,
    make_voc,
    make_vtab_task,
)
from tests.data.published_tasks import make_nyud_mt, make_pascal_mt
from tests.tiny import CONFIG
from vispeft.cli import doctor
from vispeft.cli.common import console, run_tool


def call(*argv):
    """Run the doctor in this process: status, what it printed, what it complained about."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run_tool(doctor.main, [str(argument) for argument in argv])
        except SystemExit as left:
            status = left.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def photos(tmp_path):
    painter = Painter()
    for name in "ab":
        for number in range(10):
            painter.paint(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_one_page_shows_every_planted_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 400)
    root = plant(tmp_path)
    status, page, _ = call(root, "--root", root / "images", "--names", str(NAMES))
    assert status == 1
    for code, place in {**ERRORS, **WARNINGS}.items():
        line = next(line for line in page.splitlines() if f" {code} " in line)
        assert place in line
    assert f"cannot be used as they are: {len(ERRORS)} errors, {len(WARNINGS)} warnings" in page


def test_good_data_leave_with_zero(photos):
    status, page, _ = call(photos)
    assert status == 0
    assert "can be used: 0 errors, 0 warnings" in page
    train = next(line for line in page.splitlines() if line.strip().startswith("train"))
    assert train.split() == ["train", "12", "2", "6", "6", "6x5", "RGB", "12"]


def test_published_sets_are_recognised(tmp_path):
    make_vtab_task(tmp_path, "kitti", Painter())
    status, page, _ = call(tmp_path / "kitti")
    assert status == 0
    assert "VTAB-1k kitti has 711 test images as published, and here are 4" in page
    status, page, _ = call(tmp_path / "kitti", "--protocol", "tune")
    assert "VTAB-1k kitti has 800 train images" in page
    make_fgvc(tmp_path, "flowers", Painter())
    status, page, _ = call(tmp_path / "flowers")
    assert status == 0
    assert "Oxford Flowers has 6,149 test images as published" in page
    (tmp_path / "flowers").rename(tmp_path / "mine")
    status, page, _ = call(tmp_path / "mine", "--kind", "fgvc", "--dataset", "flowers")
    assert "Oxford Flowers" in page
    assert "Did you mean 'data.dataset'" in call(tmp_path / "mine", "--kind", "fgvc", "--datset", "flowers")[2]


def test_a_config_s_data_are_checked(photos, tmp_path):
    config = tmp_path / "mine.yaml"
    model = CONFIG.split("data:")[0]
    config.write_text(f"{model}data:\n  class_path: vispeft.data.ImageFolderData\n  init_args:\n    root: {photos}\n")
    assert call(config)[0] == 0
    (photos / "a/0.png").write_bytes(b"")
    status, page, _ = call(config)
    assert status == 1
    assert "empty-file" in page
    assert "a/0.png" in page
    config.write_text(CONFIG)
    assert "makes its own images" in call(config)[2]
    status, _, complaint = call(config, "--kind", "folder")
    assert status == 2
    assert "determines the kind itself" in complaint


def test_what_cannot_be_listed_is_said_without_a_page(tmp_path):
    status, page, _ = call(tmp_path / "none")
    assert status == 1
    assert "none' is not there. Give a folder" in page
    (tmp_path / "notes.txt").write_text("")
    status, page, _ = call(tmp_path / "notes.txt")
    assert status == 1
    assert "No image is listed" in page
    status, _, complaint = call(tmp_path, "--kind", "zip")
    assert status == 2
    assert "invalid choice" in complaint
    assert "needs a value" in call(tmp_path, "--check")[2]


def test_lists_with_other_endings_are_read(photos, tmp_path):
    lines = [f"photos/{name}/{number}.png,{name}" for name in "ab" for number in range(10)]
    (tmp_path / "train.csv").write_text("\n".join(["path,label", *lines]))
    for place in (tmp_path / "train.csv", tmp_path):
        status, page, _ = call(place)
        assert status == 0
        assert "can be used: 0 errors, 1 warning." in page
        assert "list-header" in page
    (tmp_path / "valid.csv").write_text(lines[0])
    (tmp_path / "val.tsv").write_text(lines[0])
    status, page, _ = call(tmp_path)
    assert status == 1
    assert "has val.tsv and valid.csv, which all stand for the validation split" in page
    for name in ("train", "test"):  # a table beside class folders
        (photos / name / "a").mkdir(parents=True)
    (photos / "train.csv").touch()
    assert "class folders" in call(photos)[1].lower()


def test_options_tell_what_kind_of_data_it_is(tmp_path):
    painter = Painter()
    for number in range(8):
        painter.paint(tmp_path / f"all/{number}.jpg")
        painter.label(tmp_path / f"all/{number}_mask.png", [0, 1])
    layout = ("--images", "all", "--masks", "all", "--mask_suffix", "_mask.png")
    status, page, _ = call(tmp_path, "--class_names", "[a, b]", *layout)
    assert status == 0
    assert "pixels in train" in page
    make_fgvc(tmp_path, "flowers", painter)
    (tmp_path / "flowers").rename(tmp_path / "mine")
    assert "Oxford Flowers" in call(tmp_path / "mine", "--dataset", "flowers")[1]
    assert "Unknown key 'data.class_nmes'" in call(tmp_path, "--class_nmes", "[a, b]")[2]


def test_names_that_are_no_text_are_refused_and_can_be_shown(photos):
    (photos / "a").rename(photos.parent / "kept")
    os.rename(photos.parent / "kept", os.path.join(os.fsencode(photos), b"caf\xe9"))
    with open(os.path.join(os.fsencode(photos), b"b", b"caf\xe9.txt"), "wb"):
        pass
    status, page, _ = call(photos)
    assert status == 1
    assert "class-name" in page
    assert "rename them: caf\\xe9." in page
    assert "b/caf\\xe9.txt" in page


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as left:
        doctor.main(["--help"])
    assert left.value.code == 0
    assert "vispeft doctor my_photos" in capsys.readouterr().out


def test_every_task_has_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 200)
    status, page, _ = call(make_nyud_mt(tmp_path / "NYUD_MT", Painter()).parent)  # found by its folder
    assert status == 0, page
    assert "NYUD-v2 has 795 train images as published, and here are 3" in page
    lines = {words[0]: words for line in page.splitlines() if len(words := line.split()) > 5}
    assert lines["semseg"][1:2] == ["classes"]
    assert "40 of 40 classes" in page
    assert lines["depth"][1:5] == ["depth", "90.0%", "90.0%", "90.0%"]
    status, page, _ = call(make_pascal_mt(tmp_path / "p", Painter()), "--tasks", "[human_parts, sal]")
    assert status == 0, page
    assert "PASCAL-Context has 4,998 train images as published, and here are 4" in page
    assert "75.0%, 1 image without" in page
    assert " are 1" in next(line for line in page.splitlines() if line.split()[:1] == ["sal"])


def test_masks_are_checked_and_published_sets_recognised(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 200)
    for make, title, count in (
        (make_voc, "PASCAL VOC 2012", 1_464),
        (make_context, "PASCAL-Context", 4_998),
        (make_ade20k, "ADE20K", 20_210),
        (make_cityscapes, "Cityscapes", 2_975),
    ):
        status, page, _ = call(make(tmp_path / title, Painter()))
        assert status == 0, page
        assert f"{title} has {count:,} train images as published" in page
        assert "pixels in train" in page
    painter, root = Painter(), tmp_path / "mine"
    for split, value in (("train", 1), ("val", 1), ("test", 2)):
        for number in range(2):
            painter.paint(root / f"images/{split}/{number}.jpg")
            painter.label(root / f"masks/{split}/{number}.png", [0, 0, 0, value, 255])
    status, page, _ = call(root, "--class_names", "[road, house]")
    assert status == 1
    line = next(line for line in page.splitlines() if " mask-values " in line)
    assert "2 (2 files)" in line
    assert "masks/test/0.png" in line
    status, page, _ = call(root, "--class_names", "[road, house, tree]")
    assert status == 0
    assert "unseen-in-test" in page
