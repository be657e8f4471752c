"""Every tool knows every run: classes by name, tasks by kind, and runs of mmsegmentation by their commands."""

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image
from sklearn.datasets import load_digits

import vispeft
from tests.tiny import TINY
from vispeft.backbones.create import create_model
from vispeft.cli import doctor, evaluate, merge
from vispeft.cli.evaluation import evaluate as measure
from vispeft.cli.runs import Run
from vispeft.data import ImageFolderData, MaskFolderData
from vispeft.errors import BackboneError, ConfigError, DataError, FileError, MergeError
from vispeft.tasks import Classification, MultiLabel, Segmentation

COMMON = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "method": vispeft.SSF(), "num_classes": 3}


def make(task, **settings):
    seed_everything(0)
    return task(**COMMON, **settings)


def test_data_that_number_their_classes_themselves_are_refused_in_another_order(finished, monkeypatch):
    run = Run.open(finished)
    names = evaluate.class_names(run)
    assert names == list("0123456789")
    monkeypatch.setattr(evaluate, "class_names", lambda run: names[::-1])
    with pytest.raises(DataError, match=r"have the classes 0, 1, .*, and .* has 9, 8, .* DigitsData numbers"):
        evaluate.load_run(run)
    monkeypatch.setattr(evaluate, "class_names", lambda run: [*names[:-1], "ten", "more"])
    with pytest.raises(DataError, match=r"other classes than .*: 9 here alone, and ten, more there alone"):
        evaluate.load_run(run)


def test_folders_of_some_classes_are_measured_by_name(finished, run_cli, tmp_path):
    greys = [(grey * 255 / 16).round().astype(np.uint8) for grey in load_digits().images]
    cli = evaluate.load_run(Run.open(finished))
    cli.datamodule.fit_to(cli.model.preprocessing)
    images = torch.from_numpy(np.stack(greys))[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        found = cli.model(cli.datamodule.preprocessing.transform()(images)).argmax(1)
    known = int(found[found > 1].mode().values)
    other = 9 if known < 9 else 8
    for order, index in enumerate((found == known).nonzero().flatten()[:18].tolist()):
        folder = tmp_path / "digits" / ("train", "val", "test")[order % 3] / str(known if order < 9 else other)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(greys[index]).save(folder / f"{index}.png")
    data = ["--data=ImageFolderData", f"--data.root={tmp_path / 'digits'}"]
    cli = evaluate.load_run(Run.open(finished), data)
    assert measure(cli.trainer, cli.model, cli.datamodule, "test")["accuracy"] == 0.5  # by position 0
    result = run_cli("evaluate", finished, *data)
    assert result.status == 0, result.err
    assert "8 of the model's 10 classes are not in the data" in result.out
    for split in ("train", "val", "test"):
        (tmp_path / "digits" / split / str(known)).rename(tmp_path / "digits" / split / "three")
    result = run_cli("evaluate", finished, *data)
    assert result.status == 2
    assert "three here alone" in result.err


def test_splits_that_are_drawn_are_said_to_be_others_than_those_of_the_run(tmp_path, capsys, monkeypatch):
    for name in "ac":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / f"{number}.png")
    monkeypatch.setattr(evaluate, "class_names", lambda run: ["c", "a"])
    monkeypatch.setattr(evaluate, "_compare_colours", lambda run, data: None)
    evaluate.match_names(Run(tmp_path, {}), ImageFolderData(root=str(tmp_path)), 2)
    assert "test and validation are drawn at random" in capsys.readouterr().out


def test_a_run_that_names_no_classes_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    for content, message in (
        ('{"class_names": null}', "names no classes"),
        ("[", "cannot be read"),
        ("[" * 200_000, "cannot be read"),
    ):
        (tmp_path / "adapter/adapter.json").write_text(content)
        with pytest.raises(FileError, match=message):
            evaluate.class_names(Run(tmp_path, {}))


