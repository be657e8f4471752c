"""Schedules over blocks: who trains in a step, what is kept, what a checkpoint holds, and what is refused."""

from __future__ import annotations

import copy
import logging
import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

import vispeft
from tests.parity.beyond import OUTPUT, differs, file
from tests.tasks.test_hooks import Batches, tensors_of, trainer
from tests.tiny import TINY
from vispeft.errors import ConfigError
from vispeft.tasks import Classification, ProgressiveLayers, SampledLayers, Segmentation, TensorDecay
from vispeft.tasks.sampled_layers import updated_scores


def make(method=None, depth=4, cls=Classification, **settings):
    torch.manual_seed(0)
    backbone = {"backbone": "vit_tiny_patch16_224", "backbone_args": {**TINY, "depth": depth}}
    task = cls(**backbone, num_classes=3, method=method or vispeft.LoRA(rank=2), lr=1e-2, **settings)
    return task, Batches(lambda g: torch.randint(3, (12,), generator=g))


def block_of(name):
    return int(re.split("[./]", name)[1])


class Watch(pl.Callback):
    """Notes which blocks have gradients at each optimiser step, and which have optimiser state after it."""

    def __init__(self):
        self.gradients, self.states, self.flags = [], [], []

    def blocks(self, task, has):
        tensors = task.bank.named_tensors().items()
        return {block_of(name) for name, tensor in tensors if name.startswith("blocks") and has(tensor)}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(self.blocks(pl_module, lambda tensor: tensor.grad is not None))

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = trainer.optimizers[0].state
        self.states.append(self.blocks(pl_module, lambda tensor: tensor in state))
        self.flags.append(self.blocks(pl_module, lambda tensor: tensor.requires_grad))


def fit(schedule, method=None, depth=4, **settings):
    task, data = make(method, depth)
    watch = Watch()
    trainer(callbacks=[schedule, watch], **settings).fit(task, datamodule=data)
    return task, watch


def test_only_chosen_blocks_have_gradients_and_state():
    before = tensors_of(make()[0])
    task, watch = fit(SampledLayers(share=0.25), max_epochs=1, limit_train_batches=2)
    assert all(len(blocks) == 1 for blocks in watch.gradients)
    assert watch.states[0] == watch.gradients[0]
    assert watch.states[1] == watch.gradients[0] | watch.gradients[1]
    moved = {name for name, tensor in tensors_of(task).items() if not torch.equal(tensor, before[name])}
    wanted = {f"model.blocks.{block}." for block in watch.states[1]}
    assert {name for name in moved if ".blocks." in name}
    assert all(any(name.startswith(start) for start in wanted) for name in moved if ".blocks." in name)
    assert any("head" in name for name in moved)
    assert watch.flags[-1] == {0, 1, 2, 3}, "every tensor requires a gradient again after a step"


def test_a_choice_holds_while_gradients_are_summed():
    _, watch = fit(SampledLayers(share=0.5), max_epochs=4, accumulate_grad_batches=3)
    assert len(watch.gradients) == 4
    assert all(len(blocks) == 2 for blocks in watch.gradients)
    assert len(set(map(tuple, watch.gradients))) > 1


