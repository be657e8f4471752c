"""Which files of a folder tree are read, by every reader alike, and the line about those that are left out."""

import logging.handlers
import os

import pytest

from tests.data.published import Painter, make_ade20k, make_cityscapes
from tests.data.reading import names_of
from vispeft.data import ADE20KData, CityscapesData, ImageFolderData, MaskFolderData, find_images, trees
from vispeft.data.trees import LeftOut, open_regular
from vispeft.errors import DataError, counted

LITTER = ("._1.png", ".ipynb_checkpoints/1-checkpoint.png", ".thumbnails/1.png", "__MACOSX/1.png", "deep/.trash/1.png")
"""Copies of images that systems and editors leave beside them."""


def paint(root, *names):
    painter = Painter()
    for name in names:
        painter.paint(root / name)
    return root


def many(*folders, count=4):
    return [f"{folder}/{number}.png" for folder in folders for number in range(count)]


def litter(folder):
    """Put files beside the images of a folder that no reader may take."""
    content = next(folder.glob("*.png")).read_bytes()
    for name in LITTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7" if name.startswith("._") else content)


def read(reader, root):
    """List the images of a folder by one of the readers, relative to it, and the line about the others."""
    if reader == "predict":
        logger, handler = logging.getLogger("vispeft.data.images"), logging.handlers.BufferingHandler(9)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        found = sorted(str(path.relative_to(root)) for path in find_images(root))
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        return found, "".join(record.getMessage() for record in handler.buffer)
    if reader == "classes":
        listing = ImageFolderData(root=str(root)).read()
    else:
        listing = MaskFolderData(root=str(root), class_names=["a", "b"], images=".", masks="masks").read()
    line = next((finding.line() for finding in listing.findings if finding.code == "left-out"), "")
    return sorted(name for split in listing.splits.values() for name in names_of(split)), line


@pytest.fixture(params=["predict", "classes", "masks"])
def reader(request, tmp_path):
    (tmp_path / "photos").mkdir()
    if request.param == "masks":  # elsewhere, so that the folder has nothing but images
        (tmp_path / "elsewhere").mkdir()
        os.symlink(tmp_path / "elsewhere", tmp_path / "photos/masks")
    return request.param


def test_hidden_files_are_read_by_nobody(tmp_path, reader):
    root = paint(tmp_path / "photos", *many("cat", "dog"))
    litter(root / "cat")
    names, line = read(reader, root)
    assert names == sorted(many("cat", "dog"))
    assert "5 hidden entries (cat/._1.png, " in line


def test_links_to_folders_and_files_are_followed_by_all(tmp_path, reader):
    root = paint(tmp_path / "photos", *many("cat", "dog"))
    paint(tmp_path, *many("store/inner"), "single.png")
    os.symlink(tmp_path / "store", root / "dog/more")
    os.symlink(tmp_path / "store/inner", root / "linked")
    os.symlink(tmp_path / "single.png", root / "cat/single.png")
    expected = [*many("cat", "dog", "dog/more/inner", "linked"), "cat/single.png"]
    names, line = read(reader, root)
    if reader == "classes":  # each class is a tree of its own
        assert names == sorted(expected)
    else:
        assert names == sorted(set(expected) - set(many("dog/more/inner")))
        assert "1 link back, or to a folder that is read already (dog/more/inner)" in line


def test_links_that_lead_back_end(tmp_path, reader):
    root = paint(tmp_path / "photos", *many("cat", "dog"))
    for name, target in {"cat/self": "cat", "cat/up": ".", "dog/top": "..", "all": "."}.items():
        os.symlink(root / target, root / name)
    names, line = read(reader, root)
    assert names == sorted(many("cat", "dog"))
    assert "4 links back, or to a folder that is read already" in line
    for name in ("cat/self", "cat/up", "dog/top", "all"):
        assert name in line


def test_links_that_branch_at_every_step_are_read_once(tmp_path):
    for number in range(30):  # 2**30 paths lead to the last folder
        (tmp_path / f"photos/{number}").mkdir(parents=True)
        for link in ("a", "b"):
            os.symlink(tmp_path / f"photos/{number + 1}", tmp_path / f"photos/{number}/{link}")
    paint(tmp_path, "photos/30/1.png")
    assert [str(path.relative_to(tmp_path)) for path in find_images(tmp_path / "photos")] == ["photos/30/1.png"]
    assert len(find_images(tmp_path / "photos/0")) == 1


def test_other_endings_and_special_files_are_named(tmp_path, reader):
    root = paint(tmp_path / "photos", *many("cat", "dog"))
    for name in ("cat/b.jfif", "cat/c.avif", "cat/notes", "dog/d.jfif"):
        (root / name).write_bytes(b"x")
    os.mkfifo(root / "dog/pipe.png")
    names, line = read(reader, root)
    assert names == sorted(many("cat", "dog"))
    assert "4 files with another ending than .bmp, " in line
    assert "(2 .jfif, 1 .avif, 1 without ending: cat/b.jfif, cat/c.avif, cat/notes, dog/d.jfif)" in line
    assert "1 pipe or device (dog/pipe.png)" in line


