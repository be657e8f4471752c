"""Conformer adapters against their public code: the module, and spectrogram models with one input channel."""

from __future__ import annotations

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import vispeft
from tests.parity.beyond import DTYPES, GRADIENT, OUTPUT, Case, differs, file
from tests.parity.test_adapter_plus import planned
from tests.parity.test_parity import below
from vispeft.errors import BackboneError, ConfigError
from vispeft.interop import to_official
from vispeft.interop.beyond import CONFORMER
from vispeft.methods.adapter import Bottleneck, BottleneckUnit
from vispeft.methods.conformer_adapter import ConformerUnit

CASES = ["pfeiffer_parallel", "pfeiffer_sequential", "houlsby_parallel_residual"]
"""The fourth case has plain bottlenecks in place of a branch's output, which no method of this project is."""


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["k31", "k9", "k3_train"])
def test_module(name: str, precision: str) -> None:
    meta, tensors = file("conformer_adapter")
    config, own, dtype = meta["cases"][name], below(tensors, f"{name}."), DTYPES[precision]
    method = vispeft.ConformerAdapter(reduction=config["reduction_rate"], kernel=config["kernel_size"])
    unit = ConformerUnit(method, meta["config"]["width"], "mlp").to(dtype).train(name.endswith("train"))
    with torch.no_grad():
        for ours, tensor in unit.state_dict().items():
            tensor.copy_(own[f"adapter.{CONFORMER[ours]}"].reshape(tensor.shape))
    x = own["input.x"].to(dtype, copy=True).requires_grad_()
    out = unit.branch(x, None, 0)
    assert differs(out, own["out.y"]) <= OUTPUT[precision]
    (out * own["input.w"].to(dtype)).sum().backward()
    assert differs(x.grad, own["grad.input.x"]) <= GRADIENT[precision]
    wanted = below(own, "grad.adapter.")
    for ours, parameter in unit.named_parameters():
        if CONFORMER[ours] in wanted:
            gradient = wanted.pop(CONFORMER[ours]).reshape(parameter.shape)
            assert differs(parameter.grad, gradient) <= GRADIENT[precision], ours
    assert not wanted
    for theirs, buffer in (("running_mean", unit.mean), ("running_var", unit.variance)):
        after = own.get(f"out.after.bnorm.{theirs}", own[f"adapter.bnorm.{theirs}"])
        assert differs(buffer, after) <= OUTPUT[precision]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_spectrogram_model(name: str, precision: str) -> None:
    dtype, case = DTYPES[precision], Case.of("conformer_vit", name)
    case.tensors.update(norms_of(case.tensors))
    model, bank = case.adapted("conformer", dtype)
    images, head = case.tensors["input.images"].to(dtype), head_of(case.tensors, dtype)
    assert images.shape[1] == 1
    tokens = model.forward_features(images)
    pooled = tokens.mean(1) if case.meta["config"]["final"] == "ALL" else tokens[:, 0]
    out = head(pooled)
    assert differs(out, case.tensors["out.logits"]) <= OUTPUT[precision]
    (out * case.tensors["input.w"].to(dtype)).sum().backward()
    found = to_official(bank, "conformer", grad=True)
    found |= {f"classification_head.{key}": parameter.grad for key, parameter in head.named_parameters()}
    wanted = {**below(case.tensors, "grad.adapter."), **below(case.tensors, "grad.")}
    wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith("adapter.")}
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert differs(found[key], gradient) <= GRADIENT[precision], key


def norms_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the norms that train, which start as the backbone's, under the authors' names."""
    found = {}
    for key in [key for key in tensors if ".layernorm" in key or key.startswith("grad.layernorm")]:
        name = key.removeprefix("grad.")
        ours = name.replace("encoder.layer.", "blocks.").replace("layernorm_before", "norm1")
        ours = ours.replace("layernorm_after", "norm2").replace("layernorm.", "norm.")
        found[f"adapter.{name}"] = tensors[f"backbone.{ours}"]
    return found


def head_of(tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Make the file's classifier, a linear layer behind a norm or alone."""
    given = below(tensors, "input.classification_head.")
    head = nn.Linear(*reversed(given["weight"].shape)).to(dtype)
    head.load_state_dict(given)
    return head


@pytest.mark.parametrize("precision", DTYPES)
def test_the_studys_bottleneck_is_the_adapters(precision: str) -> None:
    tensors, dtype = below(file("conformer_adapter")[1], "bottleneck."), DTYPES[precision]
    shape = Bottleneck(width=48, middle=8, activation="gelu")
    unit = BottleneckUnit(shape).to(dtype)
    names = {"down": "linear_downsample.weight", "down_bias": "linear_downsample.bias"}
    names |= {"up": "linear_upsample.weight", "up_bias": "linear_upsample.bias"}
    with torch.no_grad():
        for ours, parameter in unit.named_parameters():
            parameter.copy_(tensors[f"adapter.{names[ours]}"])
    out = unit.change(tensors["input.x"].to(dtype))
    assert differs(out, tensors["out.y"]) <= OUTPUT[precision]
    (out * tensors["input.w"].to(dtype)).sum().backward()
    for ours, parameter in unit.named_parameters():
        assert differs(parameter.grad, tensors[f"grad.adapter.{names[ours]}"]) <= GRADIENT[precision], ours


def test_counts() -> None:
    """The public code's counts hold a LayerNorm per block that it computes and throws away."""
    models = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224")
    method = vispeft.ConformerAdapter(train_norms=False)
    unused = [2 * 9216, 2 * 4416, 2 * 12032]
    found = [planned(name, method) + norms for name, norms in zip(models, unused, strict=True)]
    assert found == [252288, 82296, 251616]


def test_statistics_move_once_a_step_also_under_checkpointing() -> None:
    seen = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = VisionTransformerDistilled(
            img_size=16, patch_size=8, in_chans=1, embed_dim=12, depth=1, num_heads=2, num_classes=0
        )
        bank = vispeft.attach(model, vispeft.ConformerAdapter(reduction=4, kernel=4), verify=False)
        model.train().set_grad_checkpointing(checkpoints)
        before = bank.state_dict()["blocks.0/conformer_mlp.mean"].clone()
        model(torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))).sum().backward()
        after = bank.state_dict()["blocks.0/conformer_mlp.mean"]
        assert not torch.equal(before, after)
        seen.append(after)
    torch.testing.assert_close(*seen)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="lose the output"):
        vispeft.ConformerAdapter(mode="sequential", residual=False)
    two_heads = VisionTransformerDistilled(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=3)
    with pytest.raises(BackboneError, match="num_classes=0"):
        vispeft.attach(two_heads, vispeft.LoRA())
