"""TriAdapt: counts, the growth of ranks through the callback that a trainer calls, files, and a resumed training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import vispeft
from tests.conformance.cells import Cell
from vispeft.errors import ConfigError, FileError, SiteError
from vispeft.methods.triadapt import Leading, TriAdaptUnit, ranks_of
from vispeft.tasks.ema import EMA

METHOD = vispeft.TriAdapt(rank=2, step=1, most=4, interval=1, warmup=0.1)
KEY = "blocks.0.mlp.fc1/triadapt"


class Training:
    """A training without Lightning: what a callback asks of task and trainer, and the steps."""

    def __init__(self, method: vispeft.TriAdapt = METHOD) -> None:
        torch.manual_seed(0)
        self.model = Cell("triadapt", "vit", short=True).model().train()
        self.bank = vispeft.attach(self.model, method, verify=False)
        self.optimizer = torch.optim.AdamW(self.bank.parameter_groups(1e-2, 1e-4))
        self.trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=8)
        self.task = SimpleNamespace(bank=self.bank, ema=None)
        (self.callback,) = self.bank.callbacks()

    def begin(self) -> None:
        self.callback.on_train_batch_start(self.trainer, self.task, None, 0)

    def steps(self, count: int) -> list[int]:
        sums = []
        for _ in range(count):
            self.begin()
            self.optimizer.zero_grad()
            images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(self.trainer.global_step))
            F.cross_entropy(self.model(images), torch.arange(4)).backward()
            self.optimizer.step()
            self.trainer.global_step += 1
            sums.append(sum(ranks_of(self.bank).values()))
        return sums

    def units(self) -> list[TriAdaptUnit]:
        return [unit for unit in self.bank.units().values() if isinstance(unit, TriAdaptUnit)]

    def unused(self) -> list[Tensor]:
        """Collect what lies beyond the ranks in use."""
        found = []
        for unit in self.units():
            rank = int(unit.rank)
            found += [unit.A[rank:], unit.B[:, rank:], unit.core[rank:], unit.core[:, rank:]]
            found.append(unit.diagonal[rank // unit.grows :])
        return found


def test_counts() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    method = vispeft.TriAdapt(rank=8, step=4, most=8, roles=("attn.proj",))
    assert vispeft.plan(model, method).trainable == 12 * (8 * 1536 + 64 + 32)
    whole = vispeft.TriAdapt(rank=8, step=8, most=8)  # one step: the formula of the public code, r (i + o) + 2 r^2
    assert vispeft.plan(model, whole).trainable == 12 * (8 * (3072 + 1536 + 3840 + 3840) + 4 * 2 * 64)
    pieces, rank, step = [(4, 4), (4, 4)], 4, 4  # the public code's: rows (g, r + g) and columns (r + g, g) a step
    while rank < 16:
        pieces += [(step, rank + step), (rank + step, step)]
        rank += step
    assert sum(rows * columns for rows, columns in pieces) == 16 * 16 + 16 * 4 <= 2 * 16 * 16


def test_the_core_is_the_sum_of_two_triangles_whose_diagonal_blocks_are_there_twice() -> None:
    unit = Training(vispeft.TriAdapt(rank=4, step=2, most=4)).units()[0]
    torch.nn.init.normal_(unit.core)
    torch.nn.init.normal_(unit.diagonal)
    wanted = unit.core.detach() + torch.block_diag(*unit.diagonal.detach())
    assert torch.equal(unit.whole_core(), wanted)
    a, product = unit.factors()
    torch.testing.assert_close(product @ a, unit.B @ wanted @ unit.A)


def test_ranks_grow_to_their_mean_and_leave_the_function_as_it_is() -> None:
    training = Training()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert training.steps(2) == [4, 4]  # the warm-up ends with step 1, the first growth is at step 2
    with torch.no_grad():
        before = training.model(images)
        training.begin()
        assert sum(ranks_of(training.bank).values()) == 5
        torch.testing.assert_close(training.model(images), before)
    training.begin()  # a second batch of the same step, where gradients are summed
    assert training.steps(4) == [5, 6, 7, 8]
    assert all((tensor == 0).all() for tensor in training.unused())
    assert all(bool((unit.core[: int(unit.rank), : int(unit.rank)] != 0).all()) for unit in training.units())


@pytest.mark.parametrize(
    ("pace", "progress", "wanted"),
    [
        ("linear", 0.1, [3]),
        ("linear", 0.7, [3, 1]),
        ("linear", 1.0, [3, 1, 0]),
        ("exponential", 0.0, [3]),
        ("exponential", 1.0, [3, 1, 0]),
    ],
)
def test_which_layers_grow(pace: Any, progress: float, wanted: list[int]) -> None:
    method = vispeft.TriAdapt(rank=2, step=1, most=3, pace=pace)
    assert method.growing([1, 1, 3, 0], [0.2, 0.5, 9.0, 0.7], progress) == wanted
    assert method.growing([2, 2, 3, 1], [0.2, 0.5, 9.0, 0.7], progress) == []


def test_a_training_that_is_resumed_while_ranks_grow_goes_on_bit_for_bit() -> None:
    """From a checkpoint between the start of a batch, at which ranks grew, and its step."""
    whole = Training()
    whole.steps(3)
    whole.begin()
    saved = whole.bank.state_dict(), whole.optimizer.state_dict(), whole.callback.state_dict()
    kept = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, saved)
    assert whole.steps(2) == [6, 7]
    again = Training()
    again.bank.load_state_dict(kept[0])
    again.optimizer.load_state_dict(kept[1])
    again.callback.load_state_dict(kept[2])
    again.trainer.global_step = 3
    assert again.steps(2) == [6, 7]
    pairs = zip(whole.bank.state_dict().values(), again.bank.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_file_holds_the_ranks_in_use_and_merges(tmp_path: Path) -> None:
    training = Training()
    training.steps(3)
    training.bank.save(tmp_path)
    stored, used = load_file(tmp_path / "adapter.safetensors"), ranks_of(training.bank)
    assert stored[f"{KEY}.A"].nbytes == 8 + 4 * used[KEY] * 24
    assert stored[f"{KEY}.B"].nbytes == 8 + 4 * used[KEY] * 96
    assert set(used.values()) == {1, 2}
    again = Cell("triadapt", "vit", short=True).model()
    bank = vispeft.load(again, tmp_path)
    assert ranks_of(bank) == used
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = training.model.eval()(images)
        assert torch.equal(again.eval()(images), wanted)
        assert bank.merge().max_error < 1e-5
        torch.testing.assert_close(again(images), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [(0, 0), (2, 3), (3, 4), (1, 4)])
def test_leading_blocks(block: tuple[int, int]) -> None:
    values = torch.zeros(3, 4)
    values[: block[0], : block[1]] = 1 + torch.arange(block[0] * block[1]).reshape(block)
    stored = Leading().encode(values)
    assert stored.nbytes == 8 + 4 * block[0] * block[1]
    assert torch.equal(Leading().decode(stored, (3, 4), torch.float32), values)
    for broken in (stored[:-1], stored[:3], torch.cat([stored, stored.new_zeros(4)])):
        with pytest.raises(FileError, match="leading block"):
            Leading().decode(broken, (3, 4), torch.float32)
    with pytest.raises(FileError, match="leading block"):
        Leading().decode(Leading().encode(torch.ones(5, 1)), (3, 4), torch.float32)


def test_the_penalty_counts_the_ranks_in_use() -> None:
    training = Training(vispeft.TriAdapt(rank=2, step=1, most=4, orthogonal=0.5))
    with torch.no_grad():
        for unit in training.units():
            unit.A.zero_()[0, 0] = 1
            unit.B.zero_()[0, 0] = 2
    term = training.bank.loss_terms(None, None)
    assert term is not None
    assert float(term.detach()) == 0.5 * 4 * 9  # four layers with |4 - 1|^2 each


def test_refusals() -> None:
    model = Cell("triadapt", "vit", short=True).model()
    with pytest.raises(ConfigError, match="divides both"):
        vispeft.TriAdapt(rank=8, step=3)
    with pytest.raises(ConfigError, match="at least the mean one"):
        vispeft.TriAdapt(rank=8, most=4)
    with pytest.raises(SiteError, match="rank is lower"):
        vispeft.attach(model, vispeft.TriAdapt(rank=16))
    with pytest.raises(SiteError, match="linear layers"):
        vispeft.attach(model, vispeft.TriAdapt(rank=2, roles=("norm1",)))
    with pytest.raises(ConfigError, match="at least 0"):
        vispeft.TriAdapt(orthogonal=-1.0)
    (callback,) = vispeft.attach(model, METHOD).callbacks()
    with pytest.raises(ConfigError, match="no end"):
        callback.on_train_start(SimpleNamespace(global_step=0, estimated_stepping_batches=float("inf")), None)
    trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=8, optimizers=[])
    with pytest.raises(ConfigError, match=r"ema averages over all steps.*Leave it out"):
        callback.on_train_start(trainer, SimpleNamespace(ema=EMA(0.9)))
