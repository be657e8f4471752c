"""The bank's edges: wrong names, wrong files, wrong backbones, and what stays as it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.core.method import PlanItem, method_from_dict
from vispeft.core.units import AffineUnit
from vispeft.errors import (
    BackboneError,
    BaseMismatchError,
    ConfigError,
    FileError,
    MergeError,
    SiteError,
    UnknownNameError,
    VerificationError,
)
from vispeft.storage.codecs import pack_bits, unpack_bits

VIT = Cell("ssf", "vit")


@pytest.fixture
def model() -> nn.Module:
    return VIT.model()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    VIT.attach(VIT.model()).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_published_counts() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    assert vispeft.plan(vit, vispeft.SSF()).trainable == 205_824
    assert vispeft.plan(vit, vispeft.LoRA(rank=8)).trainable == 294_912
    assert vispeft.plan(vit, vispeft.LoRA(rank=8, roles=("attn.qkv",))).trainable == 294_912
    assert vispeft.plan(vit, vispeft.Full()).trainable == 85_798_656


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: vispeft.method("sff"), UnknownNameError, "'ssf'"),
        (lambda: vispeft.method("lora", rnk=2), UnknownNameError, "'rank'"),
        (lambda: vispeft.LoRA(rank=0), ConfigError, "at least 1"),
        (lambda: vispeft.LoRA(rank=2.5), ConfigError, "at least 1"),
        (lambda: vispeft.VPT(num_tokens=1.5), ConfigError, "at least 1"),
        (lambda: vispeft.LoRA(dropout=1.0), ConfigError, "dropout"),
        (lambda: vispeft.LoRA(alpha=float("nan")), ConfigError, "alpha"),
        (lambda: vispeft.SSF(start="zero"), ConfigError, "identity"),
        (lambda: vispeft.SSF(roles=("attn.qvk",)), UnknownNameError, "'attn.qkv'"),
        (lambda: vispeft.SSF(roles=()), ConfigError, "nothing"),
        (lambda: vispeft.LinearProbe(roles=("norm1",)), ConfigError, "nothing"),
    ],
)
def test_wrong_configurations(make: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        (vispeft.SSF(roles=("downsample.norm",)), SiteError, "no patch merging"),
        (vispeft.SSF(roles=("attn.q_norm",)), SiteError, "matches nothing"),
        (vispeft.SSF(roles=("attn.q",)), SiteError, "part of"),
        (vispeft.LoRA(roles=("norm1",)), SiteError, "linear"),
        (vispeft.SSF(blocks=(5,)), ConfigError, "2 blocks"),
        (vispeft.SSF(roles=("patch_embed",), blocks=(0,)), SiteError, "not in the chosen blocks"),
        ("ssf", ConfigError, r"vispeft.method\('ssf'\)"),
    ],
)
def test_refused_attachments_change_nothing(
    model: nn.Module, method: vispeft.Method, error: type[Exception], says: str
) -> None:
    before = list(model.state_dict())
    with pytest.raises(error, match=says):
        vispeft.attach(model, method)
    assert list(model.state_dict()) == before
    assert type(model) is VisionTransformer
    assert all(p.requires_grad for p in model.parameters())
    assert vispeft.AdapterBank.of(model) is None


def test_a_refused_second_adapter_leaves_the_first(model: nn.Module) -> None:
    bank = VIT.attach(model)
    wanted = model(VIT.images())
    with pytest.raises(SiteError):
        vispeft.attach(model, vispeft.SSF(roles=("downsample.norm",)), name="two")
    with pytest.raises(ConfigError, match="already"):
        vispeft.attach(model, vispeft.SSF())
    with pytest.raises(ConfigError, match="letters"):
        vispeft.attach(model, vispeft.SSF(), name="a.b")
    assert bank.names == bank.active == ["default"]
    assert torch.equal(model(VIT.images()), wanted)


@pytest.mark.parametrize("block", [ParallelScalingBlock, type("MyBlock", (Block,), {})])
def test_unknown_blocks_are_refused(block: type[nn.Module]) -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, block_fn=block)
    with pytest.raises(BackboneError, match=f"{block.__name__}.*Block"):
        vispeft.attach(model, vispeft.SSF())


def test_unknown_models_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"ResNet.*VisionTransformer"):
        vispeft.attach(timm.create_model("resnet18"), vispeft.SSF())


def test_another_image_size_is_refused(model: nn.Module) -> None:
    VIT.attach(model)
    with pytest.raises(BackboneError, match=r"40 x 40.*32 x 32.*flexible_size"):
        model(torch.zeros(1, 3, 40, 40))
    flexible = VIT.model(dynamic_img_size=True)
    VIT.attach(flexible)
    with pytest.raises(BackboneError, match="patches of 8 x 8"):
        flexible.forward_intermediates(torch.zeros(1, 3, 44, 40))
    assert flexible(torch.zeros(1, 3, 48, 40)).shape == (1, 5)


def test_bank_of_the_same_model_is_the_same(model: nn.Module) -> None:
    bank = vispeft.attach(model, vispeft.SSF())
    assert vispeft.attach(model, vispeft.LoRA(), name="second") is bank
    assert bank.active == ["second"]
    with pytest.raises(UnknownNameError, match="'second'"):
        bank.set_active("secnd")
    bank.set_active(["default", "second"])
    with pytest.raises(ConfigError, match="Which adapter"):
        bank.report()


# ---------------------------------------------------------------------- verification


def test_a_unit_the_model_does_not_use_is_found(model: nn.Module) -> None:
    class Unused(type(model.blocks[1])):
        def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
            return x

    bank = vispeft.attach(model, vispeft.SSF(), verify=False)
    model.blocks[1].__class__ = Unused
    with pytest.raises(VerificationError, match=r"blocks\.1\."):
        bank.verify()


def test_verify_puts_everything_back(model: nn.Module) -> None:
    bank = vispeft.attach(model, vispeft.LoRA())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    bank.verify()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_attaching_follows_the_seed() -> None:
    states = []
    for _ in range(2):
        model = VIT.model()
        torch.manual_seed(5)
        states.append(vispeft.attach(model, vispeft.SSF()).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_a_zero_scale_has_the_right_gradient(model: nn.Module) -> None:
    """The scale's gradient does not depend on the scale where the loss is linear in the unit's output."""
    model = model.double()
    bank = VIT.attach(model)
    images = VIT.images().double()
    scale = bank.named_tensors()["norm/ssf.scale"]
    gradients = []
    for value in (1.0, 0.0):
        scale.data.fill_(value)
        model.zero_grad()
        model(images).sum().backward()
        gradients.append(scale.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients)


# ---------------------------------------------------------------------- merging


def test_merge_without_originals_leaves_a_plain_model(model: nn.Module) -> None:
    bank = VIT.attach(model)
    wanted = model(VIT.images())
    bank.merge(keep_original=False)
    assert type(model) is VisionTransformer
    assert torch.allclose(model(VIT.images()), wanted, atol=1e-5)
    assert not [key for key in model.__dict__ if "vispeft" in key]
    plain = VIT.model()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(VIT.images()), model(VIT.images()))
    with pytest.raises(MergeError, match="not kept"):
        bank.unmerge()


def test_merged_models_refuse_to_be_changed(model: nn.Module, tmp_path: Path) -> None:
    bank = VIT.attach(model)
    wanted = bank.state_dict()
    bank.merge()
    with pytest.raises(MergeError, match="unmerge"):
        bank.set_active([])
    with pytest.raises(MergeError, match="unmerge"), bank.disabled():
        pass
    with pytest.raises(MergeError, match="unmerge"):
        vispeft.attach(model, vispeft.SSF(), name="two")
    bank.save(tmp_path)
    loaded = vispeft.load(VIT.model(), tmp_path)
    assert all(torch.equal(v, wanted[k]) for k, v in loaded.state_dict().items())
    assert loaded._adapters["default"].merge_error is not None


def test_missing_biases_are_made_and_reported() -> None:
    cell = Cell("ssf", "vit_clip")
    report = cell.attach(cell.model()).merge()
    assert report.created == ("patch_embed.proj.bias",)


def test_a_shift_behind_rms_norm_folds_forward() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, norm_layer=RmsNorm
    ).double()
    model.eval()
    bank = vispeft.attach(model, vispeft.SSF(roles=("norm1", "norm2", "attn.qkv")))
    move(bank, "default")
    images = VIT.images().double()
    wanted = model(images)
    report = bank.merge()
    assert torch.allclose(model(images), wanted, rtol=1e-10)
    assert set(report.merged) >= {"blocks.0.norm1", "blocks.0.attn.qkv", "blocks.0.mlp.fc1"}
    last = vispeft.attach(VIT.model(), vispeft.SSF())
    assert last.merge().kept == {}
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, norm_layer=RmsNorm)
    with pytest.raises(MergeError, match=r"norm.*no bias"):
        vispeft.attach(model, vispeft.SSF()).merge()


# ---------------------------------------------------------------------- files


def test_fingerprint_accepts_the_same_weights(saved: Path) -> None:
    for make in (
        lambda: VIT.model(img_size=48),
        lambda: VIT.model().bfloat16(),
        lambda: VIT.model().half(),
        lambda: VIT.model().double(),
        lambda: VIT.model().bfloat16().float(),
        lambda: VIT.model(num_classes=17),
        lambda: VIT.model(num_classes=0),
        lambda: VIT.model(in_chans=1),
    ):
        assert vispeft.load(make(), saved).names == ["default"]


def test_fingerprint_of_a_half_precision_base(tmp_path: Path) -> None:
    VIT.attach(VIT.model().bfloat16()).save(tmp_path)
    vispeft.load(VIT.model(), tmp_path)
    vispeft.load(VIT.model().bfloat16(), tmp_path)
    other = VIT.model()
    other.blocks[0].mlp.fc2.weight.data[0, 0] += 1
    with pytest.raises(BaseMismatchError):
        vispeft.load(other, tmp_path)


@pytest.mark.parametrize("change", [1e-6, 1.0])
@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.weight", "cls_token", "pos_embed", "norm.bias"])
def test_fingerprint_refuses_one_changed_weight(saved: Path, name: str, change: float) -> None:
    model = VIT.model()
    model.get_parameter(name).data.view(-1)[3] += change
    with pytest.raises(BaseMismatchError, match=name.split(".weight")[0].split(".mlp")[0].split(".bias")[0]):
        vispeft.load(model, saved)
    assert type(model) is VisionTransformer
    vispeft.load(model, saved, allow_base_mismatch=True)


def test_other_architectures_are_refused(saved: Path) -> None:
    deeper = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3)
    with pytest.raises(BaseMismatchError, match="another architecture"):
        vispeft.load(deeper, saved)
    wider = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    with pytest.raises(BaseMismatchError):
        vispeft.load(wider, saved)


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors", "head.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_damaged_files_are_refused(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        content[middle] ^= 1
        path.write_bytes({"cut": content[:middle], "flip": content, "empty": b""}[damage])
    model = VIT.model()
    with pytest.raises(FileError, match=name):
        vispeft.load(model, saved)
    assert type(model) is VisionTransformer


def test_files_of_a_later_schema_or_an_unknown_method_are_refused(saved: Path) -> None:
    from vispeft.storage.files import _digest

    for key, value, says in (("schema", 99, "Upgrade"), ("method", {"name": "ssg", "fields": {}}, "'ssf'")):
        copy = saved.parent / key
        shutil.copytree(saved, copy)
        header = json.loads((copy / "adapter.json").read_text())
        header[key], header["digest"] = value, ""
        header["digest"] = _digest(header)
        (copy / "adapter.json").write_text(json.dumps(header))
        with pytest.raises(vispeft.VispeftError, match=says):
            vispeft.load(VIT.model(), copy)


def test_saving_over_an_adapter_keeps_it_when_it_fails(
    saved: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match="No space left"):
        VIT.attach(model).save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_several_adapters_and_notes_in_files(saved: Path, tmp_path: Path) -> None:
    model = VIT.model()
    bank = vispeft.load(model, saved)
    bank.annotate(class_names=["a", "b"], metrics={"accuracy": 0.5})
    bank.save(tmp_path / "birds")
    vispeft.load(model, tmp_path / "birds")
    assert bank.names == ["default", "birds"]
    assert bank.notes("birds")["class_names"] == ["a", "b"]
    bank.set_active("default")
    assert bank.notes()["metrics"] == {"accuracy": 0.5}


def test_load_base_takes_a_plain_state_dict(model: nn.Module) -> None:
    plain = VIT.model(num_classes=5)
    for parameter in plain.parameters():
        parameter.data.mul_(1.1)
    bank = VIT.attach(model)
    bank.load_base(plain.state_dict())
    with bank.disabled():
        assert torch.equal(model(VIT.images()), plain(VIT.images()))
    with pytest.raises(FileError, match="missing"):
        bank.load_base({"cls_token": plain.cls_token})
    with pytest.raises(UnknownNameError, match="pos_embed"):
        bank.load_base({**plain.state_dict(), "pos_embd": plain.pos_embed})


def test_weights_that_do_not_fit_are_refused(model: nn.Module) -> None:
    bank = VIT.attach(model)
    state = bank.state_dict()
    key = "norm/ssf.scale"
    with pytest.raises(FileError, match="shape"):
        bank.load_state_dict({**state, key: torch.ones(3)})
    with pytest.raises(FileError, match="finite"):
        bank.load_state_dict({**state, key: state[key] * float("nan")})


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_codes_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 7), generator=torch.Generator().manual_seed(0))
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-35 * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, (5, 7)), codes)
    with pytest.raises(FileError, match="bytes"):
        unpack_bits(packed[:-1], bits, (5, 7))
    with pytest.raises(ConfigError, match="fit"):
        pack_bits(codes + 2**bits, bits)


def test_packing_starts_with_the_lowest_bit() -> None:
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    assert pack_bits(torch.tensor([3, 1]), 2).tolist() == [7]


# ---------------------------------------------------------------------- training rules


def test_stochastic_depth_is_switched_on_by_the_method_alone(model: nn.Module) -> None:
    bank = vispeft.attach(model, vispeft.SSF(drop_path=0.4))
    images = VIT.images(8)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.4)
    bank.detach("default")
    assert type(model.blocks[1].drop_path1) is nn.Identity


def test_parameter_groups_decay_matrices_only(model: nn.Module) -> None:
    bank = vispeft.attach(model, vispeft.Full())
    groups = {group["name"]: group for group in bank.parameter_groups(1e-3, 0.05)}
    assert groups["decay"]["weight_decay"] == 0.05
    assert groups["no_decay"]["weight_decay"] == 0.0
    exempt = {id(bank.named_tensors()[key]) for key in ("/full.cls_token", "/full.pos_embed", "norm/full.weight")}
    assert exempt <= {id(p) for p in groups["no_decay"]["params"]}
    assert all(p.ndim > 1 for p in groups["decay"]["params"])


def test_dropout_acts_in_training_only(model: nn.Module) -> None:
    vispeft.attach(model, vispeft.LoRA(dropout=0.5))
    bank = vispeft.AdapterBank.of(model)
    assert bank is not None
    move(bank, "default")
    images = VIT.images()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_lora_scales() -> None:
    assert vispeft.LoRA(rank=4, alpha=8).scale == 2
    assert vispeft.LoRA(rank=4, alpha=8, rslora=True).scale == 4


def test_methods_survive_plain_values() -> None:
    for method in (vispeft.LoRA(roles=("attn.q",), blocks=(0, -1)), vispeft.SSF(), vispeft.Full(drop_path=0.1)):
        assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_features_only_models_can_be_adapted(saved: Path) -> None:
    wrapper = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, out_indices=(5, 11))
    plain = [m.shape for m in wrapper(torch.zeros(1, 3, 64, 64))]
    bank = vispeft.attach(wrapper, vispeft.SSF(roles=("attn.qkv", "mlp.fc1")))
    assert [m.shape for m in wrapper(torch.zeros(1, 3, 64, 64))] == plain
    assert bank.report().trainable == 12 * 2 * (3 + 4) * 192


# ---------------------------------------------------------------------- a method from outside


class Offset(AffineUnit):
    """A shift alone, with a scale fixed at one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(width), persistent=False)
        self.shift = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        self.shift.zero_()


