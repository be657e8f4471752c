"""Class embeddings: their files, scores without training, the teacher of masks, and the way from open_clip to timm."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vispeft
from vispeft.cli import encode_classes as command
from vispeft.errors import BackboneError, ConfigError, FileError
from vispeft.heads.zero_shot import zero_shot
from vispeft.interop.open_clip import encode_classes, load_clip, load_visual
from vispeft.methods.mask import ZeroShotUnit
from vispeft.storage.class_embeddings import ClassEmbeddings

NAMES = ("cat", "sea lake", "river")


def made(classes: int = 3, joint: int = 6, width: int = 24) -> ClassEmbeddings:
    torch.manual_seed(0)
    unit = nn.functional.normalize(torch.randn(classes, joint), dim=-1)
    names = (*NAMES, *(f"class {number}" for number in range(3, classes)))[:classes]
    return ClassEmbeddings(unit, names, 50.0, torch.randn(joint, width), "random")


def vit(**settings: Any) -> Any:
    torch.manual_seed(1)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    return vispeft.create_model("vit_tiny_patch16_224", pretrained=False, **{**small, **settings}).eval()


def test_an_adapter_beside_it() -> None:
    model = vit(num_classes=6)
    classes = made()
    zero_shot(model, classes)
    images = torch.randn(2, 3, 16, 16)
    plain = model(images)
    assert plain.shape == (2, 3)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2))
    assert model(images).shape == (2, 3)
    with bank.disabled():
        assert torch.equal(model(images), plain)


def test_files(tmp_path: Path) -> None:
    classes = made()
    classes.save(tmp_path / "classes.safetensors")
    found = ClassEmbeddings.load(tmp_path / "classes.safetensors")
    assert torch.equal(found.embeddings, classes.embeddings)
    assert torch.equal(found.projection, classes.projection)
    assert (found.class_names, found.scale, found.source) == (NAMES, 50.0, "random")
    two = found.ordered(["river", "cat"])
    assert torch.equal(two.embeddings, classes.embeddings[[2, 0]])
    with pytest.raises(ConfigError, match="first 'rivers', have no embedding"):
        found.ordered(["rivers", "cat"])


GOOD = {"kind": "vispeft class embeddings", "schema": "1", "class_names": '["a", "b"]', "scale": "10", "source": ""}
TENSORS = {"embeddings": torch.eye(2), "projection": torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("notes", "tensors", "message"),
    [
        ({"schema": "2"}, {}, "schema 1"),
        ({"kind": ""}, {}, "no file of class embeddings"),
        ({"class_names": "["}, {}, "readable"),
        ({"class_names": '["a"]'}, {}, "1 class name for 2 embeddings"),
        ({"class_names": '["a", "a"]'}, {}, "twice"),
        ({"class_names": '["a", 1]'}, {}, "class names"),
        ({"scale": "nan"}, {}, "the scale is"),
        ({"scale": "-1"}, {}, "the scale is"),
        ({"scale": "x"}, {}, "readable"),
        ({}, {"embeddings": 2 * torch.eye(2)}, "norm of an embedding"),
        ({}, {"embeddings": torch.eye(3)[:2]}, "3 dimensions, and the projection gives 2"),
        ({}, {"embeddings": torch.tensor([[float("nan"), 0], [0, 1]])}, "not finite"),
        ({}, {"projection": torch.ones(4)}, "a float32 matrix is needed"),
        ({}, {"other": torch.ones(4)}, "embeddings and projection are needed"),
    ],
)
def test_broken_files(notes: dict[str, str], tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.safetensors"
    save_file({**TENSORS, **tensors}, path, {**GOOD, **notes})
    with pytest.raises(FileError, match=message):
        ClassEmbeddings.load(path)


def test_missing_and_cut_off_files(tmp_path: Path) -> None:
    path = tmp_path / "classes.safetensors"
    with pytest.raises(FileError, match="There is no file of class embeddings"):
        ClassEmbeddings.load(path)
    made().save(path)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(FileError, match="cannot be read"):
        ClassEmbeddings.load(path)


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="are for 25 features, and the model has 24"):
        zero_shot(vit(), made(width=25))
    model = vit()
    vispeft.attach(model, vispeft.LoRA(rank=2))
    with pytest.raises(ConfigError, match="no adapters yet"):
        zero_shot(model, made())


def test_teacher_of_masks(tmp_path: Path) -> None:
    classes = made()
    path = str(tmp_path / "classes.safetensors")
    classes.save(path)
    model = vit()
    bank = vispeft.attach(model, vispeft.Mask(dropout=1.0, teacher=path))
    (teacher,) = (unit for unit in bank.units().values() if isinstance(unit, ZeroShotUnit))
    features = torch.randn(4, 24)
    joint = nn.functional.normalize(features @ classes.projection.T, dim=-1)
    torch.testing.assert_close(teacher.scores(features), 50 * joint @ classes.embeddings.T)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    bank.start_from([(images, labels)])
    out = model.train()(images)
    loss = nn.functional.cross_entropy(out, labels) + bank.loss_terms((images, labels), out)
    loss.backward()
    assert all(unit.M.grad.isfinite().all() for unit in bank.units().values() if hasattr(unit, "M"))
    bank.save(tmp_path / "adapter")
    other = vit()
    assert vispeft.load(other, tmp_path / "adapter").plan().method.teacher is None
    for settings, message in (
        ({"dropout": 0.0, "teacher": path}, "no effect without dropout"),
        ({"dropout": 1.0, "teacher": str(tmp_path / "none")}, "There is no file"),
    ):
        with pytest.raises((ConfigError, FileError), match=message):
            vispeft.attach(vit(), vispeft.Mask(**settings))
    with pytest.raises(ConfigError, match="3 classes and 24 features, and the model has 4 and 24"):
        vispeft.attach(vit(num_classes=4), vispeft.Mask(dropout=1.0, teacher=path))


def test_linear_start_is_near_the_scores() -> None:
    classes = made()
    features = torch.randn(50, 24)
    linear, scores = features @ classes.linear_weight(features).T, classes.scores(features)
    assert (linear.argmax(1) == scores.argmax(1)).all()  # each image's scores are those of the cosines times a number
    torch.testing.assert_close(linear.norm(), scores.norm(), rtol=0.2, atol=0)


class Clip(nn.Module):
    """The parts of an open_clip model that are read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Embedding(300, 6)
        self.visual = nn.Module()
        self.visual.proj = nn.Parameter(torch.randn(24, 6))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.text(tokens).sum(1)


