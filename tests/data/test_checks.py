import json
import logging
import os
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image

from tests.data.faults import ERRORS, NAMES, WARNINGS, plant
from tests.data.published import Painter
from vispeft.data import ImageFolderData, ImageListData, JsonData, Preprocessing
from vispeft.data import facts as facts_module
from vispeft.errors import DataError

BACKBONE = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("planted"))


def open_planted(root, **settings):
    return ImageListData(
        train_list=str(root / "train.txt"),
        validation_list=str(root / "val.txt"),
        test_list=str(root / "test.txt"),
        root=str(root / "images"),
        names=NAMES,
        **settings,
    )


def ready(data):
    data.fit_to(BACKBONE)
    data.setup()
    return data


def folder(root, **counts):
    painter = Painter()
    for name, count in counts.items():
        for number in range(count):
            painter.paint(root / name.replace("__", "/") / f"{number}.png")
    return root


def codes(data):
    return {finding.code: finding for finding in data.report().findings}


def test_every_planted_fault_is_found_in_one_run_and_nothing_else(planted):
    report = open_planted(planted).report()
    for level, expected in (("error", ERRORS), ("warning", WARNINGS)):
        found = {finding.code: finding.line(99) for finding in report.of(level)}
        assert set(found) == set(expected)
        for code, place in expected.items():
            assert place in found[code], (code, found[code])
    assert len(ERRORS) + len(WARNINGS) >= 15


def test_training_is_refused_with_all_of_them_in_one_message(planted):
    with pytest.raises(DataError) as refused:
        _ = open_planted(planted).num_classes  # asked for before the backbone is made
    message = str(refused.value)
    assert "cannot be used as they are; 12 errors" in message
    for place in (*ERRORS.values(), *WARNINGS.values()):
        assert place in message


def test_headers_alone_show_what_they_can(planted):
    found = codes(open_planted(planted, check="fast"))
    assert {"missing-file", "empty-file", "broken-image", "same-file-in-two-splits", "cmyk"} <= set(found)
    assert not {"truncated-image", "splits-overlap", "duplicates"} & set(found)
    assert found["headers-only"].level == "fact"


def test_good_data_have_no_errors(tmp_path):
    root = folder(tmp_path, train__a=3, train__b=3, val__a=1, val__b=1, test__a=1, test__b=1)
    data = ready(ImageFolderData(root=str(root)))
    assert not data.report().of("error") + data.report().of("warning")
    assert len(data.split("train")) == 6


