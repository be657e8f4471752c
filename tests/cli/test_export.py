"""Finished runs as ONNX files and `torch.export` programs."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch

import vispeft
from tests.tiny import TINY
from vispeft.cli.evaluate import load_task
from vispeft.cli.export import InputSize, export_run
from vispeft.cli.runs import Run
from vispeft.errors import ConfigError, ExportError, FileError
from vispeft.interop.export import Difference, check, export_onnx, export_program
from vispeft.interop.staging import staged
from vispeft.tasks import Segmentation

SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def session(path):
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def traces(path):
    """Look for paths of this machine, which stack traces have."""
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    return any(str(Path(module.__file__).parent).encode() in content for module in (vispeft, timm))


@pytest.fixture(scope="module")
def trained(finished):
    """The task of the finished run."""
    return load_task(Run.open(finished))[0]


@torch.no_grad()
def test_onnx_of_a_run(finished, trained, run_cli, tmp_path):
    out = tmp_path / "digits.onnx"
    result = run_cli("export", finished, "--out", out)
    assert result.status == 0, result.err
    assert list(tmp_path.iterdir()) == [out]
    made = session(out)
    for count in (1, 5):
        images = noise(count, 3, 16, 16)
        (scores,) = made.run(["scores"], {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(scores), trained(images), atol=1e-5)
    assert made.get_inputs()[0].shape == ["batch", 3, 16, 16]
    notes = {key: json.loads(value) for key, value in made.get_modelmeta().custom_metadata_map.items()}
    said = json.loads((finished / "adapter/adapter.json").read_text())
    assert notes["class_names"] == list("0123456789")
    assert {key: notes[key] for key in ("preprocessing", "output", "metrics")} == {
        key: said[key] for key in ("preprocessing", "output", "metrics")
    }
    assert notes["merged"] == "yes"
    assert not traces(out)
    for line in ("digits.onnx", f"{out.stat().st_size:,}", "batch x 3 x 16 x 16", "yes"):
        assert line in result.out


@torch.no_grad()
def test_program_of_a_run(finished, trained, run_cli, tmp_path):
    out = tmp_path / "digits.pt2"
    result = run_cli("export", finished, "--format", "export", "--out", out)
    assert result.status == 0, result.err
    program = torch.export.load(out)
    for count in (1, 5):
        images = noise(count, 3, 16, 16)
        assert torch.allclose(program.module()(images), trained(images), atol=1e-5)
    assert program.state_dict.keys() == timm.create_model(trained.backbone, num_classes=10, **TINY).state_dict().keys()
    assert not traces(out)
    notes = json.loads((tmp_path / "digits.json").read_text())
    assert notes["preprocessing"]["mean"] == list(trained.preprocessing.mean)
    assert notes["input"] == {"name": "images", "shape": ["batch", 3, 16, 16], "dtype": "float32", "multiple_of": None}


def test_nothing_is_overwritten(finished, run_cli, tmp_path):
    (tmp_path / "digits.onnx").write_text("mine")
    (tmp_path / "digits.json").write_text("mine")
    assert "not overwritten" in run_cli("export", finished, "--out", tmp_path / "digits.onnx").err
    result = run_cli("export", finished, "--format", "export", "--out", tmp_path / "digits.pt2")
    assert "digits.json exists" in result.err
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_batch_can_be_fixed(finished, run_cli, tmp_path):
    result = run_cli("export", finished, "--format", "export", "--out", tmp_path / "a.pt2", "--batch", 3)
    assert result.status == 0, result.err
    program = torch.export.load(tmp_path / "a.pt2").module()
    assert program(noise(3, 3, 16, 16)).shape == (3, 10)
    with pytest.raises((AssertionError, RuntimeError), match="Guard failed"):
        program(noise(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "a.pt2"), "ends in .onnx"),
        (("--out", "a.onnx", "--batch", "0"), "--batch is 0"),
        (("--out", "a.onnx", "--size", "24", "16"), "Input height (24) doesn't match model (16)"),
        (("--out", "a.onnx", "--any_size"), "flexible_size"),
    ],
)
def test_what_cannot_be_exported_is_refused(finished, run_cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run_cli("export", finished, *arguments)
    assert result.status == 2
    assert message in result.err
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_left(trained, monkeypatch, tmp_path):
    monkeypatch.setattr("vispeft.cli.export.check", lambda *_: Difference(absolute=2e-4, largest=1.0))
    with pytest.raises(ExportError, match=r"2\.0e-04 of the largest"):
        export_run(trained, tmp_path / "a.pt2", InputSize(height=16, width=16))
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(finished, run_cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = run_cli("export", finished, "--out", tmp_path / "a.onnx")
    assert 'pip install "vispeft[export]"' in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@torch.no_grad()
def test_prompts_are_exported_unmerged_at_any_size(run_cli, config, tmp_path):
    config.write_text(
        config.read_text().replace("vispeft.SSF", "vispeft.VPT").replace("img_size", "flexible_size: true, img_size")
    )
    assert run_cli("train", config, *SHORT, "--out", tmp_path / "run").status == 0
    out = tmp_path / "digits.onnx"
    result = run_cli("export", tmp_path / "run", "--out", out, "--any_size")
    assert result.status == 0, result.err
    assert "no plain model inserts tokens" in result.out
    made, (task, _) = session(out), load_task(Run.open(tmp_path / "run"))
    assert made.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for shape in ((2, 3, 16, 16), (1, 3, 40, 24)):
        (scores,) = made.run(None, {"images": noise(*shape).numpy()})
        assert torch.allclose(torch.from_numpy(scores), task(noise(*shape)), atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_segmentation_at_any_size(tmp_path):
    small = {**TINY, "img_size": 32, "flexible_size": True}
    task = Segmentation(
        backbone="vit_tiny_patch16_224",
        backbone_args=small,
        method=vispeft.SSF(),
        num_classes=4,
        decoder="linear",
        taps=[1],
    )
    exported = export_run(task.eval(), tmp_path / "a.pt2", InputSize(height=32, width=32, step=(8, 8)))
    assert exported.merged == "yes"
    assert exported.shape == ["batch", 3, "height", "width"]
    program = torch.export.load(tmp_path / "a.pt2").module()
    for shape in ((1, 3, 32, 32), (2, 3, 24, 48)):
        scores = program(noise(*shape))
        assert scores.shape == (shape[0], 4, *shape[2:])
        assert torch.allclose(scores, task(noise(*shape)), atol=1e-5)
    assert json.loads((tmp_path / "a.json").read_text())["input"]["multiple_of"] == [8, 8]


# ------------------------------------------------------------------ the functions


@pytest.fixture(scope="module")
def swin():
    small = {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "pretrained": False}
    model = vispeft.create_model("swin_tiny_patch4_window7_224", num_classes=5, flexible_size=True, **small).eval()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2))
    with torch.no_grad():
        for _, tensor in bank.trainable_parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return model


@pytest.mark.slow
def test_swin_as_onnx(swin, tmp_path):
    pytest.importorskip("onnxruntime")
    export_onnx(swin, noise(1, 3, 56, 56), tmp_path / "swin.onnx")
    assert check(swin, tmp_path / "swin.onnx", [noise(count, 3, 56, 56) for count in (1, 3)]).relative < 1e-5


@pytest.mark.slow
def test_swin_as_a_program_of_one_size(swin):
    program = export_program(swin, noise(1, 3, 56, 84))
    assert check(swin, program, [noise(count, 3, 56, 84) for count in (1, 3)]).relative < 1e-5
    with pytest.raises(ExportError, match="shape \\(1, 3, 84, 84\\)"):
        check(swin, program, [noise(1, 3, 84, 84)])
    with pytest.raises(ExportError, match="for each size"):
        export_program(swin, noise(1, 3, 56, 56), dynamic_size=True)


class Odd(torch.nn.Module):
    """Gives what a test asks for."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def test_check_finds_what_differs():
    images = noise(2, 3, 4, 4)
    program = export_program(Odd(lambda x: 2 * x).eval(), images)
    found = check(Odd(lambda x: 2 * x + 1e-3), program, [images])
    assert found.absolute == pytest.approx(1e-3, rel=1e-3)
    assert found.largest == pytest.approx(float((2 * images + 1e-3).abs().max()))
    assert found.relative == pytest.approx(found.absolute / found.largest)
    assert check(Odd(lambda x: x / 0), program, [images]).relative == float("inf")
    with pytest.raises(ExportError, match=r"gives {'scores': \(2, 3, 4, 4\)}, and the model {'scores': \(2, 3\)}"):
        check(Odd(lambda x: x.mean((2, 3))), program, [images])