@vispeft.register
@dataclass(frozen=True, kw_only=True)
class ToyOffset(vispeft.Method):
    """The whole of a new method."""

    name: ClassVar[str] = "toy_offset"
    default_roles: ClassVar[tuple[str, ...]] = ("norm1", "attn.proj")

    def items(self, view, model):
        for site in self.sites(view):
            yield PlanItem(site, "offset", partial(Offset, site.out_features))

    def parameter_count(self, view):
        return sum(site.out_features for site in self.sites(view))


def test_a_method_from_outside_does_everything(tmp_path: Path) -> None:
    assert "toy_offset" in vispeft.list_methods()
    model, images = VIT.model(), VIT.images()
    wanted = model(images)
    bank = vispeft.attach(model, vispeft.method("toy_offset"))
    assert torch.allclose(model(images), wanted, atol=1e-6)
    assert bank.report().trainable == ToyOffset().parameter_count(bank.view) == 2 * 2 * 24
    move(bank, "default")
    adapted = model(images)
    bank.save(tmp_path)
    again = VIT.model()
    vispeft.load(again, tmp_path)
    assert torch.equal(again(images), adapted)
    bank.merge()
    assert torch.allclose(model(images), adapted, atol=1e-5)


# ---------------------------------------------------------------------- what a reader found