def test_a_link_that_leads_nowhere_counts_as_an_image(tmp_path, reader):
    root = paint(tmp_path / "photos", *many("cat", "dog"))
    os.symlink(tmp_path / "gone.png", root / "cat/gone.png")
    os.symlink(root / "cat/round.png", root / "cat/round.png")
    names, _ = read(reader, root)
    assert {"cat/gone.png", "cat/round.png"} < set(names)


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, reader, monkeypatch):
    root = paint(tmp_path / "photos", *many("cat", "dog"), "dog/closed/1.png")
    scan = os.scandir

    def refuse(place):
        if str(place).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(place)

    monkeypatch.setattr(trees.os, "scandir", refuse)
    names, line = read(reader, root)
    assert names == sorted(many("cat", "dog"))
    assert "1 folder that cannot be opened (dog/closed)" in line


def test_predict_and_train_log_the_line(tmp_path, caplog, monkeypatch):
    root = paint(tmp_path / "photos", *many("cat", "dog", count=9))
    (root / "cat/b.jfif").touch()
    monkeypatch.setattr(logging.getLogger("vispeft"), "propagate", True)
    line = "Left out: 1 file with another ending than "
    with caplog.at_level(logging.INFO, logger="vispeft"):
        find_images(root)
    assert line in caplog.text
    caplog.clear()
    (root / "cat/b.jfif").rename(root / "cat/.b.png")
    with caplog.at_level(logging.INFO, logger="vispeft"):
        ImageFolderData(root=str(root)).accept()
    assert "Left out: 1 hidden entry (cat/.b.png)." in caplog.text


def test_the_line_counts_all_and_names_five():
    left = LeftOut("/photos")
    for number in range(1200):
        left.add("ending", f"/photos/a/{number:04}.raw")
    left.add("hidden", "/photos/.x")
    names = ", ".join(f"a/{number:04}.raw" for number in range(5))
    assert "1,200 files with another ending" in left.line()
    assert left.line().endswith(f"(1,200 .raw: {names} and 1,195 more); 1 hidden entry (.x)")
    assert left.level == "warning"


def test_names_that_are_no_text_are_shown_escaped(tmp_path):
    root = paint(tmp_path / "photos", *many("cat", "dog"))
    for name in (b"caf\xe9.txt", b"new\nline.txt", b"\x1b[31m.txt"):
        with open(os.path.join(os.fsencode(root), b"cat", name), "wb"):
            pass
    line = read("classes", root)[1]
    assert "cat/\\x1b[31m.txt, cat/caf\\xe9.txt, cat/new\\nline.txt" in line


def test_the_root_itself_may_be_hidden_or_a_link(tmp_path):
    paint(tmp_path / ".store", *many("cat", "dog"))
    os.symlink(tmp_path / ".store", tmp_path / "photos")
    for root in (tmp_path / ".store", tmp_path / "photos"):
        assert len(find_images(root)) == 8
        assert ImageFolderData(root=str(root)).read().class_names == ("cat", "dog")


def test_published_sets_skip_hidden_files(tmp_path):
    for make, reader, folder in (
        (make_ade20k, ADE20KData, "images/training"),
        (make_cityscapes, CityscapesData, "leftImg8bit/train"),
    ):
        root = make(tmp_path / reader.__name__, Painter())
        inside = next(root.rglob(folder))
        before = len(reader(root=str(root)).read().splits["train"])
        image = next(path for path in inside.rglob("*") if path.is_file())
        (image.parent / f"._{image.name}").write_bytes(b"\0\5\x16\7")
        assert len(reader(root=str(root)).read().splits["train"]) == before > 0


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="no regular file"):
            open_regular(path)


# ------------------------------------------------------------------ folders that have the names of splits


def classes(root, **settings):
    data = ImageFolderData(root=str(root), **settings)
    return data.read(), {finding.code: finding for finding in data.report().findings if finding.level != "fact"}


def test_folders_beside_a_lone_train_are_refused_by_name(tmp_path):
    root = paint(tmp_path, *many("bus", "car", "train/diesel", "train/steam"))
    finding = classes(root)[1]["folders-beside-train"]
    assert finding.level == "error"
    assert finding.places == ("bus", "car")
    assert "If train is a class, rename its folder" in finding.text


def test_folders_beside_splits_are_a_warning(tmp_path):
    root = paint(tmp_path, *many("train/a", "train/b", "unlabeled"))
    (root / "docs").mkdir()
    listing, found = classes(root)
    assert listing.class_names == ("a", "b")
    assert "1 folder beside those that are read (unlabeled (4 images))" in found["left-out"].line()
    assert "1 entry beside the folders that are read, and no image (docs (0 images))" in found["left-out"].line()