@pytest.mark.parametrize(
    "call",
    [
        ("predict", "RUN", "images", "--out", "out"),
        ("evaluate", "RUN"),
        ("merge", "RUN", "--out", "a.safetensors"),
        ("export", "RUN", "--out", "a.onnx"),
        ("train", "--resume", "RUN"),
        ("inspect", "RUN"),
        ("doctor", "RUN"),
    ],
)
def test_a_run_of_mmsegmentation_is_answered_with_its_commands(call, run_cli, tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    for name in ("toy.py", "iter_2.pth", "metrics.json"):
        (place / name).write_text("raise SystemExit('a config is code')")
    result = run_cli(*(str(place) if token == "RUN" else token for token in call))
    assert result.status == 2
    for wanted in (
        f"{place} is a run of mmsegmentation",
        f"vispeft train {place / 'toy.py'} --resume {place}",
        f"tools/test.py {place / 'toy.py'} {place / 'iter_2.pth'}",
        f"mmseg.apis.init_model('{place / 'toy.py'}', '{place / 'iter_2.pth'}')",
    ):
        assert wanted in result.err


def test_the_doctor_names_the_config_of_a_run(finished, capsys):
    with pytest.raises(SystemExit) as left:
        doctor.main([str(finished)])
    assert left.value.code == 1
    said = f"{finished} is a run, and no data. To check the data it was trained on: doctor {finished}/config.yaml"
    assert said in capsys.readouterr().out


def test_a_merge_that_plain_timm_does_not_equal_leaves_no_file_and_names_another_way(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "TOLERANCE", dict.fromkeys(merge.TOLERANCE, -1.0))
    with pytest.raises(MergeError, match=r"so no file is left.*`vispeft export` writes what was trained"):
        merge.merge_run(Run.open(finished), tmp_path / "plain.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_task_or_of_other_maps_is_refused(tmp_path):
    task = make(Classification)
    task.bank.annotate(output=task.output())
    task.save_adapter(tmp_path / "class")
    with pytest.raises(FileError, match="targets of the kind 'class', and the task has 'multilabel'"):
        make(MultiLabel).load_adapter(tmp_path / "class")
    first = make(Segmentation, decoder="linear", taps=[1])
    first.bank.annotate(output=first.output())
    first.save_adapter(tmp_path / "maps")
    make(Segmentation, decoder="linear", taps=[1]).load_adapter(tmp_path / "maps")
    with pytest.raises(FileError, match=r"another decoder than the task has: taps \[1\] there, \[0, 1\] here"):
        make(Segmentation, decoder="linear", taps=[0, 1]).load_adapter(tmp_path / "maps")


@pytest.mark.parametrize("name", ["convnext_tiny", "maxvit_tiny_tf_224", "resnet18"])
def test_a_family_that_is_not_supported_is_said_at_once(name):
    for size in ({}, {"img_size": 64}):
        with pytest.raises(BackboneError, match=r"not supported.* Supported are vit_.*swin_") as found:
            Segmentation(**{**COMMON, "backbone": name, "backbone_args": {"pretrained": False, **size}})
        assert "img_size=" not in str(found.value)
    assert create_model("resnet18", pretrained=False, num_classes=2).num_classes == 2


def test_dictionaries_that_configs_take_are_answered_with_the_object(tmp_path):
    for make, message in (
        (lambda: ImageFolderData(root=str(tmp_path), augment={"flip": 0.5}), r"Augmentation\(flip=0.5\)"),
        (
            lambda: MaskFolderData(root=str(tmp_path), class_names=["a", "b"], augment={"flip": 0.5}),
            r"MaskAugmentation\(flip=0.5\)",
        ),
        (lambda: Segmentation(**COMMON, inference={"mode": "slide"}), r"Inference\(mode='slide'\)"),
        (lambda: Classification(**{**COMMON, "method": {"rank": 4}}), r"Method\(rank=4\)"),
        (lambda: Segmentation(**{**COMMON, "method": "lora"}), r"method='lora'.*a script gives an object"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
