"""`create_model`: names, local files, shipped backbones, sizes, and hubs that do not answer."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vispeft.backbones import create
from vispeft.backbones.create import create_model, list_zoo_backbones
from vispeft.errors import BackboneError, ConfigError, FileError, UnknownNameError

ARCHITECTURE = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def tiny(num_classes: int = 7, **args: Any) -> nn.Module:
    """A small ViT with weights that are not those of a fresh one: every tensor is random."""
    torch.manual_seed(1)
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, **{**ARGS, **args}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The weights of the small ViT in a safetensors file."""
    save_file(tiny().state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def load(path: Path, **args: Any) -> nn.Module:
    return create_model(ARCHITECTURE, weights=path, **{**ARGS, **args}).eval()


# ------------------------------------------------------------------------------------------------------- names


def test_random_weights_are_timms_own_and_the_source_is_kept() -> None:
    torch.manual_seed(0)
    plain = timm.create_model(ARCHITECTURE, num_classes=5, **ARGS)
    torch.manual_seed(0)
    model = create_model(ARCHITECTURE, pretrained=False, num_classes=5, **ARGS)
    assert type(model) is type(plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    source = model.__dict__["_vispeft_source"]
    assert json.loads(json.dumps(source)) == source
    assert source == {"name": ARCHITECTURE, "args": {**ARGS, "num_classes": 5, "pretrained": False}}
    again = create_model(source["name"], **source["args"])
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.augreg_in22k", "augreg_in21k"),
        ("zo:vit", "zoo:"),
    ],
)
def test_unknown_name_lists_near_ones(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=near):
        create_model(name)


def test_unknown_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="embed_dimm=3"):
        create_model(ARCHITECTURE, pretrained=False, embed_dimm=3)


def test_weights_and_pretrained_false_contradict(file: Path) -> None:
    with pytest.raises(ConfigError, match="pretrained=False"):
        load(file, pretrained=False)


# ------------------------------------------------------------------------------------------------- local files


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


# -------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", ARGS),
        ("deit_tiny_distilled_patch16_224", ARGS),
        ("eva02_tiny_patch14_224", {**ARGS, "embed_dim": 48, "num_heads": 3}),
        ("vit_small_patch16_dinov3", {**ARGS, "embed_dim": 48, "num_heads": 3}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
        ),
        (
            "swinv2_tiny_window8_256",
            {"img_size": 32, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
        ),
    ],
)
@torch.no_grad()
def test_flexible_size(name: str, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = create_model(name, pretrained=False, num_classes=3, flexible_size=True, **args).eval()
    for size in ((32, 32), (64, 48), (48, 72)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3)


def test_flexible_size_is_refused_where_a_family_has_no_way() -> None:
    with pytest.raises(BackboneError, match="mvitv2"):
        create_model("mvitv2_tiny", pretrained=False, flexible_size=True)
    with pytest.raises(BackboneError, match="dynamic_img_size"):
        create_model("hf-hub:someone/some", flexible_size=True)


# ---------------------------------------------------------------------------------------------------------- zoo


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo elsewhere, with one backbone in half precision."""
    folder = tmp_path / "zoo" / "backbones" / "mini"
    folder.mkdir(parents=True)
    save_file({k: v.half() for k, v in tiny().state_dict().items()}, folder / "model.safetensors")
    config = {
        "architecture": ARCHITECTURE,
        "args": ARGS,
        "num_classes": 7,
        "preprocessing": {
            "input_size": [3, 32, 32],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
        },
        "license": "Apache-2.0",
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("VISPEFT_ZOO", str(tmp_path / "zoo"))
    return folder


@torch.no_grad()
def test_zoo_backbone(zoo: Path) -> None:
    assert list_zoo_backbones() == ["mini"]
    model = create_model("zoo:mini").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), tiny().half().float()(images))
    described = timm.data.resolve_model_data_config(model)
    assert described["input_size"] == (3, 32, 32)
    assert described["mean"] == (0.1, 0.2, 0.3)
    assert described["interpolation"] == "bilinear"
    assert model.__dict__["_vispeft_source"] == {"name": "zoo:mini", "args": {}}
    assert create_model("zoo:mini", num_classes=3, img_size=48).pos_embed.shape == (1, 37, 24)
    fresh = create_model("zoo:mini", pretrained=False)
    assert fresh.num_classes == 7
    assert not torch.equal(fresh.norm.weight, model.norm.weight)


def test_zoo_errors(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="'mini'"):
        create_model("zoo:minni")
    weights = zoo / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(bytes(whole))
    with pytest.raises(FileError, match="sha256"):
        create_model("zoo:mini")
    weights.unlink()
    with pytest.raises(FileError, match="missing"):
        create_model("zoo:mini")
    (zoo / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"config\.json"):
        create_model("zoo:mini")
    monkeypatch.setenv("VISPEFT_ZOO", str(zoo))
    with pytest.raises(FileError, match="VISPEFT_ZOO"):
        create_model("zoo:mini")


def test_every_shipped_backbone_loads_and_is_small() -> None:
    names = list_zoo_backbones()
    assert {"vit_tiny", "swin_tiny"} <= set(names)
    for name in names:
        folder = create.zoo_folder() / "backbones" / name
        model = create_model(f"zoo:{name}").eval()
        size = timm.data.resolve_model_data_config(model)["input_size"]
        with torch.no_grad():
            assert torch.isfinite(model(torch.zeros(1, *size))).all()
        assert (folder / "model.safetensors").stat().st_size < 8_000_000
        card = (folder / "CARD.md").read_text(encoding="utf-8")
        assert name in card
        assert "License" in card or "Licence" in card


# --------------------------------------------------------------------------------------------------------- hubs


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub whose port nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", [ARCHITECTURE, f"{ARCHITECTURE}.augreg_in21k", "hf-hub:timm/vit_tiny_patch16_224.x"])
def test_unreachable_hub_says_what_to_do(no_hub: None, tmp_path: Path, name: str) -> None:
    started = time.monotonic()
    with pytest.raises(BackboneError) as caught:
        create_model(name, cache_dir=tmp_path)
    assert time.monotonic() - started < 10
    for part in ("cannot be reached", "timm/vit_tiny_patch16_224", "weights=", "create_model('vit_tiny_patch16_224'"):
        assert part in str(caught.value)


def test_silent_hub_does_not_hang(monkeypatch: pytest.MonkeyPatch, no_hub: None, tmp_path: Path) -> None:
    """It accepts connections and never says a word."""
    monkeypatch.setattr(create, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(BackboneError, match="cannot be reached"):
            create_model(ARCHITECTURE, cache_dir=tmp_path)
        assert time.monotonic() - started < 8


def cached_copy(cache: Path, repository: str, files: dict[str, bytes]) -> None:
    """Lay files where the hub's client keeps what it fetched."""
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)


