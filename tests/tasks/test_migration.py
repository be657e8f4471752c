"""Configs and checkpoints of earlier versions."""

import torch

from vispeft.tasks.migration import MOVED, rename_heads, without_moved


def test_the_classifier_of_an_old_checkpoint_gets_the_name_of_its_adapter():
    old = {"model.blocks.0.adapters.a.lora.a": 0, "model.head.fc.weight": 1, "model.head.fc.bias": 2, "decoder.x": 3}
    tensors = {name: torch.tensor(value) for name, value in old.items()}
    new = [
        "model.blocks.0.adapters.a.lora.a",
        "model.adapter_heads.a.weight",
        "model.adapter_heads.a.bias",
        "decoder.x",
    ]
    renamed = rename_heads(tensors, "head.fc", "a", set(new))
    assert list(renamed) == new  # the order stays: an optimiser's state goes by it
    assert [int(tensor) for tensor in renamed.values()] == [0, 1, 2, 3]


def test_names_that_are_needed_or_belong_elsewhere_stay():
    tensors = {"model.head.weight": torch.zeros(1), "model.head_norm.weight": torch.zeros(1)}
    assert list(rename_heads(tensors, "head", "a", set(tensors))) == list(tensors)
    both = {*tensors, "model.adapter_heads.a.weight"}
    assert list(rename_heads(tensors, "head", "a", both)) == list(tensors)
    assert list(rename_heads(tensors, "head", "b", {"model.adapter_heads.a.weight"})) == list(tensors)
    assert list(rename_heads(tensors, None, "a", {"model.adapter_heads.a.weight"})) == list(tensors)


def test_moved_settings_that_are_off_are_left_out():
    settings = {"lr": 0.0, "head_sparsity": 0.0}
    assert without_moved(settings) == {"lr": 0.0}
    assert without_moved({"head_sparsity": 1e-4}) == {"head_sparsity": 1e-4}
    assert "model.method.head_sparsity" in MOVED["head_sparsity"]
