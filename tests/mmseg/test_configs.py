# ruff: noqa: E402 - mmsegmentation may be missing, and is made importable by the plug-in
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg")
importlib.import_module("vispeft.mmseg")

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import init_model
from mmseg.datasets import ADE20KDataset, CityscapesDataset

from tests.cli.conftest import call
from tests.mmseg.toy import make_config
from vispeft.cli.runs import held
from vispeft.errors import ConfigError
from vispeft.mmseg import VispeftEarthDataset, datasets
from vispeft.mmseg.hooks import check_segmentor

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "mmseg"
SETS = {"earth": VispeftEarthDataset, "ade20k": ADE20KDataset, "cityscapes": CityscapesDataset}


SHALLOW = {"swin": {"depths": (1, 1, 1, 1)}, "vit": {"depth": 4}}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_shipped_configs_fit_together(path):
    config = Config.fromfile(path)
    assert path.read_text().startswith(f"# vispeft train mmseg/{path.stem}\n")
    data, family, _ = path.stem.split("_")
    found = SETS[data]
    assert config.train_dataloader.dataset.type == found.__name__
    if found is not VispeftEarthDataset:
        config.model.backbone.update(pretrained=False, model_args=SHALLOW[family])
    model = init_model(config, device="cpu")
    check_segmentor(model, found.METAINFO["classes"])
    with torch.no_grad():
        scores = model.encode_decode(torch.zeros(1, 3, 64, 64), [{"img_shape": (64, 64), "pad_shape": (64, 64)}])
    assert scores.shape == (1, len(found.METAINFO["classes"]), 64, 64)


@pytest.mark.slow
def test_earth_tiles_are_those_of_the_folder(tmp_path, monkeypatch):
    for index, split in enumerate(("train", "overlapping", "validation", "test")):
        for layer in ("images", "climates"):
            (tmp_path / layer / split).mkdir(parents=True)
            pixels = np.full((8, 8, 3) if layer == "images" else (8, 8), index, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / layer / split / f"tile{index}.png")
    monkeypatch.setattr(datasets, "cut_tiles", lambda root: tmp_path)
    found = {}
    for split, overlapping in (("train", False), ("train", True), ("validation", False), ("test", False)):
        pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
        with DefaultScope.overwrite_default_scope("mmseg"):
            data = VispeftEarthDataset(root="wheels", split=split, overlapping=overlapping, pipeline=pipeline)
        found[split, overlapping] = [int(data[index]["gt_seg_map"].max()) for index in range(len(data))]
        assert all(int(data[index]["img"].max()) in found[split, overlapping] for index in range(len(data)))
    assert sorted(found["train", True]) == [0, 1]
    assert [found["train", False], found["validation", False], found["test", False]] == [[0], [2], [3]]
    with pytest.raises(ConfigError, match="only train has overlapping"):
        VispeftEarthDataset(root="wheels", split="test", overlapping=True)


@pytest.fixture
def toy_config(toy, weights, tmp_path):
    config = make_config("vit", toy, weights, tmp_path)
    config.pop("work_dir")
    config.dump(str(tmp_path / "toy.py"))
    return tmp_path / "toy.py"


@pytest.mark.slow
def test_tool_trains_and_goes_on(toy_config, tmp_path):
    run = tmp_path / "run"
    result = call("train", toy_config, "--out", run)
    assert result.status == 0, result.err
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert set(metrics["validation"]) == {"aAcc", "mIoU", "mAcc"}
    assert metrics["parameters"]["backbone"]["method"] == "ssf"
    moved = run.rename(tmp_path / "moved")
    result = call("train", toy_config, "--resume", moved, "--cfg-options", "train_cfg.max_iters=3")
    assert result.status == 0, result.err
    assert (moved / "iter_3.pth").is_file()


class _Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("http://127.0.0.1:9/evil.pth", "cannot be read as data"),  # mmengine fetches an address and runs its code
        ("/elsewhere/evil.pth", "cannot be read as data"),
        ("../toy.py", "no checkpoint"),
        ("", "folder"),
        ("gone.pth", "no checkpoint"),
        ("config.pth", "which mmengine would run as Python"),  # it does so when it goes on
    ],
)
def test_a_run_of_somebody_else_names_no_code(toy_config, tmp_path, named, message):
    run, marker = tmp_path / "run", tmp_path / "MARKER"
    run.mkdir()
    torch.save({"state_dict": _Evil(marker)}, run / "evil.pth")
    torch.save({"meta": {"iter": 0, "epoch": 0, "config": f"open({str(marker)!r}, 'w')"}}, run / "config.pth")
    (run / "last_checkpoint").write_text(named)
    result = call("train", toy_config, "--resume", run)
    assert result.status == 2
    assert message in result.err
    assert not marker.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cfg-options", "train_dataloader.dataset.data_root=nowhere"], "that are not there"),
        (["--cfg-options", "train_dataloader.dataset.type=ToyShape"], "names 'ToyShape'"),
        (["--cfg-options", "model.decode_head.num_classes=7"], "num_classes is 7"),
        (["--cfg-options", "model.backbone.peft.type=SFF"], "Unknown method 'SFF'"),
        (["--resume", "nowhere"], "no checkpoint"),
        (["--out", "here", "--resume", "there"], "Leave --out out"),
    ],
)
def test_tool_refuses_in_one_line(toy_config, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = call("train", toy_config, *options)
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert message in result.err
    assert not list(tmp_path.glob("runs/*/*")), "nothing was trained, so nothing is kept"


def test_tool_says_which_config_cannot_be_read(tmp_path):
    (tmp_path / "broken.py").write_text("model = dict(")
    for name in ("broken.py", "missing.py"):
        assert f"{name} cannot be read" in call("train", tmp_path / name).err


def test_a_run_is_trained_by_one_process(toy_config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with held(run):
        result = call("train", toy_config, "--out", run)
    assert result.status == 2
    assert f"The run directory {run} is in use" in result.err
    assert list(run.iterdir()) == []
