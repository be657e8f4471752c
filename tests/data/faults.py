"""Makes a small data set with one fault of every kind planted in it."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.published import Painter

NAMES = ["ant", "bee", "cat", "dog", "eel"]

ERRORS = {
    "missing-file": "gone.png",
    "empty-file": "empty.png",
    "truncated-image": "short.png",
    "broken-image": "text.png",
    "label-missing": "train.txt:14",
    "label-range": "train.txt:15 (7)",
    "absolute-path": "/photos/1.png",
    "escaping-path": "../secret.png",
    "same-file-in-two-splits": "train ant/00.png = test ant/00.png",
    "splits-overlap": "train ant/01.png = validation copy.png",
    "labels-disagree": "train ant/02.png = train other.png",
    "unseen-in-test": "dog",
}
"""Kinds of findings that stop a training, and a place each of them must name."""

WARNINGS = {
    "duplicates": "train ant/03.png = train twin.png",
    "listed-twice": "train ant/04.png",
    "cmyk": "cmyk.tif",
    "16-bit": "deep.png",
    "transparency": "clear.png",
    "grayscale": "grey.png",
    "palette": "palette.png",
    "several-frames": "moving.gif (2)",
    "extreme-shape": "long.png (50 x 10)",
    "imbalance": "to 24 (ant)",
    "class-without-images": "eel",
}
"""Kinds of findings that are worth a look."""


def plant(root: Path) -> Path:
    """Make the data set: three lists beside the folder ``images``."""
    painter, images = Painter(), root / "images"

    def paint(name: str, size: tuple[int, int] = (10, 10)) -> Image.Image:
        return Image.open(painter.paint(images / name, size))

    train = [f"ant/{number:02d}.png 0" for number in range(11)]
    for line in train:
        paint(line.split()[0])
    (images / "empty.png").touch()
    whole = painter.paint(images / "short.png", (40, 40)).read_bytes()
    (images / "short.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("<html>not found</html>")
    for copy, original in {"copy.png": "01", "other.png": "02", "twin.png": "03"}.items():
        Image.open(images / f"ant/{original}.png").save(images / copy)  # other bytes, the same pixels
    paint("x.png").convert("CMYK").save(images / "cmyk.tif")
    Image.fromarray(painter.random.integers(0, 2**16, (10, 10)).astype(np.uint16)).save(images / "deep.png")
    clear = paint("x.png").convert("RGBA")
    clear.putpixel((0, 0), (9, 9, 9, 0))
    clear.save(images / "clear.png")
    paint("x.png").convert("L").save(images / "grey.png")
    paint("x.png").convert("P", palette=Image.Palette.ADAPTIVE).save(images / "palette.png")
    paint("x.png").save(images / "moving.gif", save_all=True, append_images=[paint("y.png")])
    paint("long.png", (50, 10))
    for name in ("bee/1", "cat/1", "bee/2", "cat/2", "bee/3", "dog/1", "unlabelled", "far"):
        paint(f"{name}.png")
    (images / "x.png").unlink()
    (images / "y.png").unlink()

    train += ["gone.png 0", "empty.png 0", "unlabelled.png", "far.png 7", "/photos/1.png 0", "../secret.png 1"]
    train += ["short.png 0", "text.png 0", "other.png 1", "twin.png 0", "ant/04.png 0"]
    train += ["cmyk.tif 0", "deep.png 0", "clear.png 0", "grey.png 0", "palette.png 0", "moving.gif 0", "long.png 0"]
    train += ["bee/1.png bee", "cat/1.png 2"]
    validation = ["copy.png 0", "bee/2.png 1", "cat/2.png 2"]
    test = ["ant/00.png 0", "bee/3.png 1", "dog/1.png 3"]
    for name, lines in {"train": train, "val": validation, "test": test}.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root
