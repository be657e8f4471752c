import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from vispeft.errors import ConfigError
from vispeft.tasks import Classification, warmup_cosine, warmup_factor
from vispeft.tasks.schedules import warmup_decay
from vispeft.tasks.setting_checks import check_numbers
from vispeft.tasks.trainer_checks import check_schedule, steps_per_epoch

NUMBERS = {"lr": 0.1, "lr_ends": (0.0, 0.0), "final_lr": None, "schedule_epochs": None, "weight_decay": 0.0}
NUMBERS |= {"base_dtype": "float32", "warmup": 0.0, "layer_decay": 1.0, "ema": 0.0, "num_classes": 2}


def two_groups():
    groups = [{"params": [torch.zeros(1)], "lr": rate, "name": name} for rate, name in ((1.0, "high"), (0.1, "low"))]
    return torch.optim.SGD(groups)


def rates(schedule, steps):
    """List the rates of the groups in the next steps."""
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr())
        schedule.optimizer.step()
        schedule.step()
    return found


def test_rises_in_equal_parts_then_falls_along_a_cosine():
    factors = [warmup_factor(step, 10, 4) for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[7] == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 6)))
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert factors[-1] > 0


def test_a_polynomial_falls_slower_and_then_faster():
    factors = [warmup_factor(step, 10, 4, "poly") for step in range(10)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[7] == pytest.approx((1 - 3 / 6) ** 0.9)
    assert factors[-1] == pytest.approx((1 / 6) ** 0.9)


def test_each_group_keeps_its_own_rate():
    groups = [{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.zeros(1)], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    schedule = warmup_cosine(optimizer, steps=4, warmup=0.5)
    assert schedule.get_last_lr() == [0.5, 0.05]
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [1.0, 0.1]


@pytest.mark.parametrize(("steps", "warmup"), [(math.inf, 0.1), (0, 0.1), (10, 1.0), (10, -0.1)])
def test_a_training_without_end_or_beginning_is_refused(steps, warmup):
    with pytest.raises(ConfigError):
        warmup_cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), steps, warmup)


def test_a_warm_up_may_start_and_a_decay_end_above_zero():
    factors = [warmup_factor(step, 10, 4, ends=(0.2, 0.1)) for step in range(11)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[7] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 3 / 6)))
    assert factors[10] == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_a_longer_schedule_is_cut_off_by_the_end_of_the_training(warmup):
    steps, length, rising = 8, 20, round(8 * warmup)
    found = rates(warmup_decay(two_groups(), steps, warmup, "cosine", (0.0, 0.1), length=length), steps)
    for step in range(rising, steps):
        fallen = (1 + math.cos(math.pi * (step - rising) / (length - rising))) / 2
        assert found[step] == pytest.approx([0.1 + 0.9 * fallen, 0.01 + 0.09 * fallen])
    assert found[:rising] == [pytest.approx([(step + 1) / rising, (step + 1) / rising / 10]) for step in range(rising)]


def test_groups_may_end_at_the_same_rate():
    found = rates(warmup_decay(two_groups(), 10, 0.0, "cosine", final_lr=0.05), 11)
    assert found[5] == pytest.approx([0.05 + 0.95 / 2, 0.05 + 0.05 / 2])
    assert found[10] == pytest.approx([0.05, 0.05])
    with pytest.raises(ConfigError, match=r"final_lr is 0\.5, .*group 'low' is 0\.1"):
        warmup_decay(two_groups(), 10, 0.0, "cosine", final_lr=0.5)


def test_a_training_that_goes_on_has_the_same_rates_also_with_more_epochs():
    whole = rates(warmup_decay(two_groups(), 8, 0.0, "cosine", length=20, final_lr=0.01), 8)
    first = warmup_decay(two_groups(), 5, 0.0, "cosine", length=20, final_lr=0.01)
    begun = rates(first, 5)
    optimizer = two_groups()
    second = warmup_decay(optimizer, 8, 0.0, "cosine", length=20, final_lr=0.01)
    optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert begun + rates(second, 3) == whole


def test_a_schedule_shorter_than_the_training_is_refused():
    with pytest.raises(ConfigError, match=r"20 steps \(schedule_epochs\), and the training has 21"):
        warmup_decay(two_groups(), 21, 0.0, "cosine", length=20)
    warmup_decay(two_groups(), 20, 0.0, "cosine", length=20)
    with pytest.raises(ConfigError, match=r"schedule_epochs is 5 and trainer\.max_epochs 6: .*schedule_epochs out"):
        check_schedule(5, 6)
    for schedule, trained in ((6, 6), (7, 6), (None, 6), (5, None), (5, -1)):
        check_schedule(schedule, trained)


def test_steps_of_an_epoch():
    trainer = SimpleNamespace(train_dataloader=(), num_training_batches=91, accumulate_grad_batches=2)
    assert steps_per_epoch(trainer) == 46
    trainer.num_training_batches = math.inf
    with pytest.raises(ConfigError, match="do not say how many batches"):
        steps_per_epoch(trainer)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        *(({"schedule_epochs": value}, "whole number of epochs") for value in (0, -3, 2.5, math.inf, math.nan, True)),
        *(({"final_lr": value}, "a learning rate from 0") for value in (-1e-3, math.inf, math.nan)),
        ({"final_lr": 0.2}, r"lr is 0\.1.*at most lr"),
        ({"final_lr": 1e-3, "lr_ends": (0.0, 0.1)}, "not both"),
    ],
)
def test_what_a_schedule_cannot_have_is_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        check_numbers(Classification, {**NUMBERS, **settings})
    check_numbers(Classification, {**NUMBERS, "schedule_epochs": 50, "final_lr": 0.1})
