"""The demo: adapters of one backbone share it and answer as they do alone; the page itself is opened in a browser."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vispeft
from vispeft.cli import demo
from vispeft.cli.demo_models import load_models
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.data.images import Reading, read_image
from vispeft.errors import ConfigError, DataError, FileError


@pytest.fixture(scope="module")
def second(finished, tmp_path_factory):
    """A run on the same backbone, with the adapter of another method."""
    place = tmp_path_factory.mktemp("second") / "run"
    shutil.copytree(finished, place)
    task, _ = load_task(Run.open(place))
    notes = task.bank.notes()
    torch.manual_seed(0)
    vispeft.attach(task.model, vispeft.LoRA(rank=2), name="second")
    task.bank.detach("default")
    generator = torch.Generator().manual_seed(0)
    for _, tensor in task.bank.trainable_parameters():
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    kept = ("class_names", "preprocessing", "output")
    task.bank.annotate(**{key: notes[key] for key in kept})
    shutil.rmtree(place / "adapter")
    task.bank.save(place / "adapter")
    return place


@pytest.fixture
def image():
    return (torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0)) * 255).byte()


def test_adapters_of_one_backbone_share_it(finished, second, image):
    models = load_models([str(finished), str(second)])
    first, other = models.values()
    assert first.task.model is other.task.model
    assert other.task.bank.names == ["adapter1", "adapter2"]
    for run, model in ((finished, first), (second, other), (finished, first)):  # there and back again
        task, _ = load_task(Run.open(run))
        with torch.inference_mode():
            row = task.predictor()([image])[0].row
        answer = model.answer(image)
        best = max(answer.probabilities, key=answer.probabilities.__getitem__)
        assert [best, f"{answer.probabilities[best]:.6f}"] == row
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert max(answer.attention.size) >= 300
        assert answer.pictures == []
    assert "lora on vit_tiny_patch16_224" in other.facts


def test_what_cannot_be_shown_is_refused(finished, tmp_path, run_cli, monkeypatch):
    with pytest.raises(ConfigError, match="was given twice"):
        load_models([str(finished), str(finished)])
    with pytest.raises(FileError, match="There is no run directory"):
        load_models([str(tmp_path / "none")])
    shutil.copytree(finished, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "adapter")
    with pytest.raises(FileError, match="is no finished run"):
        load_models([str(tmp_path / "stopped")])
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run_cli("demo", finished)
    assert result.status == 2
    assert 'needs the extra demo: pip install "vispeft[demo]"' in result.err


def test_a_gallery_that_is_too_large_is_refused(finished, tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("vispeft.cli.demo_models.GALLERY", 0)
    with pytest.raises(ConfigError, match="has 1 images, and the demo embeds at most 0"):
        load_models([str(finished)], str(tmp_path))


def test_images_are_read_as_for_predictions(tmp_path):
    """gradio hands over the file: its own conversion takes a GIF's palette for grey values and clips 16 bits."""
    gradio = pytest.importorskip("gradio", reason="the extra demo is not installed")
    component = gradio.Image(type="filepath", image_mode=None)
    red = np.full((2, 3, 3), (200, 0, 0), np.uint8)
    upright = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    turned = Image.Exif()
    turned[274] = 6
    clear = np.dstack([red, np.zeros((2, 3), np.uint8)])
    saved = {
        "red.gif": (Image.fromarray(red).quantize(2), {}),
        "deep.png": (Image.fromarray(np.full((2, 3), 51400, np.uint16)), {}),
        "clear.png": (Image.fromarray(clear), {}),
        "turned.png": (upright, {"exif": turned}),
    }
    white, found = Reading(transparency=(255, 255, 255)), {}
    for name, (picture, options) in saved.items():
        picture.save(tmp_path / name, **options)
        handed = component.preprocess(gradio.data_classes.ImageData(path=str(tmp_path / name), orig_name=name))
        found[name] = demo.read_upload(Path(handed), white)
        assert torch.equal(found[name], read_image(tmp_path / name, reading=white))
    assert found["red.gif"][:, 0, 0].tolist() == [200, 0, 0]
    assert found["deep.png"].unique().tolist() == [200]
    assert found["clear.png"].unique().tolist() == [255]
    assert found["turned.png"].shape == (3, 3, 2)


def test_images_that_cannot_be_shown_are_refused(tmp_path):
    Image.new("RGB", (5000, 2)).save(tmp_path / "long.png")
    with pytest.raises(ConfigError, match="5000 x 2 pixels; the demo takes up to 4096"):
        demo.read_upload(tmp_path / "long.png", Reading())
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"^text\.png cannot be read as an image"):
        demo.read_upload(tmp_path / "text.png", Reading())