def test_split_names_that_may_be_classes_say_so(tmp_path):
    root = paint(tmp_path / "vehicles", *many("bus", "car", "train"))
    with pytest.raises(DataError, match=r"no class folders. .*If train is a class, rename it \(beside it: bus, car\)"):
        classes(root)
    for folders, rest in ((("control", "test"), "control"), (("broken", "valid"), "broken")):
        root = paint(tmp_path / rest, *many(*folders))
        with pytest.raises(DataError, match=rf"if it is a class, rename it \(beside it: {rest}\)"):
            classes(root)


@pytest.mark.parametrize(("one", "other"), [("val", "valid"), ("eval", "Validation"), ("Test", "testing")])
def test_two_folders_for_one_split_are_refused(tmp_path, one, other):
    root = paint(tmp_path, *many("train/a", "train/b", f"{one}/a", f"{other}/b"))
    with pytest.raises(DataError, match=r"which all stand for the (validation|test) split"):
        classes(root)


def test_one_folder_for_two_splits_is_refused(tmp_path):
    root = paint(tmp_path, *many("train/a", "train/b"))
    os.symlink(root / "train", root / "val")
    with pytest.raises(DataError, match="one and the same"):
        classes(root)


def test_a_split_without_class_folders_is_an_error(tmp_path):
    root = paint(tmp_path, *many("train/a", "train/b"), *many("test"))
    finding = classes(root)[1]["split-without-classes"]
    assert (finding.level, finding.places) == ("error", ("test (4 images)",))


def test_splits_inside_of_classes_are_a_warning(tmp_path):
    root = paint(tmp_path, *many("cat/train", "cat/test", "dog/train", "dog/other"))
    finding = classes(root)[1]["splits-inside-class"]
    assert finding.level == "warning"
    assert finding.places == ("cat/test", "cat/train", "dog/train")


# ------------------------------------------------------------------ images and masks


def masks(root, **settings):
    data = MaskFolderData(root=str(root), class_names=["a", "b"], **settings)
    return data.read(), next((f.line() for f in data.read().findings if f.code == "left-out"), "")


def label(root, *names):
    for name in names:
        Painter().label(root / name, [0, 1])


def test_linked_folders_of_images_and_masks_are_read(tmp_path):
    paint(tmp_path, *many("store/images", "set/images/train", "set/images/val", "set/images/test"))
    label(tmp_path, *many("store/masks", "set/masks/train", "set/masks/val", "set/masks/test"))
    for kind in ("images", "masks"):
        os.symlink(tmp_path / "store" / kind, tmp_path / "set" / kind / "train/more")
    listing, line = masks(tmp_path / "set")
    assert {name: len(split) for name, split in listing.splits.items()} == {"train": 8, "validation": 4, "test": 4}
    assert not line
    assert len(find_images(tmp_path / "set/images")) == 16


def test_folders_beside_those_of_the_splits_are_named(tmp_path):
    paint(tmp_path, *many("images/train", "images/val", "images/extra"), "images/1.png")
    label(tmp_path, *many("masks/train", "masks/val", "masks/test"))
    (tmp_path / "masks/train/1.tif").touch()
    line = masks(tmp_path)[1]
    assert "2 folders beside those that are read (images/extra (4 images), masks/test (4 images))" in line
    assert "1 image outside of the folders that are read (images/1.png)" in line
    assert "1 file with another ending than mask_suffix among the masks (1 .tif: masks/train/1.tif)" in line


def test_a_split_without_masks_is_named(tmp_path):
    paint(tmp_path, *many("train/images", "test/images"))
    label(tmp_path, *many("train/masks"))
    listing, line = masks(tmp_path)
    assert list(listing.splits) == ["train"]
    assert "1 folder beside those that are read (test (4 images))" in line


def test_images_and_masks_may_share_a_folder(tmp_path):
    for number in range(3):
        Painter().paint(tmp_path / f"all/{number}.jpg")
        label(tmp_path, f"all/{number}_mask.png")
    (tmp_path / "all/notes.txt").touch()
    for settings in ({}, {"image_suffix": ".jpg"}):
        listing, line = masks(tmp_path, images="all", masks="all", mask_suffix="_mask.png", **settings)
        assert names_of(listing.splits["train"]) == [f"all/{number}.jpg" for number in range(3)]
        assert line.startswith("Left out: 1 file with another ending than ")
        assert "(1 .txt: all/notes.txt)" in line


def test_numbers_agree_with_their_nouns():
    found = [counted(number, "image") for number in (0, 1, 2, 12_345)]
    assert found == ["0 images", "1 image", "2 images", "12,345 images"]
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]
