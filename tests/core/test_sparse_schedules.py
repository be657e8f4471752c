"""Drop and regrow while training, through the callback that a trainer calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vispeft
from tests.conformance.cells import Cell
from vispeft.errors import ConfigError
from vispeft.methods.sparse import SparseUnit
from vispeft.methods.sparse_schedules import SM3, DropAndRegrow, SparseAdamW, replace
from vispeft.tasks.ema import EMA

METHOD = vispeft.Sparse(budget=60, schedule="rigl", interval=3, accumulate=2, regrow=0.5, roles=("mlp.fc1", "mlp.fc2"))
LIFT = vispeft.Sparse(budget=60, support="lift", schedule="lift", interval=3, principal=2, roles=("mlp.fc1", "mlp.fc2"))


class Training:
    """A training without Lightning: what a callback asks of task and trainer, and the steps."""

    def __init__(self, kind: str, method: vispeft.Sparse = METHOD, parts: int = 1) -> None:
        self.cell = Cell("sparse", "vit", short=True)
        self.model = self.cell.model().train()
        self.bank = vispeft.attach(self.model, method)
        kinds: dict[str, Any] = {"SM3": SM3, "SparseAdamW": SparseAdamW, "AdamW": torch.optim.AdamW}
        self.optimizer = (kinds.get(kind) or getattr(torch.optim, kind))(self.bank.parameter_groups(1e-2, 0.0))
        self.trainer = SimpleNamespace(
            optimizers=[self.optimizer],
            world_size=1,
            global_step=0,
            estimated_stepping_batches=12,
            accumulate_grad_batches=parts,
        )
        self.task = SimpleNamespace(bank=self.bank, scaled=False, ema=None)
        (self.callback,) = self.bank.callbacks()
        self.units = [unit for unit in self.bank.units().values() if isinstance(unit, SparseUnit)]

    def steps(self, count: int) -> None:
        parts = self.trainer.accumulate_grad_batches
        for _ in range(count):
            self.optimizer.zero_grad()
            images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(self.trainer.global_step))
            for part in range(parts):
                self.callback.on_train_batch_start(self.trainer, self.task, None, part)
                few, labels = (whole.chunk(parts)[part] for whole in (images, torch.arange(4)))
                (F.cross_entropy(self.model(few), labels) / parts).backward()
                if part == parts - 1:
                    self.optimizer.step()
                    self.trainer.global_step += 1
                self.callback.on_train_batch_end(self.trainer, self.task, None, None, part)

    def state(self) -> list[torch.Tensor]:
        return [tensor.clone() for unit in self.units for tensor in (unit.values.detach(), unit.positions)]


@pytest.mark.parametrize("kind", ["SparseAdamW", "AdamW", "SM3"])
def test_entries_go_and_come(kind: str) -> None:
    training = Training(kind)
    training.callback.on_train_start(training.trainer, training.task)
    before = [unit.positions.clone() for unit in training.units]
    training.steps(2)
    assert all(torch.equal(a, unit.positions) for a, unit in zip(before, training.units, strict=True))
    training.steps(1)
    for old, unit in zip(before, training.units, strict=True):
        changed = old != unit.positions
        assert changed.any()
        assert (unit.values[changed] == 0).all()
        assert len(unit.positions.unique()) == len(unit.positions)
        assert unit.observer is None
    training.steps(1)
    assert all((unit.values != 0).all() for unit in training.units)


@pytest.mark.parametrize("kind", ["SparseAdamW", "AdamW"])
def test_entries_come_with_the_moments_of_whole_steps(kind: str) -> None:
    """Where gradients of two halves of a batch are summed, all is as with one backward pass of the whole batch."""
    found = []
    for parts in (1, 2):
        training = Training(kind, parts=parts)
        training.callback.on_train_start(training.trainer, training.task)
        training.steps(3)
        states = [training.optimizer.state[unit.values] for unit in training.units]
        found.append([[*(state[k] for k in ("exp_avg", "exp_avg_sq"))] for state in states])
        found[-1] += [[unit.positions] for unit in training.units]
        if kind == "SparseAdamW":
            assert all(state["age"].min() == 2 for state in states)  # two steps were watched
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-9)


def test_no_entry_comes_twice() -> None:
    """Of three entries that may go, one can: there is one candidate that does not train, and 2 is left where it is."""
    positions, values = torch.arange(4), torch.arange(1.0, 5.0)
    growth = replace(positions, values, torch.tensor([2, 5]), torch.tensor([1.0, 2.0]), 0.75)
    assert (growth.slots.tolist(), growth.positions.tolist(), growth.chosen.tolist()) == ([0], [5], [1])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        positions = torch.randperm(24, generator=generator)[:12]
        candidates = torch.randperm(24, generator=generator)[: int(torch.randint(1, 13, (), generator=generator))]
        scores, values = (torch.rand(n, generator=generator) for n in (len(candidates), 12))
        growth = replace(positions, values, candidates, scores, float(torch.rand((), generator=generator)))
        assert torch.equal(candidates[growth.chosen], growth.positions)
        assert not torch.isin(growth.positions, positions).any()
        positions[growth.slots] = growth.positions
        assert len(positions.unique()) == 12


def test_the_age_of_an_entry_of_lift_begins_when_it_comes() -> None:
    training = Training("SparseAdamW", LIFT)
    training.callback.on_train_start(training.trainer, training.task)
    before = [unit.positions.clone() for unit in training.units]
    with torch.no_grad():  # far enough from the start that others are the principal weights
        for unit in training.units:
            unit.values.copy_(torch.linspace(-1, 1, len(unit.values)))
    training.steps(2)
    new = [~torch.isin(unit.positions, old) for unit, old in zip(training.units, before, strict=True)]
    start = [unit.values.detach().clone() for unit in training.units]
    for unit, comes in zip(training.units, new, strict=True):
        assert comes.any()
        assert torch.equal(training.optimizer.state[unit.values]["age"], torch.where(comes, 1.0, 3.0))
    training.optimizer.param_groups[0]["eps"] = 0.0
    training.steps(1)
    for unit, comes, values in zip(training.units, new, start, strict=True):
        moved = (unit.values - values)[comes].abs()  # corrected by its own step, the first one is the learning rate
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("taken", [4, 5])
@pytest.mark.parametrize("kind", ["SparseAdamW", "AdamW", "SM3"])
def test_a_resumed_training_goes_on_bit_for_bit(kind: str, taken: int) -> None:
    """From a checkpoint between the start of a batch and its step: the first, or the second, whose gradients choose."""
    whole = Training(kind)
    whole.callback.on_train_start(whole.trainer, whole.task)
    whole.steps(taken)
    whole.callback.on_train_batch_start(whole.trainer, whole.task, None, 0)
    saved = whole.bank.state_dict(), whole.optimizer.state_dict(), whole.callback.state_dict()
    kept = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, saved)
    whole.steps(3)
    assert whole.callback.state_dict()["rounds"] == (taken + 3) // 3
    again = Training(kind)
    again.bank.load_state_dict(kept[0])
    again.optimizer.load_state_dict(kept[1])
    again.callback.load_state_dict(kept[2])
    again.trainer.global_step = taken
    again.callback.on_train_start(again.trainer, again.task)
    again.steps(3)
    assert all(torch.equal(a, b) for a, b in zip(whole.state(), again.state(), strict=True))


def test_sm3_knows_the_entries_of_a_fixed_choice() -> None:
    training = Training("SM3", vispeft.Sparse(budget=60, roles=("mlp.fc1",)))
    training.callback.on_train_start(training.trainer, training.task)
    training.steps(1)
    for unit in training.units:
        state, (rows, columns) = training.optimizer.state[unit.values], (unit.site.out_features, unit.site.columns)
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"row": (rows,), "column": (columns,)}
        assert unit.values.grad is not None
        squares = torch.zeros(rows * columns).index_put((unit.positions.long(),), unit.values.grad.square())
        assert torch.equal(state["row"], squares.view(rows, columns).amax(1))


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_nothing_is_watched_after_a_training(end: str) -> None:
    training = Training("AdamW")
    training.callback.on_train_start(training.trainer, training.task)
    training.steps(2)
    assert all(unit.observer is not None for unit in training.units)
    getattr(training.callback, end)(training.trainer, training.task, *([] if end == "on_train_end" else [OSError()]))
    assert all(unit.observer is None for unit in training.units)


def test_ages_stay_wide_in_a_resumed_training_of_narrow_values() -> None:
    values = [torch.zeros(2, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    first, again = (SparseAdamW([value]) for value in values)
    values[0].grad = torch.ones_like(values[0])
    first.step()
    first.state[values[0]]["age"].fill_(301)  # a bfloat16 would be 300 or 302
    again.load_state_dict(first.state_dict())
    first.step()
    assert again.state[values[1]]["age"].tolist() == [301, 301]
    assert again.state[values[1]]["age"].dtype == torch.float32


def test_sums_of_a_checkpoint_follow_the_weight_to_its_device() -> None:
    rule = DropAndRegrow(interval=3, accumulate=2, rate=0.5, policy="linear")
    rule.restore({"steps": 2, "rounds": 0, "samples": [(2, 1, torch.tensor([0, 3]), torch.ones(2), torch.ones(2))]})
    unit = SimpleNamespace(values=torch.zeros(2, device="meta"))
    rule.before_step([unit])
    unit.observer(torch.ones(2, 2, device="meta"))
    (samples,) = rule.samples
    samples.close()
    assert {t.device.type for t in (samples.candidates, samples.sums, samples.squares)} == {"meta"}
    assert (samples.samples, samples.count) == (2, 2)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("SGD", {}, "cannot in SGD.*SparseAdamW"),
        ("AdamW", {"world_size": 2}, "train with one"),
        ("AdamW", {"scaled": True}, "bf16-mixed"),
        ("AdamW", {"ema": EMA(0.9)}, "leave ema out"),
        ("AdamW", {"compiled": True}, "leave compile out"),
    ],
)
def test_trainings_that_cannot_be_served_are_refused(kind: str, changes: dict[str, Any], says: str) -> None:
    training = Training(kind)
    training.trainer.world_size = changes.get("world_size", 1)
    training.task.scaled, training.task.ema = changes.get("scaled", False), changes.get("ema")
    if "compiled" in changes:
        training.bank.compile(backend="eager")
    with pytest.raises(ConfigError, match=says):
        training.callback.on_train_start(training.trainer, training.task)


def test_fields_of_a_schedule_are_checked() -> None:
    with pytest.raises(ConfigError, match="at most the interval"):
        vispeft.Sparse(schedule="rigl", interval=3, accumulate=4)
    with pytest.raises(ConfigError, match=r"schedule='rig'.*Did you mean 'rigl'"):
        vispeft.Sparse(schedule="rig")
