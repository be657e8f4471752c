"""`create_model` on hubs that answer, do not answer, or are not needed."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
import timm
import torch

from tests.backbones.small import ARCHITECTURE, ARGS, tiny
from vispeft.backbones import hub
from vispeft.backbones.create import create_model
from vispeft.errors import BackboneError


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
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.5)
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

    monkeypatch.setattr(hub, "_probe_address", silent)
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
