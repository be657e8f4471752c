import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.tasks.losses import (
    SegmentationLoss,
    cross_entropy,
    dice_loss,
    hard_pixels,
    lovasz_softmax,
    ohem_cross_entropy,
)

LOSSES = [cross_entropy, dice_loss, lovasz_softmax, ohem_cross_entropy]


def batch(classes=4, size=(2, 5, 6), ignored=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size[0], classes, *size[1:], generator=generator, dtype=torch.double)
    masks = torch.randint(classes, size, generator=generator)
    return scores, masks.masked_fill(torch.rand(size, generator=generator) < ignored, IGNORE)


def two_class_scores(probabilities):
    """Scores (1, 2, 1, n) whose softmax gives class 1 these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.double)
    return torch.stack([(1 - p).log(), p.log()]).reshape(1, 2, 1, -1)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_value(loss):
    scores, masks = batch(3, (2, 2, 3))
    assert torch.autograd.gradcheck(lambda values: loss(values, masks), (scores.requires_grad_(),))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_labels_gives_zero_with_a_gradient_of_zero(loss):
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = loss(scores, torch.full((2, 4, 4), IGNORE))
    value.backward()
    assert value.item() == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("loss", LOSSES)
def test_pixels_without_a_label_count_nowhere(loss):
    scores, masks = batch(ignored=0.3)
    other = torch.where((masks == IGNORE).unsqueeze(1), 100 * torch.randn_like(scores), scores)
    scores.requires_grad_()
    value = loss(scores, masks)
    value.backward()
    torch.testing.assert_close(value, loss(other, masks))
    assert not scores.grad.abs().sum(1)[masks == IGNORE].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_perfect_prediction_costs_nothing_and_half_precision_is_left_before_sums(loss):
    _, masks = batch(ignored=0)
    scores = 40.0 * F.one_hot(masks, 4).permute(0, 3, 1, 2)
    assert loss(scores, masks).item() == pytest.approx(0, abs=1e-6)
    low = torch.randn(2, 4, 64, 64).bfloat16()
    masks = torch.randint(4, (2, 64, 64))
    torch.testing.assert_close(loss(low, masks), loss(low.float(), masks))


def test_cross_entropy_is_pytorchs_mean_with_and_without_class_weights():
    scores, masks = batch()
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0])
    torch.testing.assert_close(cross_entropy(scores, masks), F.cross_entropy(scores, masks, ignore_index=IGNORE))
    expected = F.cross_entropy(scores, masks, weights.double(), ignore_index=IGNORE)
    torch.testing.assert_close(cross_entropy(scores, masks, weights), expected)
    assert cross_entropy(scores, torch.full_like(masks, 2), weights).item() == 0  # where PyTorch divides 0 by 0


def test_dice_of_its_formula_and_classes_that_are_absent_left_out():
    scores, masks = batch(classes=5)
    masks[masks == 3] = 1
    valid, p = masks != IGNORE, scores.softmax(1)
    coefficients = []
    for c in (0, 1, 2, 4):
        y = (masks == c).double()
        coefficients.append(2 * (p[:, c] * y).sum() / ((p[:, c] * valid).sum() + y.sum()))
    torch.testing.assert_close(dice_loss(scores, masks), 1 - torch.stack(coefficients).mean())


def test_lovasz_in_closed_form_for_two_pixels():
    # One pixel of class 1 with probability 0.3 and one of class 0 with probability 0.2 for class 1. For both classes
    # the errors are 0.7 and 0.2. Class 1: the worse pixel alone is a miss, Jaccard loss 1, and with the other it stays
    # 1. Class 0: the worse pixel alone is a false alarm beside one hit, Jaccard loss 1/2, and both give 1.
    value = lovasz_softmax(two_class_scores([0.3, 0.2]), torch.tensor([[[1, 0]]]))
    assert value.item() == pytest.approx((0.7 * 1 + 0.2 * 0 + 0.7 / 2 + 0.2 / 2) / 2)


def test_lovasz_is_the_extension_of_the_jaccard_loss():
    scores, masks = batch(3, (1, 2, 3), ignored=0, seed=3)
    labels, p = masks.flatten(), scores.softmax(1).reshape(3, -1)
    values = []
    for c in labels.unique().tolist():
        truth = {i for i, label in enumerate(labels.tolist()) if label == c}
        errors = [abs((i in truth) - p[c, i].item()) for i in range(len(labels))]
        # The largest value over all orders: the extension of a submodular function (Lovasz 1983).
        best = 0.0
        for order in itertools.permutations(range(len(labels))):
            losses = [len(set(order[:k])) / len(truth | set(order[:k])) for k in range(len(order) + 1)]
            steps = [b - a for a, b in itertools.pairwise(losses)]
            best = max(best, sum(errors[i] * step for i, step in zip(order, steps, strict=True)))
        values.append(best)
    assert lovasz_softmax(scores, masks).item() == pytest.approx(sum(values) / len(values))


def test_ohem_keeps_unsure_pixels_and_at_least_some():
    own = [0.1, 0.4, 0.75, 0.8, 0.95]
    scores, masks = two_class_scores(own), torch.ones(1, 1, 5, dtype=torch.long)
    for min_kept, kept in ((1, 2), (2, 2), (3, 3), (4, 4), (100, 4)):  # the surest pixel is never below itself
        assert hard_pixels(scores, masks, 0.7, min_kept).flatten().tolist() == [i < kept for i in range(5)]
        expected = sum(-math.log(p) for p in own[:kept]) / kept
        assert ohem_cross_entropy(scores, masks, min_kept=min_kept).item() == pytest.approx(expected)
    sure = two_class_scores([0.9, 0.9])
    assert ohem_cross_entropy(sure, torch.ones(1, 1, 2, dtype=torch.long)).item() == 0


def test_ohem_keeps_the_pixels_mmsegmentation_keeps():
    pytest.importorskip("mmseg")
    from mmseg.structures import OHEMPixelSampler

    for seed, min_kept in itertools.product(range(3), (2, 40, 10_000)):
        scores, masks = batch(size=(3, 8, 9), seed=seed)
        theirs = OHEMPixelSampler(SimpleNamespace(ignore_index=IGNORE), thresh=0.7, min_kept=min_kept)
        expected = theirs.sample(scores, masks.unsqueeze(1)).bool()
        assert torch.equal(hard_pixels(scores, masks, 0.7, min_kept), expected)


def test_losses_are_summed_by_weight():
    scores, masks = (t.float() if t.is_floating_point() else t for t in batch())
    weights = [1.0, 2.0, 3.0, 0.5]
    loss = SegmentationLoss(
        {"cross_entropy": 1.0, "dice": 0.5, "lovasz": 2, "ohem": 0.1}, class_weights=weights, ohem_min_kept=3
    )
    w = torch.tensor(weights)
    expected = (
        cross_entropy(scores, masks, w)
        + 0.5 * dice_loss(scores, masks)
        + 2 * lovasz_softmax(scores, masks)
        + 0.1 * ohem_cross_entropy(scores, masks, w, min_kept=3)
    )
    torch.testing.assert_close(loss(scores, masks), expected)
    assert list(loss.terms(scores, masks)) == ["cross_entropy", "dice", "lovasz", "ohem"]
    assert not loss.state_dict()
    assert list(SegmentationLoss({"dice": 1, "lovasz": 0}).terms(scores, masks)) == ["dice"]


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": {}},
        {"weights": {"dice": 0.0}},
        {"weights": {"dice": -1.0}},
        {"weights": {"dice": math.nan}},
        {"weights": {"dice": 1.0}, "class_weights": [1.0, -1.0]},
        {"weights": {"ohem": 1.0}, "ohem_thresh": 1.5},
        {"weights": {"ohem": 1.0}, "ohem_min_kept": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError):
        SegmentationLoss(**settings)


def test_unknown_losses_and_wrong_numbers_of_class_weights_are_refused():
    with pytest.raises(UnknownNameError, match="'lovasz'"):
        SegmentationLoss({"lovas": 1.0})
    scores, masks = batch()
    with pytest.raises(ConfigError, match="2 class_weights and scores of 4"):
        SegmentationLoss({"cross_entropy": 1.0}, class_weights=[1.0, 2.0])(scores, masks)