def test_a_backbone_that_computes_something_else_is_refused(saved: Path) -> None:
    for options, says in (
        ({"act_layer": "quick_gelu"}, "mlp.act"),
        ({"num_heads": 6}, "heads"),
        ({"global_pool": "avg", "fc_norm": False}, "pooling 'token'"),
    ):
        with pytest.raises(BaseMismatchError, match=says):
            vispeft.load(VIT.model(**options), saved)


def test_pooling_is_put_back(model: nn.Module) -> None:
    wanted = model(VIT.images())
    bank = VIT.attach(model)
    model.reset_classifier(4, global_pool="avg")
    bank.detach("default")
    assert model.global_pool == "token"
    assert torch.equal(model(VIT.images()), wanted)


def test_notes_of_any_plain_kind_are_written_and_others_refused(model: nn.Module, tmp_path: Path) -> None:
    bank = VIT.attach(model)
    bank.annotate(metrics={"accuracy": torch.tensor(0.5), "per_class": dict.fromkeys(range(11), 0.1)})
    bank.save(tmp_path)
    assert vispeft.load(VIT.model(), tmp_path).notes()["metrics"]["per_class"]["10"] == 0.1
    with pytest.raises(ConfigError, match="metrics"):
        bank.annotate(metrics={"what": object()})


