"""Makes small data in the layouts VTAB-1k and FGVC are published in.

python -m tests.data.published FOLDER

The folder then has ``vtab-1k/<task>/`` for all 19 tasks and a folder for each of the five fine-grained sets. No two
images are equal, and every class occurs in the training lists.
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


def make_all(root: Path) -> None:
    """Make everything."""
    painter = Painter()
    for task in VTAB_CLASSES:
        make_vtab_task(root / "vtab-1k", task, painter)
    for name in FGVC_CLASSES:
        make_fgvc(root, name, painter)


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
