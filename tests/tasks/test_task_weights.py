import math

import pytest
import torch

from vispeft.data.dense_targets import DenseTarget
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.tasks.task_weights import AveragedWeights, TaskWeights, UncertaintyWeights, task_weights

TARGETS = {
    "semseg": DenseTarget(kind="classes", class_names=("a", "b")),
    "edge": DenseTarget(kind="edge"),
    "relief": DenseTarget(kind="values"),
}


def losses(semseg, edge, relief):
    return {
        name: torch.tensor(value, requires_grad=True)
        for name, value in zip(TARGETS, (semseg, edge, relief), strict=True)
    }


def test_fixed_weights_are_the_published_ones_of_the_names_unless_given():
    weights = TaskWeights(TARGETS, {"edge": 20})
    assert TaskWeights(TARGETS).factors() == {"semseg": 1, "edge": 50, "relief": 1}
    assert weights.factors() == {"semseg": 1, "edge": 20, "relief": 1}
    given = losses(1.0, 2.0, 3.0)
    total = weights(given)
    total.backward()
    assert total.item() == 44
    assert [loss.grad.item() for loss in given.values()] == [1, 20, 1]
    assert weights({"edge": given["edge"]}).item() == 40


def test_uncertainty_is_minimal_where_the_variance_explains_the_loss():
    weights = UncertaintyWeights(TARGETS)
    assert weights(losses(1.0, 2.0, 3.0)).item() == pytest.approx(1 + 2 + 3 / 2)
    assert [parameter.shape for parameter in weights.parameters()] == [(3,)]
    # d/ds of exp(-s) L + s/2 is zero at exp(-s) = 1 / (2 L); of exp(-s) L / 2 + s/2 at exp(-s) = 1 / L.
    with torch.no_grad():
        weights.log_variances.copy_(torch.tensor([2 * 1.0, 2 * 2.0, 3.0]).log())
    weights(losses(1.0, 2.0, 3.0)).backward()
    assert weights.log_variances.grad.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert weights.factors() == pytest.approx({"semseg": 1 / 2, "edge": 1 / 4, "relief": 1 / 6})


def test_a_task_without_a_labelled_pixel_leaves_its_variance_alone():
    weights = UncertaintyWeights(TARGETS, {"edge": 3})
    with torch.no_grad():
        weights.log_variances.fill_(0.5)
    given = losses(0.0, 2.0, 1.0)
    total = weights(given)
    total.backward()
    assert total.item() == pytest.approx(3 * math.exp(-0.5) * 2 + 0.25 + math.exp(-0.5) / 2 + 0.25)
    assert weights.log_variances.grad[0] == 0
    assert given["semseg"].grad == 0
    assert weights.log_variances.grad[1] != 0


def test_dynamic_average_equals_the_formula_and_goes_on_from_a_checkpoint():
    weights = AveragedWeights(TARGETS)
    epochs = [[(4.0, 1.0, 2.0), (2.0, 1.0, 0.0)], [(1.5, 0.5, 1.0)], [(1.5, 0.4, 0.0), (1.5, 0.2, 0.0)]]
    for number, steps in enumerate(epochs):
        if number < 2:
            assert list(weights.factors().values()) == pytest.approx([1, 1, 1])
        for step in steps:
            weights.observe(losses(*step))
        if number == 2:  # stopped in the middle of an epoch
            state, weights = weights.state_dict(), AveragedWeights(TARGETS)
            weights.load_state_dict(state)
        weights.end_epoch()
        if number == 1:
            expected = [3 * v for v in torch.tensor([1.5 / 3 / 2, 0.5 / 2, 1 / 2 / 2]).softmax(0).tolist()]
            assert list(weights.factors().values()) == pytest.approx(expected)
    # In the last epoch relief had no labels, so its ratio stayed.
    expected = [3 * v for v in torch.tensor([1.5 / 1.5 / 2, 0.3 / 0.5 / 2, 1 / 2 / 2]).softmax(0).tolist()]
    assert list(weights.factors().values()) == pytest.approx(expected)
    total = weights(losses(1.0, 2.0, 3.0)).item()
    assert total == pytest.approx(expected[0] + 2 * expected[1] + 3 * expected[2])
    assert not list(weights.parameters())


def test_a_loss_that_explodes_leaves_the_average_finite():
    weights = AveragedWeights(TARGETS)
    for step in ((1.0, 1.0, 1e-9), (1.0, 1.0, 1e9)):
        weights.observe(losses(*step))
        weights.end_epoch()
    assert list(weights.factors().values()) == pytest.approx([0, 0, 3])
    weights.observe(losses(1.0, 1.0, float("nan")))
    weights.end_epoch()
    assert all(math.isfinite(factor) for factor in weights.factors().values())


@pytest.mark.parametrize("rule", ["fixed", "uncertainty", "average"])
def test_what_cannot_be_weighed_is_refused(rule):
    assert type(task_weights(TARGETS, rule)) in (TaskWeights, UncertaintyWeights, AveragedWeights)
    with pytest.raises(UnknownNameError, match=r"'semsge'.*Did you mean 'semseg'.*A weight"):
        task_weights(TARGETS, rule, {"semsge": 1.0})
    for bad in ({"edge": -1.0}, {"edge": math.nan}, {"edge": math.inf}, dict.fromkeys(TARGETS, 0.0)):
        with pytest.raises(ConfigError, match="finite weights from 0 on"):
            task_weights(TARGETS, rule, bad)
    with pytest.raises(ConfigError, match=r"tasks \[\]"):
        task_weights({}, rule)
    weights = task_weights(TARGETS, rule)
    with pytest.raises(UnknownNameError, match=r"'sal'.*A loss was given"):
        weights({"sal": torch.ones(())})
    with pytest.raises(ConfigError, match="no loss was given"):
        weights({})


def test_an_unknown_rule_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'uncertainty'"):
        task_weights(TARGETS, "uncertain")


def test_a_task_without_weight_has_no_variance_to_learn():
    weights = task_weights(TARGETS, "uncertainty", {"semseg": 0.0})
    weights({name: torch.tensor(2.0) for name in TARGETS}).backward()
    moves = dict(zip(TARGETS, weights.log_variances.grad.ne(0).tolist(), strict=True))
    assert moves.pop("semseg") is False
    assert all(moves.values())
