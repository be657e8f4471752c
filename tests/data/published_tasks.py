"""Makes small data in the layouts that PASCAL-Context and NYUD-v2 are published in for several tasks.

python -m tests.data.published_tasks FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from tests.data.published import Painter

SIZE = (12, 10)
"""Width and height of the images."""


def write_lists(folder: Path, lists: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, stems in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def write_parts(path: Path, objects: list[tuple[str, int, dict[str, np.ndarray]]]) -> None:
    """Write a file of PASCAL-Part: objects of a name, a category, and parts by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    things = np.zeros(len(objects), [(name, object) for name in ("class", "class_ind", "mask", "parts")])
    for index, (name, category, masks) in enumerate(objects):
        parts = np.zeros(len(masks), [("part_name", object), ("mask", object)])
        for position, (part, mask) in enumerate(masks.items()):
            parts[position] = (part, mask.astype(np.uint8))
        things[index] = (name, category, np.ones(SIZE[::-1], np.uint8), parts if masks else np.zeros((0, 0)))
    savemat(path, {"anno": {"imname": path.stem, "objects": things}})


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(SIZE[::-1], bool)
    mask[top:bottom, left:right] = True
    return mask


def make_pascal_mt(root: Path, painter: Painter, cached: bool = False) -> Path:
    """Make PASCAL_MT with 4 train and 2 validation images; there is nobody in the first one of each split."""
    lists = {"train": [f"2008_{n:06d}" for n in range(4)], "val": ["2010_000001", "2010_000002"]}
    write_lists(root / "ImageSets/Context", lists)
    categories: dict[str, list[int]] = {}
    for stems in lists.values():
        for number, stem in enumerate(stems):
            painter.paint(root / f"JPEGImages/{stem}.jpg", SIZE)
            folder = "VOC12" if number % 2 else "pascal-context"
            painter.label(root / f"semseg/{folder}/{stem}.png", [*range(21), 255], SIZE, palette=bool(number % 2))
            context = np.full(SIZE[::-1], 2, np.uint16)  # no class that keeps normals
            context[:, :6] = 3
            for name, content in {"pascal-context/trainval": {"LabelMap": context}}.items():
                (root / name).mkdir(parents=True, exist_ok=True)
                savemat(root / name / f"{stem}.mat", content)
            shades = painter.random.integers(0, 256, SIZE[::-1], dtype=np.uint8)
            shades[0, :2] = 255, 0
            vectors = painter.random.normal(size=(*SIZE[::-1], 3))
            vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
            for name, image in {"sal_distill": shades, "normals_distill": (vectors + 1) * 127.5}.items():
                (root / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.round().astype(np.uint8)).save(root / name / f"{stem}.png")
            objects: list[tuple[str, int, dict[str, np.ndarray]]] = [("dog", 12, {"head": box(0, 0, 9, 9)})]
            if number:
                person = {"head": box(0, 0, 2, 2), "torso": box(1, 0, 4, 4), "llarm": box(4, 0, 6, 2)}
                objects.append(("person", 15, {**person, "rhand": box(5, 1, 7, 3), "luleg": box(7, 0, 9, 2)}))
                objects.append(("person", 15, {"ruarm": box(0, 8, 2, 10), "rfoot": box(2, 8, 4, 10)}))
            write_parts(root / f"human_parts/{stem}.mat", objects)
            categories[stem] = [category for _, category, _ in objects]
    if cached:
        for name, stems in lists.items():
            (root / "ImageSets/Parts").mkdir(exist_ok=True)
            text = json.dumps({stem: categories[stem] for stem in stems})
            (root / f"ImageSets/Parts/{name}.txt").write_text(text)
    return root


def make_nyud_mt(root: Path, painter: Painter) -> Path:
    """Make NYUD_MT with 3 train and 2 validation images."""
    lists = {"train": ["0001", "0003", "0004"], "val": ["0002", "0005"]}
    write_lists(root / "gt_sets", lists)
    for stem in (stem for stems in lists.values() for stem in stems):
        painter.paint(root / f"images/{stem}.jpg", SIZE)
        painter.label(root / f"segmentation/{stem}.png", list(range(41)), SIZE)
        depth = painter.random.uniform(1, 9, SIZE[::-1]).astype(np.float32)
        depth[0] = 0
        normals = painter.random.normal(size=(*SIZE[::-1], 3))
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        normals[:, 0] = 0
        edge = (painter.random.random(SIZE[::-1]) < 0.2).astype(np.uint8)
        for task, values in {"depth": depth, "normals": normals.astype(np.float32), "edge": edge}.items():
            (root / task).mkdir(exist_ok=True)
            np.save(root / task / f"{stem}.npy", values)
    return root


if __name__ == "__main__":
    make_pascal_mt(Path(sys.argv[1]) / "PASCAL_MT", Painter(), cached=True)
    make_nyud_mt(Path(sys.argv[1]) / "NYUD_MT", Painter())