def test_no_classifier_is_remembered(tmp_path: Path) -> None:
    model = VIT.model(num_classes=0)
    VIT.attach(model).save(tmp_path)
    other = VIT.model(num_classes=7)
    vispeft.load(other, tmp_path)
    assert torch.equal(other(VIT.images()), model(VIT.images()))


def test_disabled_nests_and_refuses_changes_inside(model: nn.Module) -> None:
    wanted = model(VIT.images())
    bank = VIT.attach(model)
    with bank.disabled():
        with bank.disabled():
            pass
        assert torch.allclose(model(VIT.images()), wanted)
        with pytest.raises(ConfigError, match="disabled"):
            bank.merge()
        with pytest.raises(ConfigError, match="disabled"):
            bank.set_active([])
    assert not torch.allclose(model(VIT.images()), wanted)


def test_every_adapter_of_a_merged_model_can_be_saved(model: nn.Module, tmp_path: Path) -> None:
    bank = VIT.attach(model, "one")
    vispeft.attach(model, vispeft.LoRA(), name="two")
    bank.merge()
    for name in ("one", "two"):
        bank.save(tmp_path / name, name)
        assert bank.report(name).adapter == name
    with pytest.raises(MergeError, match="unmerge"):
        bank.load_state_dict(bank.state_dict("one"), "one")


