"""Conformer adapters against their public code: the module, and spectrogram models with one input channel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import vispeft
from tests.parity.beyond import DTYPES, GRADIENT, OUTPUT, Case, differs, file
from tests.parity.test_adapter_plus import planned
from tests.parity.test_parity import below
from vispeft.core.method import PlanItem
from vispeft.core.selection import selections
from vispeft.core.sites import View
from vispeft.core.units import ParallelUnit
from vispeft.errors import BackboneError, ConfigError
from vispeft.interop import to_official
from vispeft.interop.beyond import CONFORMER
from vispeft.methods.adapter import Bottleneck, BottleneckUnit
from vispeft.methods.conformer_adapter import ConformerUnit
from vispeft.methods.convpass import ConvpassUnit

CASES = ["pfeiffer_parallel", "pfeiffer_sequential", "houlsby_parallel_residual"]
BOTTLENECK = {"down": "linear_downsample.weight", "down_bias": "linear_downsample.bias"}
BOTTLENECK |= {"up": "linear_upsample.weight", "up_bias": "linear_upsample.bias"}


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
    with torch.no_grad():
        for ours, parameter in unit.named_parameters():
            parameter.copy_(tensors[f"adapter.{BOTTLENECK[ours]}"])
    out = unit.change(tensors["input.x"].to(dtype))
    assert differs(out, tensors["out.y"]) <= OUTPUT[precision]
    (out * tensors["input.w"].to(dtype)).sum().backward()
    for ours, parameter in unit.named_parameters():
        assert differs(parameter.grad, tensors[f"grad.adapter.{BOTTLENECK[ours]}"]) <= GRADIENT[precision], ours


@pytest.mark.parametrize("precision", DTYPES)
def test_the_studys_convpass_is_convpass_without_its_convolution(precision: str) -> None:
    """The public code throws the convolution's result away, which is a kernel that is the identity."""
    tensors, dtype = below(file("conformer_adapter")[1], "convpass1d."), DTYPES[precision]
    unit = ConvpassUnit(48, 8, "mlp", 1.0, 0.0, "identity", 32).to(dtype).eval()
    with torch.no_grad():
        unit.reset(torch.Generator())
    names = {f"{ours}{end}": f"adapter_{ours}.{kind}" for ours in ("down", "up") for end, kind in ENDS}
    with torch.no_grad():
        for ours, theirs in names.items():
            unit.get_parameter(ours).copy_(tensors[f"adapter.{theirs}"])
    x = tensors["input.x"].to(dtype, copy=True).requires_grad_()
    out = unit.branch(x[:, None], None, 0)[:, 0]  # the tokens as a map of one row
    assert differs(out, tensors["out.y"]) <= OUTPUT[precision]
    (out * tensors["input.w"].to(dtype)).sum().backward()
    assert differs(x.grad, tensors["grad.input.x"]) <= GRADIENT[precision]
    for ours, theirs in names.items():
        assert differs(unit.get_parameter(ours).grad, tensors[f"grad.adapter.{theirs}"]) <= GRADIENT[precision], ours


ENDS = (("", "weight"), ("_bias", "bias"))


class InPlaceOf(BottleneckUnit, ParallelUnit):
    """A bottleneck in place of a branch's output: ``x + bottleneck(f)``, as the public code has without residual."""

    reads, identity_at_start = "output", False

    def __init__(self, shape: Bottleneck, place: Literal["attn", "mlp"]) -> None:
        super().__init__(shape)
        self.place = place

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        return self.change(x) - x  # the branch's output is in the sum already


class Replacing(vispeft.ConformerAdapter):
    """The conformer's places and norms with these bottlenecks, which would lose what a branch computes."""

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        places = [item for item in super().items(view, model) if item.unit != "norm"]
        for item in places:
            shape = Bottleneck(width=view.widths[0], middle=self.middle(view.widths[0]), activation="gelu")
            yield PlanItem(item.site, item.unit, partial(InPlaceOf, shape, item.unit.removeprefix("conformer_")))
        norms = self._norms(view)
        yield from selections(view, model, "norm", lambda path, name: path in norms)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_studys_bottleneck_in_place_of_a_branch(precision: str) -> None:
    """The case that loses the branches' outputs: no method here, but units of the same kind compute it."""
    dtype, case = DTYPES[precision], Case.of("conformer_vit", "houlsby_sequential")
    model: Any = case.model(dtype)
    method = Replacing(variant="houlsby", mode="sequential", reduction=case.meta["config"]["reduction_rate"])
    bank = vispeft.attach(model, method, verify=False)
    model.to(dtype).eval()
    places = {"conformer_mlp": "adapter_module_FFN", "conformer_attn": "adapter_module_MHSA"}
    names = {}
    for item in bank.plan():
        if item.unit != "norm":
            place = f"encoder.layer.{item.site.block}.{places[item.unit]}"
            names |= {f"{item.key}.{ours}": f"{place}.{theirs}" for ours, theirs in BOTTLENECK.items()}
    own = bank.named_tensors()
    with torch.no_grad():
        for ours, theirs in names.items():
            own[ours].copy_(case.tensors[f"adapter.{theirs}"])
    head = head_of(case.tensors, dtype)
    out = head(model.forward_features(case.tensors["input.images"].to(dtype)).mean(1))
    assert differs(out, case.tensors["out.logits"]) <= OUTPUT[precision]
    (out * case.tensors["input.w"].to(dtype)).sum().backward()
    fronts = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    for item in bank.plan():
        if item.unit == "norm":
            inside = item.site.block is not None
            place = f"encoder.layer.{item.site.block}.{fronts[item.site.role]}" if inside else "layernorm"
            names |= {f"{item.key}.{end}": f"{place}.{end}" for end in ("weight", "bias")}
    for ours, theirs in names.items():
        adapters = "adapter." if "adapter_module" in theirs else ""
        assert differs(own[ours].grad, case.tensors[f"grad.{adapters}{theirs}"]) <= GRADIENT[precision], theirs
    for key, parameter in head.named_parameters():
        assert differs(parameter.grad, case.tensors[f"grad.classification_head.{key}"]) <= GRADIENT[precision], key


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
