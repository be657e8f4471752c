import errno
import json
import os
import shutil

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file

import vispeft
from tests.cli.conftest import call
from tests.tiny import CONFIG, TINY
from vispeft.cli.evaluate import load_run
from vispeft.cli.evaluation import evaluate, evaluation_trainer
from vispeft.cli.runs import Run
from vispeft.data import DigitsData, ScenesData
from vispeft.data.cache import CachedSplit, OutputFiles
from vispeft.data.images import Reading
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.storage.locks import hold
from vispeft.tasks import Classification, feature_cache
from vispeft.tasks.feature_cache import cache_features

SLOW = [pytest.param(damage, marks=pytest.mark.slow) for damage in ("letter", "earlier version")]
PROBE = ("--model.method=linear_probe", "--model.lr=0.1")


def make(method=None, seed=0, data=None, **backbone):
    seed_everything(seed)
    task = Classification(
        backbone="vit_tiny_patch16_224",
        backbone_args={**TINY, **backbone},
        num_classes=10,
        method=method or vispeft.LinearProbe(),
    )
    return task, DigitsData.for_model(task.model, **{"batch_size": 100, **(data or {})})


def keep(task, data, folder):
    cache_features(task, data, evaluation_trainer(accelerator="cpu"), folder)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_outputs_equal_those_of_the_images(tmp_path, name):
    small = {
        "vit": TINY,
        "swin": {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
        "eva02": {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 2},
    }[name.partition("_")[0]]
    args = {**small, "pretrained": False}
    task = Classification(backbone=name, backbone_args=args, num_classes=10, method=vispeft.LinearProbe()).eval()
    data = DigitsData.for_model(task.model, batch_size=120)
    images = list(data.val_dataloader())
    keep(task, data, tmp_path)
    with torch.no_grad():
        for (batch, labels), (outputs, targets) in zip(images, data.val_dataloader(), strict=True):
            assert torch.equal(task(outputs), task(batch))
            assert torch.equal(labels, targets)


def test_a_run_is_the_same_with_kept_outputs(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    kept = ("--cache_features", tmp_path / "kept")
    for name, more in (("plain", ()), ("first", kept), ("second", kept)):
        result = call("train", config, *PROBE, *more, "--out", tmp_path / name)
        assert result.status == 0, result.err
    heads = [load_file(tmp_path / name / "adapter/head.safetensors") for name in ("plain", "first", "second")]
    # Training batches are mixed, so that the last bits of an output may differ from those it has among other images.
    assert all(torch.allclose(heads[0][key], heads[1][key], rtol=1e-5, atol=1e-6) for key in heads[0])
    assert all(torch.equal(heads[1][key], heads[2][key]) for key in heads[1])
    run = Run.open(tmp_path / "second")
    cli = load_run(run)
    assert evaluate(cli.trainer, cli.model, cli.datamodule, "test") == run.metrics["test"]
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_outputs_are_computed_once_and_only_for_what_they_are_of(tmp_path, monkeypatch):
    compute, made = feature_cache._compute, []

    def counted(files, *, split, **given):
        made.append(len(split))
        return compute(files, split=split, **given)

    monkeypatch.setattr(feature_cache, "_compute", counted)
    keep(*make(), tmp_path)
    assert made == [1077, 360, 360]
    keep(*make(), tmp_path)
    assert len(made) == 3
    keep(*make(seed=1), tmp_path)  # other weights
    assert len(made) == 6
    keep(*make(data={"mean": (0.1, 0.1, 0.1)}), tmp_path)
    assert len(made) == 9
    keep(*make(data={"split_seed": 1}), tmp_path)  # other images in each split
    assert len(made) == 12
    keep(*make(data={"batch_size": 50}), tmp_path)
    assert len(made) == 15
    # Digits have no transparency, but files of images do; the largest number of pixels changes none.
    task, data = make()
    keys = {
        json.dumps(feature_cache._shared_key(task, replace(data, reading), evaluation_trainer(accelerator="cpu")))
        for reading in (Reading(), Reading(transparency=(0, 0, 0)), Reading(value_range=(0, 9)), Reading(max_pixels=9))
    }
    assert len(keys) == 3


def replace(data, reading):
    data.reading = reading
    return data


@pytest.mark.parametrize("damage", ["byte", "cut", "meta", "gone", "type", *SLOW])
def test_damage_is_noticed(tmp_path, caplog, damage):
    task, data = make()
    keep(task, data, tmp_path)
    expected = data.split("train").outputs["pooled"].clone()
    for home in tmp_path.iterdir():
        file = home / "pooled.npy"
        content = bytearray(file.read_bytes())
        if damage == "byte":
            content[-3] ^= 1
            file.write_bytes(content)
        elif damage == "cut":
            file.write_bytes(content[:-4])
        elif damage == "gone":
            file.unlink()
        else:
            meta = json.loads((home / "meta.json").read_text())
            if damage == "meta":
                meta["key"]["batch_size"] = 1
            elif damage == "type":
                meta["dtypes"]["pooled"] = "bfloat16"
            elif damage == "letter":
                meta["dtypes"]["poolled"] = meta["dtypes"].pop("pooled")
            else:
                del meta["digest"]
            (home / "meta.json").write_text(json.dumps(meta))
    task, data = make()
    with caplog.at_level("WARNING", logger="vispeft"):
        keep(task, data, tmp_path)
    assert caplog.text.count("computed again") == 3
    assert torch.equal(data.split("train").outputs["pooled"], expected)


def test_random_numbers_are_the_same_whether_outputs_are_computed_or_read(tmp_path):
    drawn = []
    for _ in range(2):
        task, data = make()
        keep(task, data, tmp_path)
        drawn.append(torch.rand(3))
    make()
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], torch.rand(3))


