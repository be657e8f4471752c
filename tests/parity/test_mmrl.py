"""MMRL and MMRL++ against their public code: tokens, blocks, features, scores, loss, and the gradients of both."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vispeft
from tests.parity.beyond import DTYPES, GRADIENT, OUTPUT, differs, file
from tests.parity.test_adapter_plus import planned
from tests.parity.test_parity import backbone, below
from vispeft.adapters.bank import AdapterBank
from vispeft.core.method import Step
from vispeft.errors import ConfigError
from vispeft.methods.mmrl import RepresentationTokens, mmrl_head
from vispeft.storage.class_embeddings import ClassEmbeddings

FILES = {"mmrl_vit": "mmrl", "mmrlpp_vit": "mmrl++"}
LEARNER = "representation_learner."


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collect the authors' vision tensors under our names, those of blocks in one."""
    ends = {
        f"{LEARNER}compound_rep_tokens": "tokens",
        f"{LEARNER}srra_r2vproj.weight": "weight",
        "image_encoder.A": "read_A",
        "image_encoder.B": "read_B",
        "image_encoder.proj_rep": "read",
    }
    found = {own: theirs[name] for name, own in ends.items() if name in theirs}
    for own in ("weight", "bias", "A", "B"):
        each = [theirs.get(f"{LEARNER}{place}.{i}.{own}") for i in (0, 1) for place in PLACES]
        kept = [tensor for tensor in each if tensor is not None]
        if kept:
            found[own] = torch.stack(kept)
    return found


PLACES = ("srra_r2vproj.srra", "compound_rep_tokens_r2vproj")


def adapted(name: str, dtype: torch.dtype, folder: Path) -> tuple[Any, AdapterBank, dict[str, Any], dict[str, Tensor]]:
    """Make the tower with the file's adapter; its class embeddings are the file's text features."""
    meta, tensors = file(name)
    config = meta["config"]
    norm = partial(nn.LayerNorm, eps=config["norm_eps"])
    model: Any = backbone({**meta, "timm_kwargs": {**meta["timm_kwargs"], "norm_layer": norm}}, tensors, dtype)
    projection = model.head.weight.detach().float()
    texts = F.normalize(tensors["out.text_features"], dim=1)
    ClassEmbeddings(texts.float(), tuple(config["classes"]), 100.0, projection).save(folder / "classes.safetensors")
    model.reset_classifier(len(texts))
    wide = FILES[name] == "mmrl++"
    ranks = {"rank": 2, "read_rank": 5} if wide else {}
    method = vispeft.MMRL(
        classes=str(folder / "classes.safetensors"),
        variant=FILES[name],  # type: ignore[arg-type]
        num_tokens=config["tokens"],
        token_dim=config["rep_dim"],
        first_block=config["layers_1based"][0] - 1,
        beta=config["beta"],
        alpha=config["alpha"],
        reg_weight=config["reg_weight"],
        **ranks,
    )
    bank = vispeft.attach(model.to(dtype), method, verify=False)
    values = ours(below(tensors, "adapter."))
    with torch.no_grad():
        own = dict(unit_of(bank).named_parameters())
        assert own.keys() == values.keys()
        for key, value in values.items():
            own[key].copy_(value)
        head: Any = bank.head()
        head.to(dtype).weight.copy_(
            torch.cat([100 * share * texts for share in (config["alpha"], 1 - config["alpha"])], 1)
        )
    return model.to(dtype), bank, config, tensors


def unit_of(bank: AdapterBank) -> RepresentationTokens:
    return next(unit for unit in bank.units().values() if isinstance(unit, RepresentationTokens))


def compare_gradients(bank: AdapterBank, wanted: dict[str, Tensor], precision: str, without: str = "") -> None:
    gradients = ours(wanted)
    found = dict(unit_of(bank).named_parameters())
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        if name == without:
            continue
        assert differs(found[name].grad, gradient) <= GRADIENT[precision], name


