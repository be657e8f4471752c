"""Classifiers of adapters: made anew, hidden while the model is merged, and kept when the last adapter goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.errors import ConfigError, FileError, MergeError, SiteError

BACKBONES = pytest.mark.parametrize("backbone", ["vit", "swin"])


def model_of(backbone: str, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    cell = Cell("lora", backbone)
    return cell.model().to(dtype).eval(), cell.images().to(dtype)


@BACKBONES
def test_no_classes_leave_the_features_of_a_wide_classifier(backbone: str) -> None:
    """The classifier of VQT reads more than the backbone's own feature."""
    model, images = model_of(backbone)
    bank = vispeft.attach(model, vispeft.VQT(num_queries=2))
    head: Any = bank.head()
    model.reset_classifier(0)
    assert isinstance(bank.head(), nn.Identity)
    assert (model.num_classes, model(images).shape[1]) == (0, head.in_features)
    model.reset_classifier(3)
    assert (model.num_classes, model(images).shape[1]) == (3, 3)


@BACKBONES
def test_a_new_classifier_of_one_bit_is_one_again_and_its_file_loads(backbone: str, tmp_path: Any) -> None:
    model, images = model_of(backbone)
    fresh, _ = model_of(backbone)
    bank = vispeft.attach(model, vispeft.AdaptFormer(bits=1, head_bits=1))
    kind = type(bank.head())
    model.reset_classifier(3)
    assert type(bank.head()) is kind
    move(bank, "default")
    bank.save(tmp_path / "adapter")
    vispeft.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.eval()(images), model(images))


@BACKBONES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_new_classifier_has_the_type_of_adapters(backbone: str, dtype: torch.dtype) -> None:
    model, images = model_of(backbone, dtype)
    bank = vispeft.attach(model, vispeft.SSF())
    head: Any = bank.head()
    wanted = head.weight.dtype
    model.reset_classifier(3)
    new: Any = bank.head()
    assert (new.weight.dtype, type(new)) == (wanted, type(head))
    assert model(images).shape[1] == 3


@BACKBONES
def test_a_new_classifier_of_the_base_is_frozen_and_stays(backbone: str) -> None:
    model, images = model_of(backbone, torch.float64)
    bank = vispeft.attach(model, vispeft.SSF())
    with bank.disabled():
        model.reset_classifier(3)
        made = model.get_classifier()
        assert not any(parameter.requires_grad for parameter in made.parameters())
        out = model(images)
    bank.detach("default")
    assert model.get_classifier() is made
    assert model.num_classes == 3
    assert torch.equal(model(images), out)


def test_classifiers_hidden_by_a_merge_follow_a_cast() -> None:
    model, images = model_of("vit")
    bank = vispeft.attach(model, vispeft.SSF())
    bank.merge()
    model.double()
    bank.unmerge()
    with bank.disabled():
        assert model(images.double()).dtype == torch.float64


def test_a_merged_adapter_is_neither_frozen_nor_unfrozen() -> None:
    model, _ = model_of("vit")
    bank = vispeft.attach(model, vispeft.SSF())
    bank.merge()
    before = set(vars(model))
    for change in (bank.freeze, bank.unfreeze):
        with pytest.raises(MergeError, match="merged"):
            change("default")
    assert set(vars(model)) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["train", "keys", "update", "type"])
def test_names_of_pytorch_are_refused_and_leave_no_trace(name: str) -> None:
    model, _ = model_of("vit")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=name):
        vispeft.attach(model, vispeft.SSF(), name=name)
    assert [type(module) for module in model.modules()] == classes


def test_tensors_that_a_classifier_does_not_have_are_refused() -> None:
    model, _ = model_of("vit")
    bank = vispeft.attach(model, vispeft.AdaptFormer(bits=1, head_bits=1))
    state = bank.state_dict()
    classes = state["head/weight"].shape[0]
    with pytest.raises(FileError, match="'bias'"):
        bank.load_state_dict({**state, "head/bias": torch.zeros(classes)})


@BACKBONES
def test_an_adapter_that_widens_the_features_must_bring_the_classifier(backbone: str) -> None:
    """The classifier of the last adapter would meet features of another width, deep in a forward pass."""
    model, images = model_of(backbone)
    bank = vispeft.attach(model, vispeft.VQT(num_queries=2, detach_hidden=False), name="wide")
    vispeft.attach(model, vispeft.VPT(num_tokens=2), name="prompts")
    with pytest.raises(SiteError, match="'wide' last"):
        bank.set_active(["wide", "prompts"])
    assert bank.active == ["prompts"]
    bank.set_active(["prompts", "wide"])
    head: Any = bank.head("wide")
    assert model(images).shape[1] == head.out_features
    model.reset_classifier(0)
    bank.set_active("prompts")
    model.reset_classifier(0)
    bank.set_active(["wide", "prompts"])  # features alone have any width
    assert model(images).shape[1] == head.in_features
