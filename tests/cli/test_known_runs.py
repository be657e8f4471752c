"""Every tool knows every run: classes by name, tasks by kind, and runs of mmsegmentation by their commands."""

import pytest
from lightning.pytorch import seed_everything

import vispeft
from tests.tiny import TINY
from vispeft.backbones.create import create_model
from vispeft.cli import evaluate
from vispeft.cli.runs import Run
from vispeft.data import ImageFolderData, MaskFolderData
from vispeft.errors import BackboneError, ConfigError, DataError, FileError
from vispeft.tasks import Classification, MultiLabel, Segmentation

COMMON = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "method": vispeft.SSF(), "num_classes": 3}


def make(task, **settings):
    seed_everything(0)
    return task(**COMMON, **settings)


def test_classes_of_data_are_compared_by_name_and_order(finished, monkeypatch):
    run = Run.open(finished)
    names = evaluate.class_names(run)
    assert names == list("0123456789")
    monkeypatch.setattr(evaluate, "class_names", lambda run: names[::-1])
    with pytest.raises(DataError, match=r"in another order than .*: 0, 1, .* here, and 9, 8, .* there"):
        evaluate.load_run(run)
    monkeypatch.setattr(evaluate, "class_names", lambda run: [*names[:-1], "ten", "more"])
    with pytest.raises(DataError, match=r"other classes than .*: 9 here alone, and ten, more there alone"):
        evaluate.load_run(run)


def test_a_run_that_names_no_classes_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    for content, message in (('{"class_names": null}', "names no classes"), ("[", "cannot be read")):
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