@torch.no_grad()
def test_cached_copy_is_used_when_the_hub_is_out_of_reach(no_hub: None, tmp_path: Path, file: Path) -> None:
    repository = timm.get_pretrained_cfg(ARCHITECTURE).hf_hub_id
    cached_copy(tmp_path / "cache", repository, {"model.safetensors": file.read_bytes()})
    started = time.monotonic()
    model = create_model(ARCHITECTURE, num_classes=4, cache_dir=tmp_path / "cache", **ARGS).eval()
    assert time.monotonic() - started < 10
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.forward_features(images), tiny().forward_features(images))
    assert model.__dict__["_vispeft_source"]["name"] == ARCHITECTURE


@torch.no_grad()
def test_cached_copy_of_a_repository(no_hub: None, tmp_path: Path, file: Path) -> None:
    described = {"num_classes": 7, "input_size": [3, 32, 32], "classifier": "head", "first_conv": "patch_embed.proj"}
    config = {"architecture": ARCHITECTURE, "num_classes": 7, "model_args": ARGS, "pretrained_cfg": described}
    content = {"model.safetensors": file.read_bytes(), "config.json": json.dumps(config).encode()}
    cached_copy(tmp_path / "cache", "someone/some", content)
    model = create_model("hf-hub:someone/some", cache_dir=tmp_path / "cache").eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), tiny()(images))


def test_model_without_pretrained_weights() -> None:
    with pytest.raises(BackboneError, match="knows of none"):
        create_model("swinv2_cr_tiny_384")


def test_weights_at_a_plain_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few models are on no hub; torch keeps what it fetched for them under its own folder."""

    def silent(url: str) -> None:
        raise OSError(url)

    monkeypatch.setattr(create, "_url_probe", silent)
    with pytest.raises(BackboneError, match=r"gcvit_xxtiny.* https://"):
        create_model("gcvit_xxtiny", cache_dir=tmp_path)
    address = timm.get_pretrained_cfg("gcvit_xxtiny").url
    torch.manual_seed(0)
    state = timm.create_model("gcvit_xxtiny").state_dict()
    torch.save(state, tmp_path / address.rsplit("/", 1)[-1])
    # timm itself checks the digest in the name, of which a file made here knows nothing.
    monkeypatch.setattr("timm.models._builder._CHECK_HASH", False)
    model = create_model("gcvit_xxtiny", cache_dir=tmp_path)
    assert torch.equal(model.state_dict()["head.fc.weight"], state["head.fc.weight"])