def test_unmerging_follows_a_move_and_notices_other_weights(model: nn.Module) -> None:
    bank = VIT.attach(model)
    wanted = model(VIT.images())
    bank.merge()
    model.double()
    bank.unmerge()
    assert torch.allclose(model(VIT.images().double()).float(), wanted, atol=1e-5)
    model.float()
    bank.merge()
    model.load_state_dict({key: tensor * 1.1 for key, tensor in model.state_dict().items()})
    with pytest.raises(MergeError, match="changed since"):
        bank.unmerge()


def test_a_classifier_that_starts_at_zero_hides_nothing() -> None:
    model = VIT.model()
    nn.init.zeros_(model.head.weight)
    bank = VIT.attach(model, moved=False)
    nn.init.zeros_(model.head.weight)
    assert bank.merge().max_error > 0


def test_a_cut_model_is_taken_only_without_a_classifier(saved: Path) -> None:
    with pytest.raises(BaseMismatchError, match="another architecture"):
        vispeft.load(VIT.model(depth=1), saved)
    assert vispeft.load(VIT.model(depth=1, num_classes=0), saved).names == ["default"]


def test_a_closed_bank_says_so(model: nn.Module, saved: Path) -> None:
    bank = VIT.attach(model)
    bank.detach("default")
    with pytest.raises(ConfigError, match="closed"):
        bank.load(saved)
    assert type(model) is VisionTransformer


