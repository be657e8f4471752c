"""Makes small data in the layouts that sets for metric learning are published in: four classes, three images each."""

import json
from pathlib import Path

import numpy as np

from tests.data.published import Painter

IMAGES = 3
CARS = ["AM General SUV", "Acura RL", "BMW M3", "Bentley GT/V8"]


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_cub(root: Path, painter: Painter, lists: bool) -> Path:
    """Two index files joined by number, written in another order; or folders alone, and a leftover of macOS."""
    place = root / "CUB_200_2011" if lists else root
    names = ["001.Albatross", "002.Auklet", "010.Bunting", "100.Cardinal"]
    images, labels = [], []
    for label, name in enumerate(names, start=1):
        for number in range(IMAGES):
            painter.paint(place / f"images/{name}/{number}.jpg")
            images.append(f"{len(images) + 1} {name}/{number}.jpg")
            labels.append(f"{len(images)} {label}")
    if lists:
        write(place / "images.txt", *images)
        write(place / "image_class_labels.txt", *reversed(labels))
        write(place / "train_test_split.txt", *(f"{number + 1} 1" for number in range(len(images))))
    write(place / "images/001.Albatross/._0.jpg", "no image")
    return root


def make_cars(root: Path, painter: Painter, layout: str) -> Path:
    """A table of MATLAB; folders of classes; or three tables of comma-separated values."""
    rows = []
    for number in range(len(CARS) * IMAGES):
        label = number % len(CARS)
        name = CARS[label].replace("/", "-")
        split = ("train", "test")[number % 2]
        folder = {"mat": "car_ims", "folders": name, "csv": f"car_data/car_data/{split}/{name}"}[layout]
        painter.paint(root / folder / f"{number:06d}.jpg")
        rows.append((f"{number:06d}.jpg", label + 1, split))
    if layout == "mat":
        write_mat(root, rows)
    if layout == "csv":
        write(root / "names.csv", *CARS)
        for split in ("train", "test"):
            write(root / f"anno_{split}.csv", *(f"{n},1,2,3,4,{label}" for n, label, s in rows if s == split))
    return root


def write_mat(root: Path, rows: list[tuple[str, int, str]], names: list[str] | None = None) -> None:
    from scipy.io import savemat

    fields = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    table = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for index, (name, label, split) in enumerate(rows):
        table[0, index] = (f"car_ims/{name}", 1, 2, 3, 4, label, int(split == "test"))
    classes = np.array([names or CARS], dtype=object)
    savemat(root / "cars_annos.mat", {"annotations": table, "class_names": classes})


def make_products(root: Path, painter: Painter, apart: bool) -> Path:
    """Lists beside the images, or in a folder of their own."""
    place = root if apart else root / "Stanford_Online_Products"
    number = 0
    for split, labels in (("train", (1, 2)), ("test", (11319, 11320))):
        lines = ["image_id class_id super_class_id path"]
        for label in labels:
            for photo in range(IMAGES):
                number += 1
                path = f"bicycle_final/{label}_{photo}.JPG"
                painter.paint(place / ("images" if apart else ".") / path)
                lines.append(f"{number} {label} 1 {path}")
        write(place / ("Info_Files" if apart else ".") / f"Ebay_{split}.txt", *lines)
    return root


def make_inshop(root: Path, painter: Painter, inside: bool) -> Path:
    """Items for training, and items whose images are queries or gallery, in another order of the items."""
    lines = []
    for item, splits in ((1, ["train"] * 3), (7, ["train"] * 3), (9, ["gallery", "query"]), (3, ["query", "gallery"])):
        for number, split in enumerate(splits):
            path = f"img/WOMEN/Tees/id_{item:08d}/{number:02d}_front.jpg"
            painter.paint((root / "Img" if inside else root) / path)
            lines.append(f"{path}    id_{item:08d}    {split}")
    place = root / "Eval" if inside else root
    write(place / "list_eval_partition.txt", str(len(lines)), "image_name item_id evaluation_status", *lines)
    return root


def make_inaturalist(root: Path, painter: Painter, tables: bool) -> Path:
    """Lists of images in folders of groups and species; the categories of the tables are other numbers."""
    place = root / "Inat_dataset_splits" if tables else root
    found: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for split, species in (("train", ("Birds/12", "Aves/7")), ("test", ("Plantae/12", "Aves/9"))):
        paths = [f"train_val2018/{name}/{number}.jpg" for name in species for number in range(IMAGES)]
        write(place / f"Inaturalist_{split}_set1.txt", *paths)
        for path in paths:
            painter.paint(root / path)
            number = len(found["images"])
            found["images"].append({"id": number, "file_name": path})
            found["annotations"].append({"image_id": number, "category_id": 50 + number // IMAGES})
    if tables:
        (root / "train2018.json").write_text(json.dumps(found))
        (root / "val2018.json").write_text(json.dumps({"images": [], "annotations": []}))
    return root
