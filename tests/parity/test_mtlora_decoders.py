"""The public MTLoRA model with our decoders and losses: outputs, losses, and gradients of every tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.parity.test_mtlora import CLAIMED, adapted, assert_all_close, parameters, public
from tests.parity.test_parity import below
from vispeft.data.dense_targets import DenseTarget
from vispeft.heads import decoder as make_decoder
from vispeft.heads.pyramid import MapReader
from vispeft.interop import to_official
from vispeft.tasks import MultiTaskNetwork, dense_loss

KINDS = {"normals": "normals", "sal": "saliency"}
LAST = {"conv": "0", "bn": "1", "conv_seg": "3"}


def official(task: str, name: str) -> str:
    """Name a tensor of our decoder as the public code does."""
    part, _, rest = name.partition(".")
    if part == "reducers":
        index, _, tensor = rest.partition(".")
        return f"downsampler.{task}.downsample_{index}.{tensor}"
    return f"decoders.decoders.{task}.last_layer.{LAST[part]}.{rest}"


@pytest.mark.skipif("mtlora_full_model" not in CLAIMED, reason="the folder has no such file")
def test_decoders_and_losses_of_the_whole_public_model() -> None:
    meta, tensors, model, bank = adapted("mtlora_full_model", torch.float64)
    given = below(tensors, "decoder.")
    targets = {
        task: DenseTarget(kind=KINDS[task])  # type: ignore[arg-type]
        if task in KINDS
        else DenseTarget(kind="classes", class_names=tuple(map(str, range(count))))
        for task, count in meta["num_outputs"].items()
    }
    decoders = nn.ModuleDict()
    for task, target in targets.items():
        head = make_decoder("hrnet", (16, 32, 64, 64), target.channels, channels=meta["decoder_channels"])
        own = {name: given[official(task, name)] for name in head.state_dict() if "num_batches" not in name}
        head.load_state_dict(own, strict=False)
        decoders[task] = head
    network = MultiTaskNetwork(model, MapReader(model), nn.ModuleDict(), decoders.double()).eval()
    outputs = network(tensors["input"].double())
    assert_all_close(outputs, below(tensors, "out."), 1e-6)

    labels = {
        task: labels.squeeze(1).long() if targets[task].kind == "classes" else labels
        for task, labels in below(tensors, "target.").items()
    }
    losses = {task: dense_loss(targets[task], task)(values, labels[task]) for task, values in outputs.items()}
    total = sum(meta["loss_weights"][task] * loss for task, loss in losses.items())
    assert_all_close({**losses, "total": total}, {k: t.squeeze() for k, t in below(tensors, "loss.").items()}, 1e-6)
    total.backward()
    wanted = below(tensors, "grad_loss.")
    trained = {name: t.grad for name, t in zip(to_official(bank, "mtlora"), parameters(bank), strict=True)}
    assert {f"adapter.{name}" for name, t in trained.items() if t is None} == set(meta["trainable_without_gradient"])
    found = {f"adapter.{name}": t for name, t in trained.items() if "lora" in name and t is not None}
    base = [name for name in wanted if name.startswith("backbone.")]
    found |= {name: trained[public(name.removeprefix("backbone."))] for name in base}
    for task, head in decoders.items():
        found |= {f"decoder.{official(task, name)}": p.grad for name, p in head.named_parameters()}
    assert_all_close(found, wanted, 1e-5)
