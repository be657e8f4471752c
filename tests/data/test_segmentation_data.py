import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.published import Painter, make_ade20k, make_cityscapes, make_context, make_voc
from vispeft.data import (
    IGNORE,
    ADE20KData,
    CityscapesData,
    MaskAugmentation,
    MaskFolderData,
    PascalContextData,
    Preprocessing,
    VOCData,
    read_image,
)
from vispeft.data.palettes import class_table, make_palette
from vispeft.errors import ConfigError, DataError

BACKBONE = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
NAMES = ["sea", "land", "ice"]


def ready(data):
    data.fit_to(BACKBONE)
    data.setup()
    return data


def folder(root, sizes=((12, 10),), order="images/{split}", **counts):
    """Make images and masks with three classes and pixels without a label."""
    painter = Painter()
    for split, count in counts.items():
        split = "" if split == "all" else split
        images = root / order.format(split=split)
        masks = root / order.format(split=split).replace("images", "masks")
        for number in range(count):
            size = sizes[number % len(sizes)]
            painter.paint(images / f"{number}.png", size)
            painter.label(masks / f"{number}.png", [0, 1, 2, IGNORE], size)
    return root


def make(root, **settings):
    return MaskFolderData(root=str(root), class_names=NAMES, **settings)


def found(data):
    return {finding.code: finding for finding in data.report().findings if finding.level != "fact"}


# ------------------------------------------------------------------ folders and batches


@pytest.mark.parametrize("order", ["images/{split}", "{split}/images"])
def test_images_and_masks_in_folders(tmp_path, order):
    data = ready(make(folder(tmp_path, order=order, train=5, val=2, test=3), batch_size=2))
    assert data.target == "mask"
    assert (data.num_classes, data.class_names, data.palette) == (3, tuple(NAMES), make_palette(3))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [5, 2, 3]
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((2, 3, 8, 8), torch.float32)
    assert (masks.shape, masks.dtype) == ((2, 8, 8), torch.int64)
    images, masks = next(iter(data.val_dataloader()))
    assert (images.shape, masks.shape) == ((2, 3, 8, 8), (2, 10, 12))
    assert set(masks.unique().tolist()) == {0, 1, 2, IGNORE}
    assert not found(data)


def test_whole_images_keep_their_masks_and_come_one_by_one_where_sizes_differ(tmp_path):
    root = folder(tmp_path, sizes=((12, 10), (10, 12)), train=4, val=2, test=2)
    for evaluation, seen in (("stretch", [(8, 8), (8, 8)]), ("whole", [(10, 12), (12, 10)])):
        data = ready(make(root, evaluation=evaluation, batch_size=2))
        batches = list(data.test_dataloader())
        assert [tuple(images.shape) for images, _ in batches] == [(1, 3, *size) for size in seen]
        assert [tuple(masks.shape) for _, masks in batches] == [(1, 10, 12), (1, 12, 10)]
    images, masks = ready(make(root, evaluation="whole", short_side=20)).split("test")[0]
    assert (images.shape, masks.shape) == ((3, 20, 24), (10, 12))
    expected = BACKBONE.normalise()(read_image(root / "images/test/0.png"))
    assert torch.equal(ready(make(root, evaluation="whole")).split("test")[0][0], expected)


def test_splits_that_are_missing_are_drawn_with_their_masks(tmp_path):
    root = folder(tmp_path, all=20)
    data = ready(make(root, validation=0.2, test=0.25))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [11, 4, 5]
    for name in ("train", "validation", "test"):
        split = data.split(name)
        for index in range(len(split)):
            image = split.source.name(index)
            assert split.masks.name(index) == image.replace("images", "masks")
    folds = [make(root, folds=4, fold=fold).listing.splits["test"].source for fold in range(4)]
    assert sorted(source.name(i) for source in folds for i in range(len(source))) == sorted(
        f"images/{n}.png" for n in range(20)
    )


def test_draws_of_masks_are_at_random_and_say_which_classes_they_miss(tmp_path):
    painter = Painter()
    for number in range(20):
        painter.paint(tmp_path / f"images/{number}.png")
        painter.label(tmp_path / f"masks/{number}.png", [0, 1, 2] if number < 2 else [0, 1])
    report = make(tmp_path).report()
    drawn = next(finding for finding in report.findings if finding.code == "drawn-splits")
    assert "at random and disjoint" in drawn.text
    missing = {finding.code: finding.level for finding in report.findings if finding.places == ("ice",)}
    # Two images show the third class, so at least one of three splits has none of it.
    assert set(missing) & {"absent-in-validation", "absent-in-test", "never-in-train"}
    assert set(missing.values()) == {"warning"}