def test_a_save_that_fails_half_way_is_rolled_back(
    saved: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    bank = VIT.attach(model)
    move(bank, "default", seed=12)
    before, calls, replace = {p.name: p.read_bytes() for p in saved.iterdir()}, [], os.replace

    def third_fails(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("os.replace", third_fails)
    with pytest.raises(FileError, match="Input/output"):
        bank.save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_save_that_is_cut_off_leaves_the_earlier_adapter(saved: Path, tmp_path: Path) -> None:
    wanted = vispeft.load(VIT.model(), saved).state_dict()
    other = VIT.model()
    bank = VIT.attach(other)
    move(bank, "default", seed=12)
    bank.save(tmp_path / "new")
    (saved / "adapter.safetensors").rename(saved / ".adapter.safetensors.earlier")
    shutil.copy(tmp_path / "new/adapter.safetensors", saved / "adapter.safetensors")
    assert all(torch.equal(t, wanted[k]) for k, t in vispeft.load(VIT.model(), saved).state_dict().items())


def test_a_half_precision_base_keeps_its_classifier_wide() -> None:
    model = VIT.model().bfloat16()
    bank = VIT.attach(model)
    assert model.head.weight.dtype == torch.float32
    optimiser = torch.optim.AdamW(bank.parameter_groups(1e-5, 0.0))
    before = model.head.weight.detach().clone()
    model(VIT.images().bfloat16()).sum().backward()
    optimiser.step()
    assert (model.head.weight != before).float().mean() > 0.9
    wide = model.head
    bank.merge()
    assert type(model.head) is nn.Linear
    bank.unmerge()
    assert model.head is wide


def test_a_refused_adapter_leaves_the_activation(model: nn.Module) -> None:
    bank = VIT.attach(model, "one")
    bank.set_active([])
    with pytest.raises(SiteError):
        vispeft.attach(model, vispeft.SSF(roles=("downsample.norm",)), name="two")
    assert bank.active == []
    vispeft.attach(model, vispeft.LoRA(), name="two")
    bank.set_active([])
    bank.detach("two")
    assert bank.active == []


@pytest.mark.parametrize("make", [lambda: vispeft.LoRA(roles="attn.q"), lambda: vispeft.LoRA(blocks=3)])
def test_a_single_value_where_a_list_belongs(make: object) -> None:
    with pytest.raises(ConfigError, match="give a list"):
        make()


def test_places_inside_one_module_have_names_of_their_own() -> None:
    view = vispeft.attach(Cell("ssf", "eva_dinov3").model(), vispeft.SSF()).view
    keys = [site.key for site in view.sites]
    assert len(set(keys)) == len(keys)