def tokens(texts: list[str]) -> Tensor:
    return torch.tensor([[ord(letter) % 300 for letter in f"{text:60}"] for text in texts])


def test_encoding() -> None:
    model = Clip().eval()
    found = encode_classes(model, tokens, ["sea_lake", "cat"], ("a {}.", "the {}."))
    assert found.class_names == ("sea_lake", "cat")
    features = [nn.functional.normalize(model.encode_text(tokens([text])), dim=-1) for text in ("a cat.", "the cat.")]
    wanted = nn.functional.normalize(sum(features), dim=-1)
    torch.testing.assert_close(found.embeddings[1:], wanted.detach())
    torch.testing.assert_close(found.projection, model.visual.proj.detach().T)
    assert found.scale == pytest.approx(20.0855, rel=1e-4)
    for names, templates, message in (
        ([], ("a {}.",), "at least one"),
        (["cat"], ("a cat.",), "has to have {} once"),
    ):
        with pytest.raises(ConfigError, match=message):
            encode_classes(model, tokens, names, templates)
    del model.visual.proj
    with pytest.raises(ConfigError, match="no linear projection"):
        encode_classes(model, tokens, ["cat"])


def test_missing_weights_are_an_early_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none are downloaded\. Place the checkpoint of ViT-B-16 there"):
        load_clip("ViT-B-16", tmp_path / "open_clip_model.safetensors")
    (tmp_path / "names.txt").write_text("cat\n")
    arguments = [str(tmp_path / "names.txt"), "--clip", "ViT-B-16", "--weights", str(tmp_path / "no"), "--out"]
    with pytest.raises(FileError, match="Place the checkpoint"):
        command.main([*arguments, str(tmp_path / "out.safetensors")])
    with pytest.raises(ConfigError, match=r"should end in \.safetensors"):
        command.main([*arguments, str(tmp_path / "out.pt")])


def test_a_program_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    """OpenAI's files are TorchScript archives; the command of the docs ended in torch's refusal of them."""
    path = tmp_path / "ViT-B-16.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    with pytest.raises(FileError, match=r"TorchScript archive.*open_clip_model.safetensors"):
        load_clip("ViT-B-16-quickgelu", path)


@pytest.mark.slow
def test_visual_tower_of_open_clip() -> None:
    library = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "head_width": 12}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    clip = library.CLIP(6, vision, text, quick_gelu=True).eval()
    model: Any = vit(depth=2, pre_norm=True, act_layer="quick_gelu", norm_layer=partial(nn.LayerNorm, eps=1e-5))
    load_visual(model, clip.state_dict())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = clip.encode_image(images)
        found = model.forward_head(model.forward_features(images), pre_logits=True) @ clip.visual.proj
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(BackboneError, match="does not fit"):
        load_visual(vit(depth=3, pre_norm=True), clip.state_dict())


def test_states_without_a_visual_tower() -> None:
    with pytest.raises(BackboneError, match="no visual tower"):
        load_visual(vit(), {"transformer.x": torch.ones(1)})