def test_batches_depend_on_seed_epoch_and_index_alone(tmp_path):
    root = folder(tmp_path, sizes=((30, 24),), train=4, val=1, test=1)
    crops = {"augment": MaskAugmentation(crop_size=(6, 10))}
    one, two = (ready(make(root, **crops)) for _ in range(2))
    _ = one.split("train")[0, 0]
    for index in ((0, 2), (3, 2)):
        assert all(
            torch.equal(*pair) for pair in zip(one.split("train")[index], two.split("train")[index], strict=True)
        )
    assert one.split("train")[0, 2][0].shape == (3, 6, 10)
    assert not torch.equal(one.split("train")[0, 2][0], one.split("train")[1, 2][0])
    again, other = make(root), make(root)
    assert list(again.identity()) == list(other.identity())
    Painter().label(root / "masks/train/0.png", [1, 0, 2], (30, 24))
    assert list(ready(make(root)).identity()) != list(again.identity())


def test_rgb_masks_are_read_with_a_palette_and_masks_of_255_with_ids(tmp_path):
    root = folder(tmp_path, train=2, val=1, test=1)
    colours = np.array([(10, 0, 0), (0, 20, 0), (0, 0, 30)], np.uint8)
    for path in root.glob("masks/*/*.png"):
        labels = np.asarray(Image.open(path)) % 3
        Image.fromarray(colours[labels]).save(path)
    data = ready(make(root, palette=colours.tolist(), rgb_masks=True))
    assert data.split("test")[0][1].unique().tolist() == [0, 1, 2]
    assert data.palette == ((10, 0, 0), (0, 20, 0), (0, 0, 30))
    text = found(make(root))["rgb-masks"].line()
    assert "(10, 0, 0)" in text
    assert "rgb_masks: true and a palette" in text
    with pytest.raises(ConfigError, match="by the colours of palette"):
        make(root, rgb_masks=True)
    with pytest.raises(ConfigError, match="2 colours for 3 classes"):
        make(root, palette=[(1, 2, 3), (4, 5, 6)])


def test_no_masks_and_unusable_settings_are_refused(tmp_path):
    with pytest.raises(DataError, match="needs the folders images and masks"):
        make(tmp_path).read()
    for settings, text in (
        ({"crop_pct": 0.9}, "leave it out"),
        ({"evaluation": "crop"}, "stretch and whole"),
        ({"short_side": 0}, "at least one pixel"),
    ):
        with pytest.raises(ConfigError, match=text):
            make(tmp_path, **settings)
    with pytest.raises(ConfigError, match="two or more different names"):
        MaskFolderData(root=str(tmp_path), class_names=["a", "a"])


# ------------------------------------------------------------------ checks