def test_models_that_are_not_ready_are_refused():
    with pytest.raises(ConfigError, match=r"model.eval\(\)"):
        export_program(Odd(lambda x: x), noise(2, 3, 4, 4))
    with pytest.raises(ExportError, match="gives 2 tensors"):
        export_program(Odd(lambda x: (x + 1, x + 2)).eval(), noise(2, 3, 4, 4))
    with pytest.raises(ExportError, match="could not be traced"):
        export_program(Odd(lambda x: x if float(x.sum()) > 0 else -x).eval(), noise(2, 3, 4, 4))


def test_files_get_their_names_together_or_not_at_all(tmp_path):
    with staged(tmp_path / "a.pt2") as place:
        place.write_text("1")
        place.with_suffix(".json").write_text("2")
        assert not (tmp_path / "a.pt2").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.pt2"]
    with pytest.raises(ConfigError, match=r"a\.json exists"), staged(tmp_path / "a.onnx") as place:
        place.with_suffix(".json").write_text("3")
    assert (tmp_path / "a.json").read_text() == "2"
    assert not (tmp_path / "a.onnx").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="could not be written"), staged(tmp_path / "file/a.onnx"):
        pass


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["pads inside", "refuses", "pads as timm does"])
def test_an_onnx_file_takes_the_sizes_of_its_model(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    settings = {"backbone": "vit_tiny_patch16_224", "method": vispeft.SSF(), "num_classes": 3}
    small = {**TINY, "img_size": 32, "flexible_size": True}
    if kind == "pads inside":
        model = Segmentation(backbone_args=small, decoder="linear", taps=[1], **settings).network()
    else:
        small = {**small, "dynamic_img_pad": kind != "refuses"}
        model = vispeft.create_model("vit_tiny_patch16_224", num_classes=3, **small)
    model.eval()
    export_onnx(model, noise(1, 3, 32, 32), tmp_path / "a.onnx", dynamic_size=True)
    made = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 32, 32), (2, 3, 24, 48), (1, 3, 36, 40), (1, 3, 33, 32), (3, 3, 50, 47)):
        fits = shape[2] % 8 == 0 and shape[3] % 8 == 0
        if kind == "refuses" and not fits:
            with pytest.raises(AssertionError, match="divisible by patch size"):
                model(noise(*shape))
            with pytest.raises(Exception, match=r"(?i)reshape"):
                made.run(None, {"images": noise(*shape).numpy()})
            continue
        (scores,) = made.run(None, {"images": noise(*shape).numpy()})
        assert torch.allclose(torch.from_numpy(scores), model(noise(*shape)), atol=1e-5)
