import math

import numpy as np
import pytest
import torch

from tests.dense import KINDS, batch, target
from vispeft.data.dense_targets import IGNORE, DenseTarget
from vispeft.errors import ConfigError, DataError
from vispeft.metrics import SegmentationScores, delta_m, dense_metric


def measured(kind, outputs, labels, sizes=(2, 1)):
    """Measure in batches of these sizes."""
    metric = dense_metric(target(kind), "mine")
    for some, wanted in zip(outputs.split(sizes), labels.split(sizes), strict=True):
        metric.update(some, wanted)
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_labels_change_nothing_and_batches_may_be_of_one(kind):
    outputs, labels = batch(kind)
    found = measured(kind, outputs, labels)
    assert found == pytest.approx(measured(kind, outputs, labels, (1, 1, 1)))
    more = torch.cat([outputs, outputs[:1]]), torch.cat([labels, torch.full_like(labels[:1], IGNORE)])
    assert found == pytest.approx(measured(kind, *more, (3, 1)))
    assert found == pytest.approx(measured(kind, *more, (4,)))
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_nothing_labelled_is_not_a_number(kind):
    outputs, labels = batch(kind)
    found = measured(kind, outputs, torch.full_like(labels, IGNORE))
    assert all(math.isnan(value) for value in found.values())
    assert all(value.isnan() for value in dense_metric(target(kind), "mine").compute().values())


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_without_a_label_count_nowhere(kind):
    outputs, labels = batch(kind, ignored=0.5)
    missing = labels == IGNORE
    missing = missing.unsqueeze(1) if kind == "classes" else missing[:, :1]
    other = torch.where(missing, 9.0, outputs)
    assert measured(kind, outputs, labels) == pytest.approx(measured(kind, other, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_of_the_labels_is_perfect(kind):
    _, labels = batch(kind, ignored=0)
    outputs = labels.double()
    if kind == "classes":
        outputs = torch.nn.functional.one_hot(labels, 4).movedim(3, 1).double()
    elif kind in ("saliency", "edge"):
        outputs = 20 * labels - 10
    metric = dense_metric(target(kind), "mine")
    metric.update(outputs, labels)
    main, better = metric.compute()[metric.main].item(), metric.higher_is_better
    # Thinned lines of random pixels still lie within a pixel of all others.
    assert main == pytest.approx(1 if better else 0, abs=1e-3)
    assert better is (kind in ("classes", "saliency", "edge"))


def test_classes_follow_the_rule_for_absent_ones():
    outputs, labels = batch("classes")
    labels[labels == 3] = 0
    outputs[:, 3] = -100
    for absent in ("zero", "skip"):
        metric, same = dense_metric(target("classes"), "mine", absent), SegmentationScores(4, absent=absent)
        for one in (metric, same):
            one.update(outputs, labels)
        assert metric.compute() == same.compute()
        assert metric.per_class()["iou"].isnan().tolist() == [False] * 3 + [True]
    with pytest.raises(ConfigError, match="absent='drop'"):
        dense_metric(target("classes"), "mine", "drop")


def test_saliency_equals_the_formula_image_by_image():
    outputs, labels = batch("saliency", images=5)
    labels[1] = labels[1].clamp_max(0)  # nothing salient
    outputs[1] = -10  # and nothing predicted: a perfect image
    outputs[2] = -10
    table = []
    for logits, label in zip(outputs.float().sigmoid(), labels, strict=True):
        p, y = logits[label != IGNORE], label[label != IGNORE] > 0.5
        row = []
        for threshold in np.linspace(0.2, 0.9, 15):
            found = p > threshold
            right, union = (found & y).sum().item(), (found | y).sum().item()
            row.append((right / union if union else 1, right / max(1, found.sum()), right / max(1, y.sum())))
        table.append(row)
    iou, precision, recall = np.array(table).mean(0).T
    figures = measured("saliency", outputs, labels, (2, 1, 2))
    assert figures["miou"] == pytest.approx(iou.max(), abs=1e-6)
    assert figures["maxf"] == pytest.approx((2 * precision * recall / (precision + recall)).max(), abs=1e-6)
    assert table[1][0] == (1, 0, 0)


def test_normals_have_a_mean_and_a_root_mean_square_of_exact_angles():
    outputs, labels = batch("normals")
    known = (labels != IGNORE).all(1)
    a, b = (torch.nn.functional.normalize(v.double().movedim(1, -1)[known], dim=1) for v in (outputs, labels))
    angles = torch.rad2deg(torch.arccos((a * b).sum(1)))
    figures = measured("normals", outputs, labels)
    assert figures["mean"] == pytest.approx(angles.mean().item(), abs=1e-4)
    assert figures["rmse"] == pytest.approx(angles.square().mean().sqrt().item(), abs=1e-4)
    for limit in (11.25, 22.5, 30):
        assert figures[f"within_{limit:g}"] == pytest.approx((angles < limit).float().mean().item(), abs=1e-6)
    # A hundredth of a degree, where the arc cosine of a float32 would give 0.0198 or 0.
    turn = math.radians(0.01)
    up = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    tilted = torch.tensor([math.sin(turn), 0.0, math.cos(turn)]).reshape(1, 3, 1, 1)
    assert measured("normals", tilted, up, (1,))["mean"] == pytest.approx(0.01, rel=1e-4)
    assert measured("normals", 0 * up, up, (1,))["mean"] == pytest.approx(90)


def test_depth_and_values_equal_the_formulas():
    outputs, labels = batch("depth")
    outputs[0, 0, 0] = -1  # counts as a depth of 1e-9
    known = labels != IGNORE
    p, t = outputs[known].float().double().clamp_min(1e-9), labels[known].double()
    ratio = torch.maximum(p / t, t / p)
    expected = {
        "rmse": (p - t).square().mean().sqrt(),
        "log_rmse": (p.log() - t.log()).square().mean().sqrt(),
        **{f"delta{k}": (ratio < 1.25**k).double().mean() for k in (1, 2, 3)},
    }
    found = measured("depth", outputs, labels)
    assert found == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)
    assert 0 < found["delta1"] < found["delta3"] < 1
    outputs, labels = batch("values")
    errors = (outputs - labels)[labels != IGNORE]
    expected = {"rmse": errors.square().mean().sqrt().item(), "mae": errors.abs().mean().item()}
    assert measured("values", outputs, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_have_the_form_of_the_task_is_refused_and_counts_stay(kind):
    outputs, labels = batch(kind)
    metric = dense_metric(target(kind), "mine")
    wrong = labels.clone()
    wrong[0].view(-1)[0] = -7 if kind != "values" else math.nan
    other = labels.float() if kind == "classes" else labels.long()
    for bad in ((outputs[..., :-1], labels), (outputs, other), (outputs, wrong), (outputs[0], labels)):
        with pytest.raises(DataError, match="task 'mine'"):
            metric.update(*bad)
    assert not any(torch.as_tensor(state).any() for state in metric.metric_state.values())


def test_more_classes_than_labels_can_tell_apart_are_refused():
    with pytest.raises(ConfigError, match="256 classes"):
        dense_metric(DenseTarget(kind="classes", class_names=tuple(map(str, range(256)))), "mine")


def test_delta_m_counts_gains_in_percent_whichever_way_a_score_points():
    higher = {"semseg": True, "normals": False}
    assert delta_m({"semseg": 0.55, "normals": 20.0}, {"semseg": 0.5, "normals": 25.0}, higher) == pytest.approx(15)
    assert delta_m({"semseg": 0.45, "normals": 25.0}, {"semseg": 0.5, "normals": 25.0}, higher) == pytest.approx(-5)
    assert math.isnan(delta_m({"semseg": math.nan}, {"semseg": 0.5}, {"semseg": True}))
    tensors = {"semseg": torch.tensor(0.5)}
    assert delta_m(tensors, tensors, {"semseg": True}) == 0


def test_delta_m_without_a_baseline_is_refused():
    for scores, baselines, higher in (
        ({}, {}, {}),
        ({"a": 1.0}, {"b": 1.0}, {"a": True}),
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, {"a": True}),
        ({"a": 1.0}, {"a": 1.0}, {}),
    ):
        with pytest.raises(ConfigError, match="the same tasks"):
            delta_m(scores, baselines, higher)
    for baseline in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="of the task 'a'"):
            delta_m({"a": 1.0}, {"a": baseline}, {"a": True})
