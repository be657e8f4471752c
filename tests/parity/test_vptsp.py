"""VPTSP against the authors' code: embeddings, proxies, state, losses, gradients, and three steps with a bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vispeft
from tests.parity.test_parity import FOLDER, below, read
from vispeft.proxies.losses import proxy_loss
from vispeft.proxies.semantic import SemanticProxies

STEPS = [path for path in sorted(FOLDER.glob("vptsp_*.safetensors")) if path.stem.startswith(("vptsp_g", "vptsp_m"))]
BANKS, LOSSES = sorted(FOLDER.glob("vptsp_bank*.safetensors")), sorted(FOLDER.glob("vptsp_losses*.safetensors"))
CLAIMED = {*STEPS, *BANKS, *LOSSES}
INTEGRATORS = {"mix": "momentum"}


def head(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))


class Towers:
    """The adapted backbone, the head and the criterion, with the file's tensors."""

    def __init__(self, meta: dict[str, Any], tensors: dict[str, Tensor], bank: bool = False) -> None:
        given, sizes = meta["method"], meta["timm_vit"]
        width, dim = sizes["embed_dim"], given["out_dim"]
        self.model = VisionTransformer(**sizes).eval()
        self.model.load_state_dict(below(tensors, "backbone."))
        method = vispeft.VPTSP(
            num_tokens=given["n"],
            depth=given["depth_p"],
            step=given["step"],
            class_tokens=given["n_p"],
            class_depth=given["p_depth"],
            class_step=given["p_step"],
            integrator=INTEGRATORS.get(given["mix"], given["mix"]),
            keep=given["keep"],
            learned_share=given["bias_ratio"],
            alpha=given["alpha"],
            bank=bank,
        )
        self.bank = vispeft.attach(self.model, method, verify=False)
        self.head = head(width, dim)
        self.criterion: SemanticProxies = method.criterion(self.model, head(width, dim), given["n_classes"], dim)
        self.fill(tensors)

    def named(self) -> dict[str, Tensor]:
        """The trained tensors by their names in the file."""
        criterion, prompts = self.criterion, self.bank.named_tensors()["/vptsp.prompts"]
        found: dict[str, Any] = {f"adapter.prompts.{i}": prompts[i][None] for i in range(len(prompts))}
        stored = criterion.prompts
        blocks = stored.blocks if hasattr(stored, "blocks") else stored.bank.transpose(0, 1)
        found |= {f"adapter.class_prompts.{i}": tensor for i, tensor in enumerate(blocks)}
        for name, layers in (("head", self.head), ("proxy_head", criterion.head)):
            for part, layer in zip(("norm", "proj"), layers, strict=True):
                found |= {f"adapter.{name}.{part}.{key}": tensor for key, tensor in layer.named_parameters()}
        found |= {f"adapter.gru.{key}": tensor for key, tensor in criterion.integrator.named_parameters()}
        found["adapter.proxy_bias"] = criterion.offsets
        for key, tensor in self.bank.named_tensors().items():
            if "/bitfit" in key:
                path, _, name = key.partition("/bitfit.")
                found[f"backbone.{path}.{name}"] = tensor
        return found

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.named().items():
            tensor.copy_(tensors[name])
        self.criterion.state.copy_(tensors["state.container"])

    def gradients(self) -> dict[str, Tensor | None]:
        """The gradients of the trained tensors by their names in the file."""
        prompts = self.bank.named_tensors()["/vptsp.prompts"].grad
        assert prompts is not None
        found = {name: tensor.grad for name, tensor in self.named().items() if ".prompts." not in name}
        return found | {f"adapter.prompts.{i}": prompts[i][None] for i in range(len(prompts))}

    def parameters(self) -> list[nn.Parameter]:
        return [*self.bank.named_tensors().values(), *self.head.parameters(), *self.criterion.parameters()]

    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.model.forward_features(images)[:, 0]), dim=1)


def close(name: str, found: Tensor, wanted: Tensor, relative: float) -> None:
    error = (found - wanted).abs().max()
    assert error <= relative * wanted.abs().max() + 1e-5 * (relative < 1e-3), f"{name}: {error:.1e}"


