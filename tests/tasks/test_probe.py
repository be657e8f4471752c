"""Linear models of features, against scikit-learn's own pipeline and closed forms."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vispeft.errors import DataError
from vispeft.tasks import probe
from vispeft.tasks.probe import fit_path


@pytest.fixture(autouse=True)
def few_strengths(monkeypatch):
    monkeypatch.setattr(probe, "STRENGTHS", (10.0, 1.0))


def drawn(classes=3, count=60, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=generator)
    features = 3 + 0.2 * (centres[labels] + torch.randn(count, width, generator=generator))
    return features * torch.tensor([1.0, 100.0, 1e-2, 1.0, 5.0])[:width], labels


@pytest.mark.parametrize("classes", [2, 3])
def test_classes_equal_a_pipeline_of_scikit_learn(classes):
    features, labels = drawn(classes)
    for strength, model in fit_path("class", features, labels, classes):
        known = make_pipeline(StandardScaler(), LogisticRegression(C=1 / strength, tol=1e-8, max_iter=5000))
        wanted = known.fit(features.double().numpy(), labels.numpy()).predict_log_proba(features.double().numpy())
        torch.testing.assert_close(
            model(features).log_softmax(1), torch.from_numpy(wanted).float(), atol=2e-3, rtol=1e-3
        )


def test_a_class_without_images_is_never_the_answer():
    features, labels = drawn(2)
    for _, model in fit_path("class", features, labels * 2, 4):
        scores = model(features)
        assert set(scores.argmax(1).tolist()) <= {0, 2}
        assert not model.weight[[1, 3]].any()
        torch.testing.assert_close(model.bias[[1, 3]], scores[:, [0, 2]].min().expand(2))


def test_weights_count_classes_as_copies_of_their_images():
    features, labels = drawn(2, count=20)
    twice = torch.cat([features, features[labels == 1]])
    for (_, one), (_, other) in zip(
        fit_path("class", features - features.mean(0), labels, 2, weights=torch.tensor([1.0, 2.0]), bias=False),
        # Without a constant the deviation alone is shared, so copies must not change it.
        _unscaled(twice - features.mean(0), torch.cat([labels, labels[labels == 1]]), features),
        strict=True,
    ):
        torch.testing.assert_close(one(features).softmax(1), other(features).softmax(1), atol=2e-3, rtol=0)


def _unscaled(features, labels, like):
    deviation = like.double().numpy().std(0)
    path = probe.FITS["class"](features.double().numpy() / deviation, labels.numpy(), 2, None, False)
    for strength, (coefficients, constants) in zip(probe.STRENGTHS, path, strict=True):
        yield strength, probe.Affine(torch.from_numpy(coefficients / deviation).float(), torch.from_numpy(constants))


def test_labels_are_fitted_one_by_one_and_constant_ones_have_their_frequency():
    features, labels = drawn(2)
    targets = torch.stack([labels, torch.zeros(60), torch.ones(60)], 1).float()
    for strength, model in fit_path("multilabel", features, targets, 3):
        known = make_pipeline(StandardScaler(), LogisticRegression(C=1 / strength, tol=1e-8, max_iter=5000))
        wanted = known.fit(features.double().numpy(), labels.numpy()).decision_function(features.double().numpy())
        torch.testing.assert_close(model(features)[:, 0], torch.from_numpy(wanted).float(), atol=2e-3, rtol=1e-3)
        assert not model.weight[1:].any()
        assert model.bias[1:].tolist() == pytest.approx([math.log(0.5 / 60.5), math.log(60.5 / 0.5)])


@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_equal_the_normal_equations(outputs):
    features, _ = drawn()
    targets = torch.randn(60, outputs, generator=torch.Generator().manual_seed(1))
    x = features.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    y = targets.double().numpy()
    for strength, model in fit_path("regression", features, targets, outputs):
        solved = np.linalg.solve(x.T @ x + strength * np.eye(5), x.T @ (y - y.mean(0)))
        torch.testing.assert_close(model(features), torch.from_numpy(x @ solved + y.mean(0)).float())


def test_constant_features_and_no_bias_are_fine():
    features, labels = drawn()
    features[:, 0] = 7.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bias in (True, False):
            for _, model in fit_path("class", features, labels, 3, bias=bias):
                assert model.weight.isfinite().all()
                assert bias or not model.bias.any()


def test_one_class_alone_is_refused():
    with pytest.raises(DataError, match="All 4 training images have the class 2"):
        list(fit_path("class", torch.randn(4, 2), torch.full((4,), 2), 3))
