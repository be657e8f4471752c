import math

import pytest
import torch
from torch.nn import functional as F

from tests.dense import KINDS, batch, target
from vispeft.data.dense_targets import IGNORE, DenseTarget
from vispeft.errors import ConfigError, DataError
from vispeft.tasks.dense_losses import BalancedCrossEntropy, dense_loss


def loss_of(kind):
    return dense_loss(target(kind), "mine")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_value(kind):
    outputs, labels = batch(kind, images=2, size=(3, 2))
    assert torch.autograd.gradcheck(lambda values: loss_of(kind)(values, labels), (outputs.requires_grad_(),))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_labels_gives_zero_with_a_gradient_of_zero(kind):
    outputs, labels = batch(kind)
    outputs.requires_grad_()
    loss = loss_of(kind)(outputs, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(outputs.grad, torch.zeros_like(outputs))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_without_a_label_count_nowhere(kind):
    outputs, labels = batch(kind, ignored=0.4)
    missing = labels == IGNORE
    missing = missing.unsqueeze(1) if kind == "classes" else missing[:, :1]
    other = torch.where(missing, 100 * torch.randn_like(outputs), outputs)
    outputs.requires_grad_()
    loss = loss_of(kind)(outputs, labels)
    loss.backward()
    torch.testing.assert_close(loss, loss_of(kind)(other, labels))
    assert not outputs.grad.where(missing, 0).any()
    whole, marked = torch.cat([outputs, outputs]), torch.cat([labels, torch.full_like(labels, IGNORE)])
    torch.testing.assert_close(loss_of(kind)(whole, marked), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_parts_add_up_to_the_whole(kind):
    outputs, labels = batch(kind, images=4)
    labels[3] = IGNORE
    loss = loss_of(kind)
    outputs.requires_grad_()
    whole = loss(outputs, labels)
    (wanted,) = torch.autograd.grad(whole, outputs)
    pieces = [loss.parts(outputs[some], labels[some]) for some in (slice(0, 1), slice(1, 3), slice(3, 4))]
    denominator = sum(denominator for _, denominator in pieces)
    assert denominator.dtype == torch.int64
    torch.testing.assert_close(loss.combine(sum(numerator for numerator, _ in pieces), denominator), whole)
    # Linear in the numerator: each process adds its own share, value and gradient.
    shares = [loss.combine(numerator, denominator) for numerator, _ in pieces]
    torch.testing.assert_close(sum(shares), whole)
    (found,) = torch.autograd.grad(sum(shares), outputs)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_half_precision_are_computed_in_float32(kind):
    outputs, labels = batch(kind)
    low = outputs.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_of(kind)(low, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss_of(kind)(low.float(), labels))


def test_cross_entropy_and_absolute_errors_are_means_over_labelled_pixels():
    outputs, labels = batch("classes")
    torch.testing.assert_close(loss_of("classes")(outputs, labels), F.cross_entropy(outputs, labels, ignore_index=255))
    for kind in ("depth", "values"):
        outputs, labels = batch(kind)
        known = labels != IGNORE
        torch.testing.assert_close(loss_of(kind)(outputs, labels), (outputs - labels)[known].abs().mean())


def test_balanced_cross_entropy_weighs_by_the_share_of_negatives_in_the_whole_batch():
    for kind, fixed in (("saliency", None), ("edge", 0.95)):
        outputs, labels = batch(kind)
        labels[0] = labels[0].clamp_max(0) + (labels[0] == IGNORE) * IGNORE  # an image without a positive pixel
        known = labels != IGNORE
        y, p = labels[known].double(), outputs[known].sigmoid()
        weight = 1 - y.mean() if fixed is None else fixed
        expected = -(weight * y * p.log() + (1 - weight) * (1 - y) * (1 - p).log()).mean()
        torch.testing.assert_close(loss_of(kind)(outputs, labels), expected)


def test_large_logits_stay_finite():
    outputs = torch.tensor([[[[-1e4, 1e4, -1e4, 1e4]]]], requires_grad=True)
    labels = torch.tensor([[[[0.0, 1.0, 1.0, 0.0]]]])
    loss = loss_of("saliency")(outputs, labels)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 0.5 * 1e4 / 4)
    assert outputs.grad.flatten().tolist() == pytest.approx([0, 0, -0.125, 0.125])


def test_void_pixels_weigh_nothing_and_the_weight_never_exceeds_one():
    outputs, labels = batch("saliency", ignored=0)
    void = torch.rand_like(labels) < 0.05
    loss = BalancedCrossEntropy(target("saliency"), "mine")
    outputs.requires_grad_()
    value = loss(outputs, labels, void)
    value.backward()
    assert not outputs.grad[void].any()
    assert outputs.grad[~void].abs().min() > 0
    weight = ((labels == 0).sum() / (~void).sum()).clamp_max(1)
    each = F.binary_cross_entropy_with_logits(outputs, labels.double(), reduction="none")
    expected = (each * torch.where(labels > 0, weight, 1 - weight))[~void].sum() / labels.numel()
    torch.testing.assert_close(value, expected)
    only_void = labels == 0  # the public formula gives negatives a weight below zero here
    assert loss(outputs, labels, only_void).item() >= 0
    with pytest.raises(DataError, match="void mask of the task 'mine'"):
        loss(outputs, labels, void.float())


def test_normals_do_not_depend_on_length_and_a_vector_without_direction_gets_a_finite_gradient():
    outputs, labels = batch("normals")
    loss = loss_of("normals")
    torch.testing.assert_close(loss(outputs, labels), loss(7 * outputs, labels))
    labels = labels.masked_fill(labels == IGNORE, 0)
    zero = torch.zeros_like(outputs, dtype=torch.float32).requires_grad_()
    loss(zero, labels).backward()
    assert torch.allclose(zero.grad.abs().where(labels != 0, 0), (labels != 0) / labels.numel())
    assert torch.equal(zero.grad.sign(), -labels.sign())


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_have_the_form_of_the_task_is_refused_by_its_name(kind):
    outputs, labels = batch(kind)
    loss = loss_of(kind)
    other = labels.float() if kind == "classes" else labels.long()
    for bad in (
        (outputs[:, :0], labels),
        (torch.cat([outputs, outputs], 1), labels),
        (outputs[..., :-1], labels),
        (outputs[:1], labels),
        (outputs[0], labels),
        (outputs.sum(), labels),
        (outputs.long(), labels),
        (outputs, labels.unsqueeze(1)),
        (outputs, other),
        (outputs, labels[:1]),
    ):
        with pytest.raises(DataError, match="task 'mine'"):
            loss(*bad)


WRONG = {"classes": [4, -1], "saliency": [2, 0.0 - 1, 254], "edge": [0.5 + 1, math.nan], "normals": [2, 128]}
WRONG |= {"depth": [0, -1, math.nan, math.inf], "values": [math.nan, math.inf]}


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in WRONG.items() for value in values])
def test_labels_out_of_range_are_refused_by_the_name_of_the_task(kind, value):
    outputs, labels = batch(kind)
    labels[0].view(-1)[3] = value
    with pytest.raises(DataError, match=rf"Labels of the task 'mine' \({kind}\) hold {value:g}"):
        loss_of(kind)(outputs, labels)


def test_a_fixed_weight_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"positive_weight=1\.5"):
        BalancedCrossEntropy(DenseTarget(kind="edge"), "mine", 1.5)