def test_every_fault_of_masks_is_found_in_one_message(tmp_path):
    root, painter = folder(tmp_path, train=12, val=3, test=3), Painter(seed=5)
    masks = root / "masks/train"
    (masks / "0.png").unlink()
    (masks / "1.png").write_bytes(b"")
    (masks / "2.png").write_text("no image")
    big = painter.label(masks / "3.png", [0, 1, 2], (90, 90)).read_bytes()
    (masks / "3.png").write_bytes(big[: len(big) // 2])
    painter.label(masks / "4.png", [0, 1], (10, 12))
    painter.label(masks / "5.png", [0, 7], (12, 10))
    painter.label(masks / "6.png", [1, 7, 9], (12, 10))
    painter.paint(masks / "7.png", (12, 10))
    painter.label(masks / "8.png", [IGNORE], (12, 10))
    painter.label(masks / "no_image.png", [0], (12, 10))
    shutil.copy(root / "images/train/9.png", root / "images/test/0.png")
    shutil.copy(root / "images/train/10.png", root / "images/train/11.png")
    painter.label(masks / "11.png", [2, 1], (12, 10))
    painter.paint(root / "images/test/2.bmp", (12, 10))
    errors = {
        "shared-mask": "masks/test/2.png (images/test/2.bmp, images/test/2.png)",
        "missing-mask": "masks/train/0.png",
        "empty-mask": "masks/train/1.png",
        "broken-mask": "masks/train/2.png",
        "truncated-mask": "masks/train/3.png",
        "mask-size": "masks/train/4.png (10 x 12 for an image of 12 x 10)",
        "mask-values": "7 (2 files), 9 (1 file)",
        "rgb-masks": "masks/train/7.png",
        "splits-overlap": "images/train/9.png",
        "labels-disagree": "train images/train/10.png = train images/train/11.png",
    }
    warnings = {
        "mask-unlabelled": "masks/train/8.png",
        "mask-without-image": "masks/train/no_image.png",
        "duplicates": "images/train/10.png",
    }
    seen = found(make(root))
    assert {code for code, finding in seen.items() if finding.level == "error"} - {"mask-size"} == set(errors) - {
        "mask-size"
    }
    assert set(seen) == {*errors, *warnings}
    with pytest.raises(DataError) as refused:
        ready(make(root))
    for code, place in {**errors, **warnings}.items():
        assert place in seen[code].line(99), (code, seen[code])
        assert seen[code].line() in str(refused.value)
    fast = found(make(root, check="fast"))
    assert {"missing-mask", "mask-size"} <= set(fast)
    assert "mask-values" not in fast


def test_classes_that_do_not_occur_are_named(tmp_path):
    root, painter = folder(tmp_path, train=2, val=1, test=1), Painter(seed=3)
    for path in (root / "masks/train").iterdir():
        painter.label(path, [0, IGNORE], (12, 10))
    painter.label(root / "masks/val/0.png", [0], (12, 10))
    seen = found(make(root))
    assert (seen["never-in-train"].places, seen["unseen-in-test"].places) == (("land", "ice"), ("land", "ice"))
    assert {finding.level for finding in seen.values()} == {"warning"}
    painter.label(root / "masks/test/0.png", [0], (12, 10))
    assert "set ids: {0: 0, 255: 1}" in found(make(root))["one-class"].line()
    for path in (root / "masks/val").iterdir():
        painter.label(path, [IGNORE], (12, 10))
    assert "split-unlabelled" in found(make(root))


def test_images_that_are_turned_by_their_metadata_have_upright_masks(tmp_path):
    root, painter = folder(tmp_path, train=3, val=1, test=1), Painter(seed=3)
    path = painter.paint(root / "images/train/turned.jpg", (12, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    for size, wrong in (((10, 12), False), ((12, 10), True)):
        painter.label(root / "masks/train/turned.png", [0, 1, 2], size)
        assert [("mask-size" in found(make(root, check=check))) for check in ("full", "fast")] == [wrong, wrong]


def test_masks_saved_as_jpeg_are_recognised(tmp_path):
    root = folder(tmp_path, train=2, val=1, test=1)
    for path in list(root.glob("masks/*/*.png")):
        Image.open(path).save(path.with_suffix(".jpg"), quality=60)
        path.unlink()
    assert "JPEG changes values" in found(make(root, mask_suffix=".jpg"))["mask-values"].line()


# ------------------------------------------------------------------ published layouts


def test_voc(tmp_path):
    root = make_voc(tmp_path, Painter())
    data = ready(VOCData(root=str(root)))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [4, 2, 2]
    assert data.class_names[15] == "person"
    assert data.palette[15] == (192, 128, 128)
    assert not data.validation_chooses
    assert data.listing.repeated_by("validation") == "test"
    path = root / "VOCdevkit/VOC2012/SegmentationClass/2008_000001.png"
    assert data.split("test")[0][1].tolist() == np.asarray(Image.open(path)).tolist()
    texts = [finding.text for finding in data.report().of("warning")]
    assert "PASCAL VOC 2012 has 1,449 test images as published, and here are 2" in texts
    data = ready(VOCData(root=str(root / "VOCdevkit/VOC2012"), augmented=True, protocol="tune", validation=0.2))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [4, 2, 2]
    assert data.validation_chooses
    names = {data.listing.splits[n].masks.name(i) for n in ("train", "validation") for i in range(len(data.split(n)))}
    assert {name.split("/")[-2] for name in names} == {"SegmentationClass", "SegmentationClassAug"}
    with pytest.raises(DataError, match="no folder with JPEGImages"):
        VOCData(root=str(tmp_path / "nowhere")).read()


@pytest.mark.parametrize("classes", [59, 60])
def test_pascal_context(tmp_path, classes):
    root = make_context(tmp_path, Painter())
    data = ready(PascalContextData(root=str(root), classes=classes))
    stored = np.asarray(Image.open(root / "VOCdevkit/VOC2010/SegmentationClassContext/2010_1.png")).astype(int)
    expected = stored if classes == 60 else np.where(stored == 0, IGNORE, stored - 1)
    assert data.split("test")[0][1].tolist() == expected.tolist()
    assert (len(data.palette), data.class_names[-1]) == (classes, "wood")
    assert not data.report().of("error")


def test_ade20k(tmp_path):
    data = ready(ADE20KData(root=str(make_ade20k(tmp_path, Painter()))))
    assert (data.num_classes, data.class_names) == (150, class_table("ade20k").class_names)
    mask = data.split("test")[0][1]
    stored = np.asarray(Image.open(tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"))
    assert mask.flatten()[:151].tolist() == [IGNORE, *range(150)]
    assert mask.shape == stored.shape
    # A mask that was reduced already, or a class too many, shows.
    Painter().label(tmp_path / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png", [151], (16, 10))
    assert "151 (1 file)" in found(ADE20KData(root=str(tmp_path / "ADEChallengeData2016")))["mask-values"].line()


def test_cityscapes_of_both_kinds(tmp_path):
    plain = ready(CityscapesData(root=str(make_cityscapes(tmp_path / "a", Painter()))))
    mapped = plain.split("test")[0][1].flatten()[:34].tolist()
    # cityscapesScripts: road 7, sidewalk 8, person 24, train 31, bicycle 33; static 4, bridge 15, caravan 29 no class.
    assert [mapped[value] for value in (7, 8, 24, 31, 33, 4, 15, 29)] == [0, 1, 11, 16, 18, IGNORE, IGNORE, IGNORE]
    assert sorted(set(mapped)) == [*range(19), IGNORE]
    assert (plain.class_names[11], plain.class_names[16]) == ("person", "train")
    made = ready(CityscapesData(root=str(make_cityscapes(tmp_path / "b", Painter(), train_ids=True))))
    assert made.split("test")[0][1].flatten()[:20].tolist() == [*range(19), IGNORE]
    assert [len(made.split(name)) for name in ("train", "validation", "test")] == [4, 2, 2]
