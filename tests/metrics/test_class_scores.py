import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, r2_score, recall_score

from vispeft.errors import ConfigError
from vispeft.metrics import ClassScores, ExplainedVariance, known_values


def labelled(seed=0, classes=5, images=60):
    """Scores and labels in which the last class but one is predicted and has no image, and the last has neither."""
    numbers = torch.Generator().manual_seed(seed)
    scores = torch.randn(images, classes, generator=numbers)
    scores[:, -1] = -9.0
    return scores, torch.randint(0, classes - 2, (images,), generator=numbers)


def measured(metric, scores, targets):
    for part, wanted in zip(scores.split(25), targets.split(25), strict=True):
        metric.update(part, wanted)
    return float(metric.compute())


def test_a_class_without_images_is_left_out_or_counts_as_zero():
    scores, labels = labelled()
    assert 3 in scores.argmax(1)
    right = recall_score(labels, scores.argmax(1), labels=[0, 1, 2], average=None)
    f1 = f1_score(labels, scores.argmax(1), labels=[0, 1, 2, 3], average=None, zero_division=0)
    assert f1[3] == 0
    for figure, values in (("accuracy", right), ("f1", f1)):
        assert measured(ClassScores(5, figure=figure), scores, labels) == pytest.approx(values.mean(), abs=1e-6)
        zero = ClassScores(5, figure=figure, absent="zero")
        assert measured(zero, scores, labels) == pytest.approx(values.sum() / 5, abs=1e-6)


def test_a_label_of_no_image_that_is_never_predicted_has_no_f1():
    numbers = torch.Generator().manual_seed(0)
    scores, targets = torch.rand(40, 3, generator=numbers), torch.randint(0, 2, (40, 3), generator=numbers)
    scores[:, 2], targets[:, 2] = 0.1, 0
    expected = f1_score(targets[:, :2], scores[:, :2] >= 0.5, average="macro")
    assert measured(ClassScores(3, figure="f1"), scores, targets) == pytest.approx(expected, abs=1e-6)
    assert measured(ClassScores(3, figure="f1", absent="zero"), scores, targets) == pytest.approx(expected * 2 / 3)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_nothing_measured_is_no_number_or_zero():
    assert math.isnan(ClassScores(3, figure="f1").compute())
    assert ClassScores(3, figure="f1", absent="zero").compute() == 0
    with pytest.raises(ConfigError, match="give 'skip' or 'zero'"):
        ClassScores(3, figure="f1", absent="none")


def test_a_constant_target_has_no_share_explained():
    numbers = np.random.default_rng(0)
    values, wanted = torch.from_numpy(numbers.normal(size=(30, 2))), torch.from_numpy(numbers.normal(size=(30, 2)))
    metric = ExplainedVariance(3)
    constant = torch.full((30, 1), 0.1)
    assert measured(metric, torch.cat([values, constant], 1), torch.cat([wanted, constant], 1)) == pytest.approx(
        r2_score(wanted, values)
    )
    assert known_values(metric.per_target())[2] is None
    one = ExplainedVariance(1)
    one.update(torch.ones(1), torch.zeros(1))
    assert math.isnan(one.compute())


def test_targets_far_from_zero_are_explained_as_well_as_those_around_it():
    rng = torch.Generator().manual_seed(0)
    near = torch.randn(400, 2, generator=rng, dtype=torch.double)
    found = near + 0.5 * torch.randn(400, 2, generator=rng, dtype=torch.double)
    expected = 1 - (found - near).square().sum(0) / (near - near.mean(0)).square().sum(0)
    for mean in (1e6, -1e9):
        whole, first, second = (ExplainedVariance(2) for _ in range(3))
        whole.update(found + mean, near + mean)
        for part in range(0, 400, 57):  # batches of 57 and one of 1, in two processes
            metric = first if part < 150 else second
            metric(found[part : part + 57] + mean, near[part : part + 57] + mean)
        for name, reduce in first._reductions.items():
            setattr(first, name, reduce(torch.stack([getattr(first, name), getattr(second, name)])))
        for metric in (whole, first):
            torch.testing.assert_close(metric.per_target(), expected.float(), rtol=1e-5, atol=1e-5)
