"""The demo: adapters of one backbone share it and answer as they do alone; the page itself is opened in a browser."""

import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vispeft
from vispeft.cli import demo
from vispeft.cli.demo_models import load_models
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.errors import ConfigError, FileError


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


def test_images_of_gradio():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert torch.equal(demo.as_image(grey), torch.from_numpy(grey).expand(3, 2, 3))
    colours = np.random.default_rng(0).integers(0, 255, (2, 3, 4), dtype=np.uint8)
    assert torch.equal(demo.as_image(colours), torch.from_numpy(colours[..., :3]).permute(2, 0, 1))
    with pytest.raises(ConfigError, match="5000 x 2 pixels; the demo takes up to 4096"):
        demo.as_image(np.zeros((2, 5000, 3), np.uint8))