def bundles(model: Any, images: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Run the model, and collect class token, representation tokens and patches behind each block."""
    seen: dict[str, Tensor] = {}

    def note(_: Any, __: Any, out: Any, name: str) -> None:
        if isinstance(out, Tensor):
            seen[name] = out
        else:
            beside = out.beside.get("mmrl", out.tokens[:, :0])
            seen[name] = torch.cat([out.tokens[:, :1], beside, out.tokens[:, 1:]], dim=1)

    hooks = [b.register_forward_hook(partial(note, name=f"block{i}")) for i, b in enumerate(model.blocks)]
    result = model.run(images)
    for hook in hooks:
        hook.remove()
    return result, seen


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", FILES)
def test_tokens_features_scores_and_gradients(name: str, precision: str, tmp_path: Path) -> None:
    dtype = DTYPES[precision]
    model, bank, config, tensors = adapted(name, dtype, tmp_path)
    images, unit = tensors["input.images"].to(dtype), unit_of(bank)
    result, seen = bundles(model, images)
    found = {f"tokens{i}": unit.tokens_of(config["layers_1based"][0] - 1 + i) for i in (0, 1)} | seen
    wanted = below(tensors, "mid.")
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert differs(value, wanted[key]) <= OUTPUT[precision], key
    pooled = model.norm(result.tokens)[:, 0]
    features = dict(zip(("class", "rep"), unit.both(pooled, result.kept["mmrl"][0]), strict=True))
    for key, value in features.items():
        assert differs(value, tensors[f"out.{key}_feature"]) <= OUTPUT[precision], key
    torch.stack(
        [(value * tensors[f"input.w.{key}"].to(dtype)).sum() for key, value in features.items()]
    ).sum().backward()
    compare_gradients(bank, below(tensors, "grad.adapter."), precision)
    scores = model(images)
    assert differs(scores, tensors["out.logits_fusion"]) <= OUTPUT[precision]
    with bank.disabled(), torch.no_grad():
        base = unit.projection @ model.forward_head(model.forward_features(images), pre_logits=True).T
    assert differs(base.T, tensors["out.base_class_feature"]) <= OUTPUT[precision]
    unseen = mmrl_head(ClassEmbeddings.load(tmp_path / "classes.safetensors"), config["alpha"], seen=False)
    bank.put_head("default", unseen.to(dtype))
    assert differs(model(images), tensors["out.logits"]) <= 2e-5  # of embeddings in float32


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", FILES)
def test_loss(name: str, precision: str, tmp_path: Path) -> None:
    dtype = DTYPES[precision]
    model, bank, config, tensors = adapted(name, dtype, tmp_path)
    images, labels = tensors["input.images"].to(dtype), tensors["input.labels"]
    result = model.run(images)
    output = model.forward_head(model.features(result))
    term = bank.loss_terms((images, labels), output, result)
    loss = F.cross_entropy(output, labels) + term
    texts = F.cosine_similarity(tensors["out.text_features"], tensors["out.zero_shot_text_features"], dim=1)
    whole = loss + config["reg_weight"] * (1 - texts.mean())  # the distance of texts, which are fixed here
    assert differs(whole, tensors["out.loss"]) <= OUTPUT[precision]
    loss.backward()
    # The shared tokens enter the text tower too, which is not run here: their gradient has a second part there.
    compare_gradients(bank, below(tensors, "grad_loss.adapter."), precision, without="tokens")
    assert all(parameter.grad is None for parameter in bank.head().parameters())  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="class numbers"):
        bank.plan("default").method.loss_term(bank, "default", Step((images, torch.rand(2)), output, result))


def test_counts_of_the_visual_part() -> None:
    """The papers' counts are these and those of the text tower's layers, 294,400 and 1,838,592."""
    name = "vit_base_patch16_clip_224"
    assert planned(name, vispeft.MMRL(joint=512)) == 518912
    assert planned(name, vispeft.MMRL(joint=512, variant="mmrl")) == 3153664
    for variant, whole in (("mmrl++", 813312), ("mmrl", 4992256)):
        text = 7 * (4 * (512 + 512) + 512) + 512 * 512 if variant == "mmrl++" else 7 * (512 * 512 + 512)
        assert planned(name, vispeft.MMRL(joint=512, variant=variant)) + text == whole
