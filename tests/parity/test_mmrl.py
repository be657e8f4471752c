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
from vispeft.errors import ConfigError, FileError, SiteError
from vispeft.interop import load_official, to_official
from vispeft.methods.mmrl import RepresentationTokens, mmrl_head
from vispeft.storage.class_embeddings import ClassEmbeddings
from vispeft.tasks import Classification

FILES = {"mmrl_vit": "mmrl", "mmrlpp_vit": "mmrl++"}
LEARNER = "representation_learner."


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
    hyper = {**config, "classes": str(folder / "classes.safetensors")}
    bank = load_official(model.to(dtype), "mmrl", below(tensors, "adapter."), {"hyper": hyper})
    method: Any = bank.plan().method
    assert (method.variant, method.first_block) == (FILES[name], config["layers_1based"][0] - 1)
    head: Any = bank.head()
    with torch.no_grad():
        head.to(dtype).weight.copy_(
            torch.cat([100 * share * texts for share in (config["alpha"], 1 - config["alpha"])], 1)
        )
    return model.to(dtype), bank, config, tensors


def unit_of(bank: AdapterBank) -> RepresentationTokens:
    return next(unit for unit in bank.units().values() if isinstance(unit, RepresentationTokens))


def compare_gradients(bank: AdapterBank, wanted: dict[str, Tensor], precision: str, without: str = "none") -> None:
    found = to_official(bank, "mmrl", grad=True)
    vision = {name: gradient for name, gradient in wanted.items() if "_r2tproj." not in name}
    assert found.keys() == vision.keys()
    for name, gradient in vision.items():
        if not name.endswith(without):
            assert differs(found[name], gradient) <= GRADIENT[precision], name


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
    compare_gradients(bank, below(tensors, "grad_loss.adapter."), precision, without="compound_rep_tokens")
    assert all(parameter.grad is None for parameter in bank.head().parameters())  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="class numbers"):
        bank.plan("default").method.loss_term(bank, "default", Step((images, torch.rand(2)), output, result))


@pytest.mark.parametrize("name", FILES)
def test_official_tensors_go_there_and_back(name: str, tmp_path: Path) -> None:
    tensors = below(file(name)[1], "adapter.")
    model, bank, config, _ = adapted(name, torch.float32, tmp_path)
    vision = {key: tensor for key, tensor in tensors.items() if "_r2tproj." not in key}
    found = to_official(bank, "mmrl")
    assert found.keys() == vision.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in vision.items())
    assert torch.equal(unit_of(bank).projection, ClassEmbeddings.load(tmp_path / "classes.safetensors").projection)  # type: ignore[arg-type]
    hyper = {**config, "classes": str(tmp_path / "classes.safetensors")}
    first = f"{LEARNER}{'srra_r2vproj.srra' if FILES[name] == 'mmrl++' else 'compound_rep_tokens_r2vproj'}.0.bias"
    with pytest.raises(FileError, match="are one tensor and have shapes"):
        load_official(model, "mmrl", {**tensors, first: tensors[first][:3]}, {"hyper": hyper})
    with pytest.raises(FileError, match="0 tensors named"):
        load_official(model, "mmrl", {k: t for k, t in tensors.items() if k != first}, {"hyper": hyper})
    with pytest.raises(FileError, match="needs alpha"):
        load_official(model, "mmrl", tensors, {"hyper": {"classes": hyper["classes"], "beta": 0.9}})
    assert bank.names == ["default"]


def test_counts_of_the_visual_part() -> None:
    """The papers' counts are these and those of the text tower's layers, 294,400 and 1,838,592."""
    name = "vit_base_patch16_clip_224"
    assert planned(name, vispeft.MMRL(joint=512)) == 518912
    assert planned(name, vispeft.MMRL(joint=512, variant="mmrl")) == 3153664
    for variant, whole in (("mmrl++", 813312), ("mmrl", 4992256)):
        text = 7 * (4 * (512 + 512) + 512) + 512 * 512 if variant == "mmrl++" else 7 * (512 * 512 + 512)
        assert planned(name, vispeft.MMRL(joint=512, variant=variant)) + text == whole