def without_keys(name: str, tensor: Tensor) -> Tensor:
    """Leave out the key's third of the bias of ``qkv``, whose gradient is rounding alone."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_two_steps_equal_the_authors_code(path: Path) -> None:
    meta, tensors = read(path)
    towers = Towers(meta, tensors)
    criterion = towers.criterion.train()
    with torch.no_grad():
        tokens = towers.model.forward_features(tensors["input.x1"])
    close("tokens", tokens, tensors["out.eval_tokens1"], 1e-4)
    for step in ("1", "2"):
        images, labels = tensors[f"input.x{step}"], tensors[f"input.y{step}"]
        embeddings = towers.embed(images)
        made = criterion.make(images, labels)
        wanted = below(tensors, f"step{step}.")
        close("embed", embeddings, wanted["embed"], 1e-4)
        order = torch.stack([(made.classes == label).nonzero()[0, 0] for label in dict.fromkeys(labels.tolist())])
        close("vectors", made.vectors, wanted["semantic_per_sample"], 1e-4)
        close("folded", made.folded[order], wanted["semantic_per_class"], 1e-4)
        close("state", made.state, wanted["container_after"], 1e-4)
        close("all", made.all, wanted["proxies_all"], 1e-4)
        close("batch", made.batch[order], wanted["proxies_batch"], 1e-4)
        for kind in ("anchor", "nca"):
            alpha = meta["method"]["alpha"]
            for scope, proxies, targets in (
                ("both_all", made.all, labels),
                ("in_batch", made.batch, made.owners),
            ):
                loss = proxy_loss(embeddings, proxies, targets, kind=kind, alpha=alpha)
                close(f"{kind}.{scope}", loss.reshape(1), wanted[f"loss.{kind}.{scope}"].reshape(1), 1e-4)
        criterion(embeddings, labels, images)
        assert torch.equal(criterion.state, made.state)


@pytest.mark.parametrize("against", ["all", "batch"])
@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_gradients_equal_the_authors_code(path: Path, against: str) -> None:
    meta, tensors = read(path)
    towers = Towers(meta, tensors)
    images, labels = tensors["input.x1"], tensors["input.y1"]
    made = towers.criterion.make(images, labels)
    proxies, targets = (made.all, labels) if against == "all" else (made.batch, made.owners)
    proxy_loss(towers.embed(images), proxies, targets, alpha=meta["method"]["alpha"]).backward()
    group = "grad." if against == "all" else "grad_in_batch."
    wanted, compared = below(tensors, group), 0
    for name, gradient in towers.gradients().items():
        if name not in wanted:
            assert gradient is None or not gradient.any(), name
            continue
        assert gradient is not None, name
        found, expected = without_keys(name, gradient), without_keys(name, wanted[name])
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-7, name
        compared += 1
    assert compared == len(wanted)


@pytest.mark.parametrize("bank", [True, False], ids=["bank", "dense"])
@pytest.mark.parametrize("path", BANKS, ids=lambda path: path.stem)
def test_steps_of_an_optimiser_equal_the_authors_code(path: Path, bank: bool) -> None:
    meta, tensors = read(path)
    towers, given = Towers(meta, tensors, bank), meta["method"]
    criterion = towers.criterion.train()
    rest = [p for p in towers.parameters() if p is not criterion.offsets]
    settings = {"weight_decay": given.get("decay", 0)}
    groups = [{"params": rest, "lr": given["lr"]}, {"params": [criterion.offsets], "lr": given["lr_proxy"]}]
    optimizer = torch.optim.AdamW(groups, **settings)
    criterion.watch(optimizer)
    group = "" if bank else "dense."
    for step in range(len(given["steps"])):
        images, labels = (tensors[f"input.{kind}{step + 1}"] for kind in "xy")
        optimizer.zero_grad()
        loss = criterion(towers.embed(images), labels, images)
        assert abs(loss.item() - tensors[f"{group}loss{step + 1}"].item()) <= 1e-4
        loss.backward()
        optimizer.step()
    for name, found in (towers.named() | {"state.container": criterion.state}).items():
        wanted = tensors[f"{group}after.{name}"]
        assert torch.allclose(without_keys(name, found), without_keys(name, wanted), rtol=0, atol=1e-5), name


@pytest.mark.parametrize("path", LOSSES, ids=lambda path: path.stem)
def test_the_loss_equals_the_authors_code(path: Path) -> None:
    meta, tensors = read(path)
    hyper = meta["hyper"] if isinstance(meta["hyper"], dict) else json.loads(meta["hyper"])
    alpha = hyper.get("vptsp_criterion", {}).get("alpha", 32)
    order = tensors["vptsp_criterion.order"]
    embeddings, labels = tensors["embeddings"][order], tensors["labels"][order]
    present, inverse = labels.unique(return_inverse=True)
    for kind in ("anchor", "nca"):
        for scope in ("both_all", "in_batch"):
            proxies = tensors["proxies"].clone().requires_grad_()
            inside = scope == "in_batch"
            columns, targets = (proxies[present], inverse) if inside else (proxies, labels)
            loss = proxy_loss(embeddings, columns, targets, kind=kind, alpha=alpha)
            loss.backward()
            wanted = below(tensors, f"vptsp_criterion.{kind}.{scope}.")
            close(f"{kind}.{scope}", loss.reshape(1), wanted["loss"], 1e-4)
            assert proxies.grad is not None
            close(f"{kind}.{scope} gradient", proxies.grad, wanted["grad_proxies"], 1e-4)
    anchored = tensors["proxies"].clone().requires_grad_()
    loss = proxy_loss(tensors["embeddings"], anchored, tensors["labels"], pull="present")
    close("Proxy-Anchor", loss.reshape(1), tensors["proxy_anchor.loss"], 1e-4)
