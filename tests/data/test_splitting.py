import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vispeft.data.splitting import cross_validation, hold_out, share_of_rest, strata


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=80), st.sampled_from([0.1, 0.2, 0.5]), st.integers(0, 99))
def test_what_is_held_out_has_its_share_of_every_class(labels, share, seed):
    targets = torch.tensor(labels)
    rest, held = hold_out(targets, share, seed)
    assert sorted(rest.tolist() + held.tolist()) == list(range(len(labels)))
    for label in set(labels):
        count, taken = labels.count(label), int((targets[held] == label).sum())
        assert taken == 0 if count == 1 else abs(taken - count * share) < 1
        assert taken < count
    again = hold_out(targets, share, seed)
    assert torch.equal(again[1], held)


def test_a_share_of_all_images_is_one_of_what_the_test_images_leave():
    assert share_of_rest(0.2, 0.2) == pytest.approx(0.25)
    assert share_of_rest(0.6, 0.2) == pytest.approx(0.75)
    assert share_of_rest(0.2, 0) == 0.2
    assert share_of_rest(0.5, 1 / 2) == 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=5, max_size=80), st.integers(2, 5), st.integers(0, 99))
def test_folds_deal_every_class_evenly(labels, folds, seed):
    targets = torch.tensor(labels)
    parts = [cross_validation(targets, folds, fold, seed) for fold in range(folds)]
    assert sorted(torch.cat([held for _, held in parts]).tolist()) == list(range(len(labels)))
    assert max(len(held) for _, held in parts) - min(len(held) for _, held in parts) <= 1
    for label in set(labels):
        counts = [int((targets[held] == label).sum()) for _, held in parts]
        assert max(counts) - min(counts) <= 1
    for rest, held in parts:
        assert not set(rest.tolist()) & set(held.tolist())


def test_rare_labels_and_all_sizes_are_spread():
    several = torch.zeros(40, 3)
    several[:, 0] = 1
    several[:8, 1] = 1
    _, held = hold_out(several, 0.25, 0)
    assert int(several[held, 1].sum()) == 2
    numbers = torch.arange(100.0)[:, None]
    _, held = hold_out(numbers, 0.2, 0)
    assert len(held) == 20
    assert [int(((numbers[held] >= low) & (numbers[held] < low + 10)).sum()) for low in range(0, 100, 10)] == [2] * 10
    equal = torch.tensor([[0.5]] * 9 + [[0.7]])
    assert strata(equal)[:9].unique().numel() == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_another_seed_draws_another_split(seed):
    targets = torch.arange(40) % 4
    assert not torch.equal(hold_out(targets, 0.2, seed)[1], hold_out(targets, 0.2, seed + 2)[1])
