"""Optimisers by name: a closed list, with the groups of the adapter."""

import io
import sys

import pytest
import torch
from timm.optim import list_optimizers

import vispeft
from tests.tiny import TINY
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.tasks import Classification
from vispeft.tasks.optimizers import _UNFIT, check_optimizer, make_optimizer, optimizer_node

MOMENTUM = {"class_path": "SGD", "init_args": {"momentum": 0.9}}


def make(**settings):
    torch.manual_seed(0)
    method = vispeft.LoRA(rank=2, lr_ratio=4.0)
    backbone = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY}
    return Classification(**backbone, method=method, num_classes=3, lr=1e-2, weight_decay=0.05, **settings)


@pytest.mark.parametrize("given", ["SGD", "torch.optim.SGD", {"class_path": "torch.optim.sgd.SGD"}])
def test_names_are_written_out(given):
    assert optimizer_node(given) == {"class_path": "torch.optim.SGD", "init_args": {}}


def test_groups_keep_rates_and_decays_with_every_optimizer():
    tasks = {"AdamW": make(), "SGD": make(optimizer=MOMENTUM)}
    groups = {}
    for name, task in tasks.items():
        optimizer = make_optimizer(task.optimizer, task.bank.parameter_groups(task.lr, task.weight_decay))
        assert type(optimizer).__name__ == name
        groups[name] = [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert groups["AdamW"] == groups["SGD"]
    assert {(name, rate, decay) for name, rate, decay, _ in groups["SGD"]} == {
        ("decay", 1e-2, 0.05),
        ("decay lr x 4", 4e-2, 0.05),
        ("no_decay", 1e-2, 0.0),
    }
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_lists_of_yaml_become_tuples():
    node = check_optimizer({"class_path": "Adam", "init_args": {"betas": [0.5, 0.9]}}, 0.0)
    optimizer = make_optimizer(node, [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}])
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("AdamX", r"Unknown optimizer 'AdamX'.*Adam.*classes of torch\.optim"),
        ("adamw", r"Did you mean 'AdamW'\?"),  # as timm writes it
        ("timm.optim.lyon", r"Unknown optimizer of timm 'lyon'.*lion"),
        ("timm.optim.bnbadamw8bit", "Unknown optimizer of timm 'bnbadamw8bit'"),
        ("timm.optim.adahessian", "adahessian cannot train a task: it needs second derivatives"),
        ("timm.optim.muon", "it takes matrices alone"),
        ({"class_path": "timm.optim.lion", "init_args": {"beta": 1}}, r"argument of timm.optim.lion 'beta'.*betas"),
        ("schedulefree.Adam", "Unknown optimizer of schedulefree 'Adam'"),
        ("os.system", r"Unknown optimizer 'os\.system'"),
        ("torch.optim.Optimizer", "Unknown optimizer"),
        ({"class_path": "torch.optim.lr_scheduler.LambdaLR"}, "Unknown optimizer"),
        ("LBFGS", "LBFGS cannot train a task: it needs the loss as a closure"),
        ("SparseAdam", "sparse gradients"),
        ({"class_path": "SGD", "init_args": {"momentm": 0.9}}, r"argument of SGD 'momentm'.*momentum"),
        ({"class_path": "SGD", "init_args": {"lr": 0.1}}, r"has lr, .*Give model\.lr"),
        ({"class_path": "SGD", "init_args": {"weight_decay": 0.1}}, r"Give model\.weight_decay"),
        ({"class_path": "SGD", "init_args": {"params": []}}, "argument of SGD 'params'"),
        ({"class_path": "SGD", "init_args": {"momentum": -1.0}}, r"SGD\(momentum=-1\.0\) cannot be made: Invalid mom"),
        ({"class_path": "SGD", "init_args": {"momentum": "much"}}, r"SGD\(momentum='much'\) cannot be made"),
        ({"class_path": "Adam", "init_args": {"capturable": True}}, "has capturable: .*Leave it out"),
        ({"class_path": "SGD", "init_args": {"differentiable": True}}, "has differentiable: .*Leave it out"),
        ({"class_path": "SGD", "init_args": {"maximize": "no"}}, "maximize: 'no'; true or false is needed"),
        ({"class_path": "SGD", "init_args": 3}, "arguments of SGD by name"),
        ({"class_path": "SGD", "args": {}}, r"optimizer\.args'.*optimizer\.init_args"),
        ({"name": "SGD"}, "give a name such as SGD"),
        (7, r"optimizer=7\): a text or a dictionary is needed"),
        ("Rprop", r"Rprop has no weight decay, and weight_decay is 0\.05"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(given, told):
    with pytest.raises(ConfigError, match=told):
        make(optimizer=given)


def test_an_optimizer_without_decay_serves_a_task_without_it():
    assert check_optimizer("Rprop", 0.0)["class_path"] == "torch.optim.Rprop"
    with pytest.raises(UnknownNameError):
        check_optimizer("adamw", 0.0)


@pytest.mark.parametrize("name", ["timm.optim.lion", "timm.optim.lamb", "timm.optim.cadamw", "timm.optim.nesterov"])
def test_optimizers_of_timm_keep_the_groups(name):
    task = make(optimizer=name)
    groups = task.bank.parameter_groups(task.lr, task.weight_decay)
    optimizer = make_optimizer(task.optimizer, groups)
    assert task.optimizer["class_path"] == name
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (g["name"], g["lr"], g["weight_decay"]) for g in groups
    ]
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    before = task.bank.head().weight.detach().clone()
    optimizer.step()
    assert not torch.equal(task.bank.head().weight, before)


def test_a_schedule_free_optimizer_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ConfigError, match="pip install schedulefree"):
        make(optimizer="schedulefree.AdamWScheduleFree")


def trained(node, steps, kept=None):
    """Take steps from a fixed start, or go on from what was kept, and return what a checkpoint keeps, as a file."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 5), (4, 3, 2, 2), (5,))]
    groups = [{"params": parameters[:2], "lr": 1e-2, "weight_decay": 0.01, "name": "decay"}]
    groups.append({"params": parameters[2:], "lr": 4e-2, "weight_decay": 0.0, "name": "no_decay"})
    optimizer = make_optimizer(node, groups)
    if kept is not None:
        found = torch.load(io.BytesIO(kept), weights_only=True)
        optimizer.load_state_dict(found["optimizer"])
        for parameter, values in zip(parameters, found["parameters"], strict=True):
            parameter.data.copy_(values)
        torch.set_rng_state(found["random"])
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    file, values = io.BytesIO(), [parameter.detach().clone() for parameter in parameters]
    torch.save({"optimizer": optimizer.state_dict(), "parameters": values, "random": torch.get_rng_state()}, file)
    return file.getvalue(), values


@pytest.mark.slow
def test_every_optimizer_of_timm_goes_on_bit_for_bit(monkeypatch):
    monkeypatch.setattr("timm.optim.kron.has_dynamo", False)  # the same functions, without compiling them
    names = [f"timm.optim.{name}" for name in list_optimizers(exclude_filters=["bnb*", "fused*"])]
    names = [name for name in names if name not in _UNFIT]
    assert {"timm.optim.kron", "timm.optim.adopt", "timm.optim.mars"} <= set(names)
    other = []
    for name in names:
        node = optimizer_node(name)
        _, whole = trained(node, range(12))
        kept, _ = trained(node, range(5))
        _, resumed = trained(node, range(5, 12), kept)
        if not all(map(torch.equal, whole, resumed)):
            other.append(name)
    assert other == []