def clip_like(classes: int = 3) -> Any:
    """Make a tiny tower with a class token."""
    torch.manual_seed(0)
    return vispeft.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=32,
        patch_size=8,
        depth=3,
        embed_dim=24,
        num_heads=2,
        num_classes=classes,
    ).eval()


def embeddings(folder: Path, classes: int = 3) -> str:
    """Write class embeddings of the tiny tower."""
    generator = torch.Generator().manual_seed(1)
    texts = F.normalize(torch.randn(classes, 8, generator=generator), dim=1)
    names = tuple(f"class {i}" for i in range(classes))
    path = folder / "classes.safetensors"
    ClassEmbeddings(texts, names, 100.0, torch.randn(8, 24, generator=generator)).save(path)
    return str(path)


def test_a_file_needs_no_class_embeddings_and_keeps_the_classifier(tmp_path: Path) -> None:
    model, images = clip_like(), torch.randn(4, 3, 32, 32)
    classes = embeddings(tmp_path)
    method = vispeft.MMRL(classes=classes, num_tokens=2, token_dim=6, first_block=1, rank=2, read_rank=3)
    bank = vispeft.attach(model, method)
    assert {id(p) for _, p in bank.trainable_parameters()} == {id(p) for p in unit_of(bank).parameters()}
    model.train()
    optimizer = torch.optim.AdamW(bank.parameter_groups(1e-2, 1e-2))
    head: Any = bank.head()
    start = head.weight.clone()
    for _ in range(2):
        optimizer.zero_grad()
        result = model.run(images)
        output = model.forward_head(model.features(result))
        labels = torch.tensor([0, 1, 2, 0])
        (F.cross_entropy(output, labels) + bank.loss_terms((images, labels), output, result)).backward()
        optimizer.step()
    assert torch.equal(head.weight, start)
    wanted = model.eval()(images)
    bank.save(tmp_path / "adapter")
    (tmp_path / "classes.safetensors").unlink()
    other = clip_like()
    again = vispeft.load(other, tmp_path / "adapter")
    assert torch.equal(other(images), wanted)
    assert not any(parameter.requires_grad for parameter in again.head().parameters())  # type: ignore[union-attr]


def test_refusals(tmp_path: Path) -> None:
    classes, small = embeddings(tmp_path), {"token_dim": 6, "first_block": 1}
    with pytest.raises(ConfigError, match="3 classes, and the classifier 5"):
        vispeft.attach(clip_like(5), vispeft.MMRL(classes=classes, **small))
    with pytest.raises(ConfigError, match="no class embeddings"):
        vispeft.attach(clip_like(), vispeft.MMRL(joint=8, **small))
    with pytest.raises(ConfigError, match="have 8 numbers"):
        vispeft.MMRL(classes=classes, joint=9)
    with pytest.raises(ConfigError, match="does not train, and a fitted one"):
        Classification(
            method=vispeft.MMRL(classes=classes, **small),
            backbone="vit_tiny_patch16_224",
            num_classes=3,
            head_start="probe",
        )
    with pytest.raises(FileError, match="no file of class embeddings"):
        vispeft.MMRL(classes=str(tmp_path / "none.safetensors"))
    with pytest.raises(SiteError, match="has 3 blocks"):
        vispeft.attach(clip_like(), vispeft.MMRL(token_dim=6, first_block=3))
    with pytest.raises(ConfigError, match="alpha between 0 and 1"):
        vispeft.MMRL(alpha=1.0)
    wide = vispeft.create_model("vit_tiny_patch16_224", pretrained=False, depth=2, num_classes=3)
    with pytest.raises(ConfigError, match="24 features, and the model has 192"):
        vispeft.attach(wide, vispeft.MMRL(classes=classes, **small))
