"""`create_model` with local weight files: whole, partial, damaged, harmful, and of another layout."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.backbones.small import load, tiny
from vispeft.backbones.create import create_model
from vispeft.errors import BackboneError, ConfigError, FileError


@pytest.mark.parametrize("kind", ["safetensors", "pth", "nested.pth", "half"])
@torch.no_grad()
def test_file_gives_the_same_function(tmp_path: Path, kind: str) -> None:
    model = tiny()
    path = tmp_path / f"w.{'pth' if kind.endswith('pth') else 'safetensors'}"
    if kind == "half":
        model = model.half().float()
        save_file({k: v.half() for k, v in model.state_dict().items()}, path)
    elif kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        state = model.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if kind.startswith("nested") else state, path)
    loaded = load(path)
    images = torch.randn(2, 3, 32, 32)
    assert loaded.head.weight.dtype == torch.float32
    assert torch.equal(loaded(images), model(images))
    assert loaded.__dict__["_vispeft_source"]["weights"] == path.name
    assert str(tmp_path) not in json.dumps([loaded.__dict__["_vispeft_source"], loaded.pretrained_cfg["file"]])


@torch.no_grad()
def test_other_class_count_starts_a_classifier_and_keeps_the_rest(file: Path) -> None:
    model, loaded, bare = tiny(), load(file, num_classes=3), load(file, num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    assert loaded(images).shape == (2, 3)
    assert loaded.num_classes == 3
    assert not loaded.head.bias.any()
    assert 0.01 < loaded.head.weight.std() < 0.03
    assert isinstance(bare.head, nn.Identity)


def test_file_without_classifier(tmp_path: Path) -> None:
    save_file(tiny(num_classes=0).state_dict(), tmp_path / "bare.safetensors")
    assert isinstance(load(tmp_path / "bare.safetensors").head, nn.Identity)
    assert load(tmp_path / "bare.safetensors", num_classes=4).head.out_features == 4


def test_positions_are_resized(file: Path) -> None:
    loaded = load(file, img_size=64)
    assert loaded.pos_embed.shape == (1, 65, 24)
    assert torch.equal(loaded.pos_embed[:, 0], tiny().pos_embed[:, 0])
    assert loaded(torch.randn(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_missing_backbone_tensor_is_noticed_at_every_class_count(tmp_path: Path, num_classes: int | None) -> None:
    tensors = tiny().state_dict()
    del tensors["blocks.1.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(BackboneError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        load(tmp_path / "less.safetensors", num_classes=num_classes)


def test_another_architecture_is_refused(file: Path) -> None:
    with pytest.raises(BackboneError, match=r"tiny\.safetensors.*do not fit"):
        load(file, embed_dim=48)


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "net.model."])
def test_names_with_a_prefix_are_shown(tmp_path: Path, prefix: str) -> None:
    """Hundreds of letters of missing keys told nothing of what the file has."""
    tensors = {f"{prefix}{key}": tensor for key, tensor in tiny().state_dict().items()}
    torch.save({"state_dict": {**tensors, "loss.weight": torch.ones(3)}}, tmp_path / "task.ckpt")
    with pytest.raises(BackboneError, match=rf"called like {prefix}\w+, .* behind the prefix '{prefix}'"):
        load(tmp_path / "task.ckpt")


def test_swin_file(tmp_path: Path) -> None:
    """Its classifier has another name, and resizing changes its buffers."""
    args = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=6, **args).eval()
    save_file(model.state_dict(), tmp_path / "swin.safetensors")
    for flexible in (False, True):
        loaded = create_model(
            "swin_tiny_patch4_window7_224",
            weights=tmp_path / "swin.safetensors",
            num_classes=6,
            flexible_size=flexible,
            **args,
        ).eval()
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images))


@pytest.mark.parametrize(
    "content", [b"", b"\x08\0\0\0\0\0\0\0{bad", "truncated"], ids=["empty", "nonsense", "truncated"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_file(tmp_path: Path, content: bytes | str, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    if content == "truncated":
        if suffix == ".pth":
            torch.save(tiny().state_dict(), path)
        else:
            save_file(tiny().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.write_bytes(bytes(content))
    with pytest.raises(FileError, match=r"bad\."):
        load(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        load(tmp_path / "no.safetensors")
    with pytest.raises(FileError, match="directory"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    with open(tmp_path / "harm.pth", "wb") as out:
        pickle.dump({"head.weight": Harm()}, out)
    torch.save({"head.weight": Harm()}, tmp_path / "zipped.pth")
    for name in ("harm.pth", "zipped.pth"):
        with pytest.raises(FileError, match=name):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@torch.no_grad()
def test_npz(tmp_path: Path) -> None:
    """The layout of the original JAX release: kernels as (in, out), heads apart."""
    model = tiny(num_classes=0)
    heads, width = 3, 24
    arrays: dict[str, np.ndarray] = {}

    def norm(name: str, layer: nn.LayerNorm) -> None:
        arrays[f"{name}/scale"], arrays[f"{name}/bias"] = layer.weight.numpy(), layer.bias.numpy()

    def linear(name: str, weight: torch.Tensor, bias: torch.Tensor, *shape: int) -> None:
        arrays[f"{name}/kernel"] = weight.t().reshape(*(shape or weight.t().shape)).numpy()
        arrays[f"{name}/bias"] = bias.reshape(-1, shape[-1]).squeeze(0).numpy() if shape[1:] else bias.numpy()

    arrays["embedding/kernel"] = model.patch_embed.proj.weight.permute(2, 3, 1, 0).numpy()
    arrays["embedding/bias"] = model.patch_embed.proj.bias.numpy()
    arrays["cls"] = model.cls_token.numpy()
    arrays["Transformer/posembed_input/pos_embedding"] = model.pos_embed.numpy()
    norm("Transformer/encoder_norm", model.norm)
    for i, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{i}"
        norm(f"{at}/LayerNorm_0", block.norm1)
        norm(f"{at}/LayerNorm_2", block.norm2)
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * width, (j + 1) * width)
            attention = f"{at}/MultiHeadDotProductAttention_1/{part}"
            linear(attention, block.attn.qkv.weight[rows], block.attn.qkv.bias[rows], width, heads, width // heads)
        out = f"{at}/MultiHeadDotProductAttention_1/out"
        arrays[f"{out}/kernel"] = block.attn.proj.weight.t().reshape(heads, width // heads, width).numpy()
        arrays[f"{out}/bias"] = block.attn.proj.bias.numpy()
        linear(f"{at}/MlpBlock_3/Dense_0", block.mlp.fc1.weight, block.mlp.fc1.bias)
        linear(f"{at}/MlpBlock_3/Dense_1", block.mlp.fc2.weight, block.mlp.fc2.bias)
    # The release numbers its parts 0, 1, 2, 3 with the norms among them; timm expects those numbers.
    np.savez(tmp_path / "jax.npz", **arrays)
    loaded = load(tmp_path / "jax.npz", num_classes=4)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.forward_features(images), model.forward_features(images))

    with pytest.raises(BackboneError, match=r"jax\.npz"):
        create_model("swin_tiny_patch4_window7_224", weights=tmp_path / "jax.npz")


def test_a_wrong_argument_is_not_blamed_on_the_file():
    with pytest.raises(ConfigError, match="classes=3, but timm's VisionTransformer takes no such argument") as told:
        create_model("zoo:vit_tiny", classes=3)
    assert "model.safetensors" not in str(told.value)
