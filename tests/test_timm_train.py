"""Training the way timm's own script does, with the parts timm ships: the script itself is not in its package."""

import argparse
import copy

import pytest
import timm
import torch
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch.nn import functional as F

import vispeft
from tests.tiny import TINY
from vispeft.adapters.bank import AdapterBank

EPOCHS, STEPS = 4, 3
METHODS = [vispeft.Full(), vispeft.LoRA(), vispeft.SSF(), vispeft.VPT(num_tokens=2), vispeft.LinearProbe()]


def make(method):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **TINY)
    vispeft.attach(model, method)
    return model


def parts(model, layer_decay=0.75):
    """Optimiser, schedule and average, as train.py makes them from --opt adamw --layer-decay 0.75 --model-ema."""
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=layer_decay)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=1e-3)
    return optimizer, scheduler, ema


def run(model, folder, resume=None, stop=EPOCHS):
    optimizer, scheduler, ema = parts(model)
    begin = 0
    if resume is not None:
        begin = resume_checkpoint(model, resume, optimizer)
        load_checkpoint(ema.module, resume, use_ema=True)
        scheduler.step(begin)
    folder.mkdir(exist_ok=True)
    args = argparse.Namespace(model="vit_tiny_patch16_224")
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=folder, recovery_dir=folder)
    for epoch in range(begin, stop):
        model.train()
        generator = torch.Generator().manual_seed(epoch)
        for step in range(STEPS):
            images = torch.randn(8, 3, 16, 16, generator=generator)
            loss = F.cross_entropy(model(images), torch.arange(8) % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model, step=epoch * STEPS + step)
        saver.save_checkpoint(epoch, metric=-loss.item())
        scheduler.step(epoch + 1)
    return ema


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_resumed_training_ends_as_one_that_was_not_stopped(tmp_path, method):
    straight = make(method)
    frozen = {name: p.clone() for name, p in straight.named_parameters() if not p.requires_grad}
    start = {name: p.clone() for name, p in straight.named_parameters() if p.requires_grad}
    average = run(straight, tmp_path / "straight")
    assert all(torch.equal(p, frozen[name]) for name, p in straight.named_parameters() if name in frozen)
    assert not any(torch.equal(p, start[name]) for name, p in straight.named_parameters() if name in start)
    run(make(method), tmp_path / "stopped", stop=2)
    resumed = make(method)
    with torch.serialization.safe_globals([argparse.Namespace]):
        again = run(resumed, tmp_path / "resumed", resume=str(tmp_path / "stopped/last.pth.tar"))
    for one, other in ((straight, resumed), (average.module, again.module)):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    bank = AdapterBank.of(average.module)
    bank.save(tmp_path / "adapter")
    fresh = make(vispeft.LinearProbe())
    vispeft.load(fresh, tmp_path / "adapter", name="averaged")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fresh.eval()(images), average.module.eval()(images))
    assert not torch.equal(fresh(images), straight.eval()(images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"])
def test_what_trains_learns_at_the_rate_of_its_layer(name):
    small = {
        "vit": TINY,
        "eva02": {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2},
        "swin": {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4},
    }[name.partition("_")[0]]
    plain = timm.create_model(name, num_classes=4, **{**small, "pretrained": False})
    adapted = copy.deepcopy(plain)
    bank = vispeft.attach(adapted, vispeft.Full(), verify=False)
    expected, found = (groups_by_name(model) for model in (plain, adapted))
    for tensor, (scale, decay) in expected.items():
        unit = "adapters.default.full."
        path, _, leaf = tensor.rpartition(".")
        own = f"{path}.{unit}{leaf}" if path else f"{unit}{leaf}"
        own = f"adapter_heads.default.{leaf}" if path == bank.view.head_path else own
        assert found[own] == (scale, decay), tensor
    assert len(found) == len(expected)


def groups_by_name(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    groups = optimizer.param_groups
    return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
