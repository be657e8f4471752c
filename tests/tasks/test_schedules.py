import itertools
import math

import pytest
import torch

from vispeft.errors import ConfigError
from vispeft.tasks import warmup_cosine, warmup_factor


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