def test_leftovers_of_killed_computations_go(tmp_path):
    for name in (".part-of-another", ".part-x1y2z3_4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pooled.npy").write_text("half")
    with hold(tmp_path / ".busy.lock", "The folder"):
        (tmp_path / ".part-busy").mkdir()  # of a key that is being computed
        keep(*make(), tmp_path)
        assert (tmp_path / ".part-busy").is_dir()
    assert len([path for path in tmp_path.iterdir() if path.name != ".part-busy"]) == 3
    shutil.rmtree(tmp_path / ".part-busy")
    homes = sorted(path.name for path in tmp_path.iterdir())
    for name in homes:
        (tmp_path / f".{name}.lock").touch()  # killed behind its last step
    keep(*make(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == homes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_before_anything_is_mapped(tmp_path, monkeypatch, number):
    """A page of a mapped file for which there is no room ends the process by a signal."""

    def full(handle, offset, size):
        assert size == os.fstat(handle).st_size > 1077 * 32 * 4
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileError, match=os.strerror(number)):
        keep(*make(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_room_is_taken_by_writing_where_the_file_system_cannot_take_it(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    task, data = make()
    keep(task, data, tmp_path / "a")
    monkeypatch.setattr(os, "posix_fallocate", cannot)
    other_task, other = make()
    keep(other_task, other, tmp_path / "b")
    assert torch.equal(data.split("train").outputs["pooled"], other.split("train").outputs["pooled"])


def test_a_stopped_computation_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OutputFiles, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            keep(*make(), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="could not be kept"):
        keep(*make(), tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": vispeft.SSF()}, "ssf acts inside the backbone"),
        ({"data": {"augment": True}}, "training images are augmented"),
        ({"drop_rate": 0.1}, "head_drop drops other values"),
    ],
)
def test_what_changes_is_not_kept(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        keep(*make(**arguments), tmp_path)


def test_an_augmentation_nobody_declared_is_found(tmp_path):
    task, data = make()
    data.split("train").augment = lambda image: image + torch.randint(0, 2, (), dtype=torch.uint8)
    with pytest.raises(ConfigError, match="training images are augmented"):
        keep(task, data, tmp_path)


def test_other_data_modules_are_refused(tmp_path):
    task, _ = make()
    with pytest.raises(DataError, match="is no ImageData"):
        keep(task, object(), tmp_path)


def test_data_with_masks_are_refused(tmp_path):
    task, _ = make()
    with pytest.raises(ConfigError, match="cropped anew in every epoch"):
        keep(task, ScenesData.for_model(task.model, images=6, scene_size=16), tmp_path)


def test_half_precision_is_kept_bit_for_bit(tmp_path):
    task, data = make()
    task.base_dtype = torch.bfloat16
    task.model.to(torch.bfloat16)
    images, _ = next(iter(data.val_dataloader()))
    keep(task, data, tmp_path)
    split = data.split("validation")
    assert isinstance(split, CachedSplit)
    assert split.outputs["pooled"].dtype == torch.bfloat16
    with torch.no_grad():
        expected = task.bank.plan().method.frozen_outputs(task.model.eval(), images.bfloat16())["pooled"]
    assert torch.equal(split.batch([(0, index) for index in range(100)])[0]["pooled"], expected)