def test_unchosen_blocks_neither_move_by_momentum_nor_decay():
    schedule = SampledLayers(share=0.25)
    task, data = make()
    seen = []

    class Compare(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = tensors_of(pl_module)

        def on_train_batch_end(self, trainer, pl_module, *_):
            after, chosen = tensors_of(pl_module), schedule.chosen
            names = {name for name in after if ".blocks." in name and not torch.equal(after[name], self.before[name])}
            seen.append({int(name.split("blocks.")[1].split(".")[0]) for name in names} <= set(chosen))

    trainer(callbacks=[schedule, Compare()], max_epochs=3).fit(task, datamodule=data)
    assert seen == [True] * 9


def test_scores_move_as_in_the_public_code():
    _, tensors = file("ist_update")
    score = tensors["input.score"].double()
    for turn in (0, 1):
        score = updated_scores(score, tensors[f"input.losses.{turn}"].double(), tensors[f"input.suppressed.{turn}"])
        assert differs(score, tensors[f"out.score.{turn}"]) <= OUTPUT["float64"]


def test_large_losses_leave_a_reward():
    sets = torch.tensor([[0], [1], [2]])
    moved = updated_scores(torch.zeros(4), torch.tensor([300.0, 301.0, 302.0]), sets)
    assert moved[0] > 0 > moved[2]
    assert moved[3] == 0


def test_scoring_suppresses_and_restores_and_is_in_checkpoints():
    schedule = SampledLayers(every_n_steps=2)
    task, _ = fit(schedule, max_epochs=1)
    assert schedule.score.abs().sum() > 0
    assert all(unit.gain is None for unit in task.bank.units().values())
    other = SampledLayers()
    other.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert torch.equal(other.score, schedule.score)
    step = SimpleNamespace(global_step=2)
    other.layers = schedule.layers
    other.choose(step, task, None)  # scored before: the batch is not touched
    assert torch.equal(other.score, schedule.score)


def test_scoring_restores_each_mode_also_after_an_error():
    def broken(*_):
        raise ValueError("no loss")

    task, _ = make()
    next(iter(task.train().bank.units().values())).eval()
    before = {name: module.training for name, module in task.named_modules()}
    schedule = SampledLayers()
    schedule.layers = [(f"blocks.{block}", {}) for block in range(4)]
    schedule.score = torch.zeros(4)
    schedule._suppressed_loss = broken
    with pytest.raises(ValueError, match="no loss"):
        schedule._score_blocks(None, task, None, 0)
    assert {name: module.training for name, module in task.named_modules()} == before


def test_processes_draw_alike_and_probable_blocks_come_more_often():
    first, second = SampledLayers(seed=3), SampledLayers(seed=3)
    score = torch.tensor([4.0, 0.0, -4.0, -4.0])
    draws = [first.drawn(step, 1, score) for step in range(200)]
    assert draws == [second.drawn(step, 1, score) for step in range(200)]
    counts = [sum(draw == (block,) for draw in draws) for block in range(4)]
    assert counts[0] > counts[1] > max(counts[2:])
    assert draws != [SampledLayers(seed=4).drawn(step, 1, score) for step in range(200)]
    uniform = SampledLayers(uniform=True)
    assert sum(uniform.drawn(step, 1, score) == (3,) for step in range(200)) > 20


def test_a_compiled_model_masks_and_says_so(monkeypatch, caplog):
    seen = {}
    for masks in (False, True):
        schedule = SampledLayers(every_n_steps=2)
        task, data = make()
        monkeypatch.setattr(type(task.bank), "is_compiled", property(lambda bank, masks=masks: masks))
        with caplog.at_level(logging.WARNING):
            trainer(callbacks=[schedule], max_epochs=1).fit(task, datamodule=data)
        assert schedule.masks == masks
        seen[masks] = tensors_of(task)
    assert "drops those of the blocks that a step leaves out, since the model is compiled" in caplog.text
    assert "SampledLayers trains 1 of 4 blocks" in caplog.text
    assert all(torch.equal(tensor, seen[True][name]) for name, tensor in seen[False].items())


def test_blocks_join_from_the_last_one():
    _, watch = fit(ProgressiveLayers(until=0.5), max_epochs=4)  # 12 steps, all blocks from the sixth
    assert watch.gradients == [{3}, {3}, {2, 3}, {2, 3}, {1, 2, 3}, {1, 2, 3}, *[{0, 1, 2, 3}] * 6]


def test_a_and_b_decay_differently():
    task, data = make()
    schedule = TensorDecay({"A": 0.0, "B": 0.5})
    run = trainer(callbacks=[schedule], max_epochs=1)
    run.fit(task, datamodule=data)
    own = task.bank.named_tensors()
    decays = {id(p): group["weight_decay"] for group in run.optimizers[0].param_groups for p in group["params"]}
    for name, tensor in own.items():
        wanted = {"A": 0.0, "B": 0.5}.get(name.rpartition(".")[2])
        assert wanted is None or decays[id(tensor)] == wanted, name
    assert decays[id(own["head/weight"])] == task.weight_decay


@pytest.mark.parametrize("method", [vispeft.LinearProbe(), vispeft.VPT(num_tokens=2), vispeft.LST(reduction=2)])
def test_methods_without_units_in_blocks_are_refused(method):
    for schedule in (SampledLayers(), ProgressiveLayers()):
        task, data = make(method)
        with pytest.raises(ConfigError, match="chooses among blocks"):
            trainer(callbacks=[schedule]).fit(task, datamodule=data)


def test_further_refusals():
    task, data = make(vispeft.Prefix(length=2))
    with pytest.raises(ConfigError, match="uniform=True"):
        trainer(callbacks=[SampledLayers()]).fit(task, datamodule=data)
    task, data = make(vispeft.SSF())
    with pytest.raises(ConfigError, match="no such tensor; they have scale, shift"):
        trainer(callbacks=[TensorDecay()]).fit(task, datamodule=data)
    for wrong in ({"share": 0.0}, {"suppressed": 1.0}, {"subsets": 0}, {"every_n_steps": 1.5}, {"images": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SampledLayers(**wrong)
    with pytest.raises(ConfigError, match="until"):
        ProgressiveLayers(until=0)
    with pytest.raises(ConfigError, match="at least 0"):
        TensorDecay({"A": -1.0})


@pytest.mark.slow
def test_shared_tensors_and_the_classifier_always_train():
    _, watch = fit(SampledLayers(share=0.25), vispeft.FacT(rank=2, dropout=0.0), max_epochs=1)
    task, _ = make(vispeft.FacT(rank=2))
    lenders = {item.lender.partition("/")[0] for item in task.bank.plan() if item.lender}
    shared = {block_of(lender) for lender in lenders}
    assert all(blocks >= shared for blocks in watch.gradients)


def test_segmentation_is_scored_by_its_loss():
    torch.manual_seed(0)
    task, _ = make(cls=Segmentation, decoder="linear")
    data = Batches(lambda g: torch.randint(3, (12, 16, 16), generator=g))
    schedule = SampledLayers(every_n_steps=1)
    trainer(callbacks=[schedule], max_epochs=1).fit(task, datamodule=data)
    assert schedule.score.abs().sum() > 0
