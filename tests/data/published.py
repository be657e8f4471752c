"""Makes small data in the layouts VTAB-1k, FGVC and sets with masks are published in.

python -m tests.data.published FOLDER

The folder then has ``vtab-1k/<task>/`` for all 19 tasks and a folder for each of the five fine-grained sets and of the
four with masks. No two images are equal, and every class occurs in the training lists.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

# Written down once more, from the descriptions of the layouts, and not taken from the readers that are tested.
VTAB_CLASSES = {
    "cifar": 100,
    "caltech101": 102,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
FGVC_CLASSES = {"cub": 200, "nabirds": 555, "flowers": 102, "dogs": 120, "cars": 196}
FGVC_IMAGES = {"cub": "images", "nabirds": "images", "flowers": ".", "dogs": "Images", "cars": "."}


class Painter:
    """Paints images, all of them different."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)

    def paint(self, path: Path, size: tuple[int, int] = (6, 5)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = self.random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        # Stored without compression: the layout is what counts.
        Image.fromarray(pixels).save(path, **({"compress_level": 0} if path.suffix == ".png" else {}))
        return path

    def label(self, path: Path, values: list[int], size: tuple[int, int] = (6, 5), palette: bool = False) -> Path:
        """Paint a mask that has all of some values, in the order of its pixels and then at random."""
        path.parent.mkdir(parents=True, exist_ok=True)
        count = size[0] * size[1]
        pixels = [*values, *self.random.choice(values, max(0, count - len(values))).tolist()][:count]
        mask = Image.fromarray(np.array(pixels, np.uint8).reshape(size[1], size[0]))
        if palette:
            mask = mask.convert("P")
            mask.putdata(pixels)
            mask.putpalette([value // 2 for value in range(256) for _ in range(3)])
        mask.save(path)
        return path


def make_vtab_task(root: Path, task: str, painter: Painter) -> Path:
    """Make one task: one image per class in train800 and in test, three in val200."""
    place, classes = root / task, VTAB_CLASSES[task]
    number = 0

    def lines(folder: str, labels: list[int]) -> list[str]:
        nonlocal number
        made = []
        for label in labels:
            name = f"images/{folder}/{number:06d}.png"
            painter.paint(place / name)
            made.append(f"{name} {label}\n")
            number += 1
        return made

    train = lines("train800val200", list(range(classes)))
    validation = lines("train800val200", [0, classes - 1, classes // 2])
    test = lines("test", list(range(classes)))
    for name, content in {
        "train800": train,
        "val200": validation,
        "train800val200": train + validation,
        "test": test,
    }.items():
        (place / f"{name}.txt").write_text("".join(content))
    return place


def make_fgvc(root: Path, name: str, painter: Painter, classes: int | None = None) -> Path:
    """Make one set: an image per class in each list. Ids have gaps and do not begin at 0, as some published ones."""
    place = root / name
    number = 0
    for split in ("train", "val", "test"):
        listed = {}
        for index in range(classes or FGVC_CLASSES[name]):
            path = f"{index:03d}.class/{number:05d}.png"
            painter.paint(place / FGVC_IMAGES[name] / path)
            listed[path] = 3 + 2 * index
            number += 1
        (place / f"{split}.json").write_text(json.dumps(listed))
    return place


def make_voc(root: Path, painter: Painter) -> Path:
    """Make VOC 2012 with 4 train and 2 validation images, and 2 more masks of the Semantic Boundaries Dataset."""
    place = root / "VOCdevkit/VOC2012"
    lists = {"train": [f"2007_{n:06d}" for n in range(4)], "val": ["2008_000001", "2008_000002"]}
    lists["aug"] = ["2009_000001", "2009_000002"]
    for name, stems in lists.items():
        folder = "SegmentationClassAug" if name == "aug" else "SegmentationClass"
        for stem in stems:
            painter.paint(place / f"JPEGImages/{stem}.jpg", (8, 6))
            painter.label(place / f"{folder}/{stem}.png", [*range(21), 255], (8, 6), palette=name != "aug")
        text = "".join(f"{stem}\n" for stem in stems)
        (place / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (place / f"ImageSets/Segmentation/{name}.txt").write_text(text)
    return root


def make_context(root: Path, painter: Painter) -> Path:
    """Make PASCAL-Context with 3 train and 2 validation images: 0 is the background, 1 to 59 are the classes."""
    place = root / "VOCdevkit/VOC2010"
    for name, stems in {"train": ["2008_000002", "2008_000003", "2008_000004"], "val": ["2010_1", "2010_2"]}.items():
        for stem in stems:
            painter.paint(place / f"JPEGImages/{stem}.jpg", (10, 8))
            painter.label(place / f"SegmentationClassContext/{stem}.png", list(range(60)), (10, 8))
        (place / "ImageSets/SegmentationContext").mkdir(parents=True, exist_ok=True)
        (place / f"ImageSets/SegmentationContext/{name}.txt").write_text("\n".join(stems))
    return root


def make_ade20k(root: Path, painter: Painter) -> Path:
    """Make ADE20K with 3 train and 2 validation images: 0 is everything else, 1 to 150 are the classes."""
    place = root / "ADEChallengeData2016"
    for folder, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for number in range(1, count + 1):
            stem, size = f"ADE_{short}_{number:08d}", (16, 9 + number)
            painter.paint(place / f"images/{folder}/{stem}.jpg", size)
            painter.label(place / f"annotations/{folder}/{stem}.png", list(range(151)), size)
    return root


def make_cityscapes(root: Path, painter: Painter, train_ids: bool = False) -> Path:
    """Make Cityscapes with 2 cities in train and 1 in val, 2 images each."""
    for split, cities in {"train": ["aachen", "bochum"], "val": ["lindau"]}.items():
        for city in cities:
            for number in range(2):
                stem = f"{city}_{number:06d}_000019"
                painter.paint(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", (8, 6))
                mask = root / f"gtFine/{split}/{city}/{stem}_gtFine"
                painter.label(Path(f"{mask}_labelIds.png"), list(range(34)), (8, 6))
                if train_ids:
                    painter.label(Path(f"{mask}_labelTrainIds.png"), [*range(19), 255], (8, 6))
    return root


def make_all(root: Path) -> None:
    """Make everything."""
    painter = Painter()
    make_voc(root, painter)
    make_context(root, painter)
    make_ade20k(root, painter)
    make_cityscapes(root / "cityscapes", painter)
    for task in VTAB_CLASSES:
        make_vtab_task(root / "vtab-1k", task, painter)
    for name in FGVC_CLASSES:
        make_fgvc(root, name, painter)


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
