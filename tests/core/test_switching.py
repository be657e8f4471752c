"""Which adapter acts, and how the model trains and evaluates with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.errors import (
    ConfigError,
    MergeError,
    SiteError,
    UnknownNameError,
)
from vispeft.hosts.base import ensure_host

VIT = Cell("ssf", "vit")


def test_bank_of_the_same_model_is_the_same(model: nn.Module) -> None:
    bank = vispeft.attach(model, vispeft.SSF())
    assert vispeft.attach(model, vispeft.LoRA(), name="second") is bank
    assert bank.active == ["second"]
    with pytest.raises(UnknownNameError, match="'second'"):
        bank.set_active("secnd")
    bank.set_active(["default", "second"])
    with pytest.raises(ConfigError, match="Which adapter"):
        bank.report()


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


def test_an_interrupted_attach_is_rolled_back(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some modules are hosts by then, and some hold units."""
    classes = [type(module) for module in model.modules()]
    bank = VIT.attach(model, "one")
    made = 0

    def interrupted(*args: Any, **arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 3:
            raise KeyboardInterrupt
        return ensure_host(*args, **arguments)

    monkeypatch.setattr("vispeft.adapters.placing.ensure_host", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vispeft.attach(model, vispeft.LoRA(), name="two")
    assert (bank.names, bank.active) == (["one"], ["one"])
    assert not any(".adapters.two" in name for name, _ in model.named_modules())
    bank.detach("one")
    assert [type(module) for module in model.modules()] == classes


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


def test_pooling_is_put_back(model: nn.Module) -> None:
    wanted = model(VIT.images())
    bank = VIT.attach(model)
    model.reset_classifier(4, global_pool="avg")
    bank.detach("default")
    assert model.global_pool == "token"
    assert torch.equal(model(VIT.images()), wanted)


def test_a_closed_bank_says_so(model: nn.Module, saved: Path) -> None:
    bank = VIT.attach(model)
    bank.detach("default")
    with pytest.raises(ConfigError, match="closed"):
        bank.load(saved)
    assert type(model) is VisionTransformer


def test_stochastic_depth_is_switched_on_by_the_method_alone(model: nn.Module) -> None:
    bank = vispeft.attach(model, vispeft.SSF(drop_path=0.4))
    images = VIT.images(8)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    host = model.blocks[1].drop_path1
    assert [float(unit.rate) for unit in host.acting.depth] == pytest.approx([0.4])
    bank.detach("default")
    assert type(model.blocks[1].drop_path1) is nn.Identity


def test_dropout_acts_in_training_only(model: nn.Module) -> None:
    vispeft.attach(model, vispeft.LoRA(dropout=0.5))
    bank = vispeft.AdapterBank.of(model)
    assert bank is not None
    move(bank, "default")
    images = VIT.images()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


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


def test_parameter_groups_decay_matrices_only(model: nn.Module) -> None:
    bank = vispeft.attach(model, vispeft.Full())
    groups = {group["name"]: group for group in bank.parameter_groups(1e-3, 0.05)}
    assert groups["decay"]["weight_decay"] == 0.05
    assert groups["no_decay"]["weight_decay"] == 0.0
    exempt = {id(bank.named_tensors()[key]) for key in ("/full.cls_token", "/full.pos_embed", "norm/full.weight")}
    assert exempt <= {id(p) for p in groups["no_decay"]["params"]}
    assert all(p.ndim > 1 for p in groups["decay"]["params"])


def test_a_block_that_was_made_before_an_adapter_went_is_refused(model: nn.Module) -> None:
    bank = VIT.attach(model, "one")
    VIT.attach(model, "two")
    made, both = bank.using("one"), bank.using("one", "two")
    with made, made:  # it may be entered repeatedly
        assert bank.active == ["one"]
    bank.detach("two")
    with made:
        assert bank.active == ["one"]
    with pytest.raises(UnknownNameError, match="two"), both:
        pass
    assert bank.active == []


def test_data_parallel_is_refused(model: nn.Module) -> None:
    VIT.attach(model)
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        model._replicate_for_data_parallel()  # DataParallel calls it on each module, and needs several GPUs


def test_a_bank_says_what_it_holds(model: nn.Module) -> None:
    bank = VIT.attach(model, "one")
    VIT.attach(model, "two")
    bank.freeze("one")
    assert repr(bank) == "AdapterBank(adapters=['one', 'two'], active=['two'], frozen=['one'])"
    bank.merge()
    assert repr(bank).endswith("frozen=['one'], merged)")


def test_wrong_kinds_of_names_are_refused(model: nn.Module) -> None:
    bank = VIT.attach(model)
    with pytest.raises(ConfigError, match=r"set_active\(None\): give a name, a list of names, or \[\]"):
        bank.set_active(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"by \['default'\]; give one name, such as 'default'"):
        bank.freeze(["default"])  # type: ignore[arg-type]


def test_nothing_is_merged_where_nothing_acts(model: nn.Module) -> None:
    bank = VIT.attach(model)
    bank.set_active([])
    with pytest.raises(MergeError, match=r"No adapter acts.*default.*set_active"):
        bank.merge()
    bank.set_active("default")
    assert bank.merge().merged


def test_a_method_whose_files_could_not_be_read_is_named(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    class Renamed(vispeft.SSF):  # has the name of SSF, whose class would read its files
        pass

    vispeft.attach(model, Renamed())
    assert "Renamed is not registered as 'ssf'" in caplog.text
    caplog.clear()
    VIT.attach(model, "second")
    assert "registered" not in caplog.text


@pytest.mark.parametrize("method", ["vqt", "vqt_weighted", "vpt", "lst", "prefix", "convpass", "fact"])
def test_a_batch_without_images_gives_scores_of_none(method: str) -> None:
    """timm's Swin takes none itself."""
    cell = Cell(method, "vit")
    model = cell.model().eval()
    cell.attach(model)
    assert model(cell.images()[:0]).shape == (0, 5)


def test_what_is_no_name_and_no_model_is_refused(model: nn.Module) -> None:
    """These ended in a TypeError, an AttributeError or a KeyError."""
    bank = vispeft.attach(model, vispeft.SSF())
    for wrong in (3, None):
        with pytest.raises(ConfigError, match=rf"attach\(name={wrong}\): a text is needed"):
            vispeft.attach(model, vispeft.SSF(), name=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="asked for by 1; names are text"):
        bank.set_active([1])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="'vit' was given as model"):
        vispeft.attach("vit", vispeft.SSF())  # type: ignore[arg-type]
    assert bank.names == ["default"]