def test_warnings_are_logged_and_training_goes_on(tmp_path, caplog, monkeypatch):
    root = folder(tmp_path, a=30, b=2)
    (root / "a/notes.txt").write_text("mine")
    monkeypatch.setattr(logging.getLogger("vispeft"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vispeft"):
        ready(ImageFolderData(root=str(root), validation=0.3, test=0.3))
    assert "1 .txt" in caplog.text


def test_folders_without_images_and_stray_files_are_found(tmp_path):
    root = folder(tmp_path, train__a=3, train__b=3, test__a=2, test__b=1)
    (root / "train/c").mkdir()
    (root / "train/a/list.csv").touch()
    Painter().paint(root / "train/lost.png")
    found = codes(ImageFolderData(root=str(root), validation=0.3))
    assert "train/c" in found["folder-without-images"].line()
    assert found["folder-without-images"].level == "error"
    assert "(1 .csv: train/a/list.csv)" in found["left-out"].line()
    assert "1 image outside of the folders that are read (train/lost.png)" in found["left-out"].line()
    assert found["left-out"].level == "warning"


def test_one_class_is_refused_before_a_backbone_is_made(tmp_path):
    root = folder(tmp_path, a=9)
    with pytest.raises(DataError, match=r"one class only; two are needed: a\."):
        _ = ImageFolderData(root=str(root)).num_classes


@pytest.mark.parametrize("name", ["caf\udce9", "\ud800", " ", ""])
def test_class_names_that_cannot_be_saved_are_refused(tmp_path, name):
    root = folder(tmp_path, a=5)
    labels = {f"a/{number}.png": name if number % 2 else "b" for number in range(5)}
    (root / "a.json").write_text(json.dumps(labels))
    data = JsonData(train_list=str(root / "a.json"), names=["b", name] if not name.strip() else None)
    assert codes(data)["class-name"].level == "error"
    with pytest.raises(DataError, match="class"):
        data.accept()


def test_class_names_that_look_alike_are_a_warning(tmp_path):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    root = folder(tmp_path, **dict.fromkeys(("Cat", "cat", "dog", composed, apart), 9))
    found = codes(ImageFolderData(root=str(root)))["names-alike"]
    assert found.level == "warning"
    assert sorted(found.places) == ["Cat = cat", f"{apart} = {composed}"]


def test_classes_that_a_split_lacks_are_named(tmp_path):
    root = folder(tmp_path, a=20, b=20, rare=1)
    found = codes(ImageFolderData(root=str(root)))
    for split in ("validation", "test"):
        assert found[f"absent-in-{split}"].level == "warning"
        assert found[f"absent-in-{split}"].places == ("rare",)
        assert "another split_seed" in found[f"absent-in-{split}"].text
    given = folder(tmp_path / "given", train__a=3, train__b=3, val__a=1, val__b=1, test__a=2)
    found = codes(ImageFolderData(root=str(given)))
    assert found["absent-in-test"].level == "fact"
    assert (
        found["absent-in-test"].line() == "Classes that do not occur in test, about which its figures say nothing: b."
    )


def test_a_link_that_leads_nowhere_is_a_missing_file(tmp_path):
    root = folder(tmp_path, a=9, b=9)
    (root / "a/x.png").symlink_to(root / "gone.png")
    assert "a/x.png" in codes(ImageFolderData(root=str(root)))["missing-file"].line()


def test_images_without_any_label_are_refused(tmp_path):
    root = folder(tmp_path, a=9)
    (root / "list.txt").write_text("".join(f"a/{number}.png -\n" for number in range(9)))
    for names in (None, ["red", "big"]):
        data = ImageListData(train_list=str(root / "list.txt"), target="multilabel", names=names)
        with pytest.raises(DataError, match="No image has a label, so there is nothing to learn"):
            ready(data)
    with pytest.raises(DataError, match="No image has a label"):
        _ = ImageListData(train_list=str(root / "list.txt"), target="multilabel").class_names


def test_classes_that_train_lacks_are_refused(tmp_path):
    root = folder(tmp_path, train__a=3, train__b=3, val__a=1, val__b=1, test__a=1, test__c=2)
    with pytest.raises(DataError, match=r"test has classes that train lacks.*: c\."):
        ready(ImageFolderData(root=str(root)))


def test_images_of_one_kind_are_a_fact_and_turned_copies_are_others(tmp_path):
    root = folder(tmp_path, train__a=2, train__b=2, val__a=1, val__b=1, test__a=1, test__b=1)
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    first = Image.open(root / "train/a/0.png")
    first.save(root / "train/a/turned.png", exif=exif)
    found = codes(ImageFolderData(root=str(root)))
    assert "duplicates" not in found
    assert (found["grayscale"].level, found["grayscale"].places) == ("fact", ())
    first.save(root / "train/a/equal.bmp")
    assert "train/a/equal.bmp" in codes(ImageFolderData(root=str(root)))["duplicates"].line()


def test_an_image_broken_after_the_check_is_named(tmp_path):
    root = folder(tmp_path, train__a=3, train__b=3, val__a=1, val__b=1, test__a=1, test__b=1)
    data = ready(ImageFolderData(root=str(root)))
    (root / "test/b/0.png").write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"test/b/0\.png cannot be read"):
        list(data.test_dataloader())


def test_float_images_are_refused_and_sixteen_bits_scaled(tmp_path):
    root = folder(tmp_path, train__a=2, train__b=2, val__a=1, val__b=1, test__a=1, test__b=1)
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(root / "train/a/f.tif")
    Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16)).save(root / "train/b/d.png")
    found = codes(ImageFolderData(root=str(root)))
    assert "f.tif (its floating-point numbers (mode F) have no known range" in found["unsupported-image"].line()
    data = ImageFolderData(root=str(root))
    deep = next(i for i, path in enumerate(data.listing.splits["train"].source.paths) if path.endswith("d.png"))
    assert data.listing.splits["train"].source.read(deep).unique().tolist() == [0x80]


def test_unchanged_images_are_not_looked_at_again(tmp_path, monkeypatch):
    root = folder(tmp_path, train__a=3, train__b=3, val__a=1, val__b=1, test__a=1, test__b=1)
    old = time.time() - 60
    for path in root.rglob("*.png"):
        os.utime(path, (old, old))
    looked = []
    real = facts_module.look_at
    monkeypatch.setattr("vispeft.data.sources.look_at", lambda *given: looked.append(1) or real(*given))
    first = ImageFolderData(root=str(root)).report()
    assert len(looked) == 10
    again = ImageFolderData(root=str(root)).report()
    assert len(looked) == 10
    assert again.facts == first.facts
    # Another content under the old size and time is another file only if the time says so.
    Painter(seed=5).paint(root / "train/a/0.png")
    os.utime(root / "train/a/0.png", (old + 1, old + 1))
    changed = ImageFolderData(root=str(root)).report()
    assert len(looked) == 11
    assert changed.facts["train"][0].digest != first.facts["train"][0].digest


def test_a_damaged_store_only_costs_time(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPEFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    facts_module.FactStore(facts_module.ImageFacts).file.write_bytes(b"no database at all" * 100)
    root = folder(tmp_path / "data", train__a=3, train__b=3)
    assert not ImageFolderData(root=str(root), validation=0.3, test=0.3).report().of("error")
    monkeypatch.setenv("VISPEFT_CACHE", "/proc/no/such/place")
    assert not ImageFolderData(root=str(root), validation=0.3, test=0.3).report().of("error")
