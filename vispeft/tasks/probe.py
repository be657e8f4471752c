"""Linear models of kept features: logistic regressions and ridge regressions along a path of strengths."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from vispeft.errors import DataError

__all__ = ["FITS", "STRENGTHS", "Affine", "fit_path"]

STRENGTHS = tuple(10 ** (half / 2) for half in range(10, -5, -1))
"""Weights of half the squared norm beside the sum of the losses of all images, from 1e5 to 1e-2: from nearly the same
answer for all images to nearly no regularisation."""
ITERATIONS = 1000
"""Most steps of L-BFGS for one model; a weak regularisation of separable classes has its optimum far away."""

Fit = Callable[[Any, Any, int, Any, bool], Iterator[tuple[Any, Any]]]


@dataclass(frozen=True)
class Affine:
    """A linear map from features to outputs."""

    weight: Tensor
    """float32 (outputs, width)."""
    bias: Tensor
    """float32 (outputs,)."""

    def __call__(self, features: Tensor) -> Tensor:
        """Compute outputs (N, outputs).

        Args:
            features: float32 (N, width).
        """
        return torch.nn.functional.linear(features, self.weight.to(features), self.bias.to(features))


def fit_path(
    kind: str, features: Tensor, targets: Tensor, outputs: int, *, weights: Tensor | None = None, bias: bool = True
) -> Iterator[tuple[float, Affine]]:
    """Fit a linear model for each of `STRENGTHS`, from strong to weak.

    Features are standardised by their mean and deviation over the given images, so that a strength means the same for
    all of them; weight and bias of the result take the features as they are. Nothing is drawn at random.

    Args:
        kind: ``class``, ``multilabel`` or ``regression``.
        features: (N, width).
        targets: Class indices (N,), zeros and ones (N, outputs), or numbers (N, outputs).
        outputs: Number of outputs.
        weights: How much each class counts, or each present label beside an absent one (outputs,); None for equal ones.
        bias: Whether the outputs have a constant term.

    Yields:
        Strength and model.

    Raises:
        DataError: If all images have one class.
    """
    values = features.double().numpy()
    # Without a constant term a shift of the features could not be undone.
    mean = values.mean(0) if bias else np.zeros(values.shape[1])
    deviation = values.std(0)
    deviation[deviation == 0] = 1.0
    given = None if weights is None else weights.double().cpu().numpy()
    path = FITS[kind]((values - mean) / deviation, targets.numpy(), outputs, given, bias)
    for strength, (coefficients, constants) in zip(STRENGTHS, path, strict=True):
        weight = coefficients / deviation
        yield strength, Affine(torch.from_numpy(weight).float(), torch.from_numpy(constants - weight @ mean).float())


def _classes(values: Any, labels: Any, outputs: int, weights: Any, bias: bool) -> Iterator[tuple[Any, Any]]:
    """Fit multinomial logistic regressions; a class without an image gets the lowest score that occurs."""
    known = np.unique(labels)
    if len(known) < 2:
        raise DataError(f"All {len(labels)} training images have the class {known[0]}; a probe needs two classes.")
    each = None if weights is None else weights[labels]
    for model in _logistic(values, labels, each, bias):
        coefficients, constants = np.zeros((outputs, values.shape[1])), np.zeros(outputs)
        if len(known) == 2:  # scikit-learn has one row for two classes: the score of the second over the first
            coefficients[known], constants[known] = (0.5 * np.stack([-x[0], x[0]]) for x in _parts(model))
        else:
            coefficients[known], constants[known] = _parts(model)
        if bias and len(known) < outputs:
            lowest = (values @ coefficients[known].T + constants[known]).min()
            constants[np.setdiff1d(np.arange(outputs), known)] = lowest
        yield coefficients, constants


def _labels(values: Any, targets: Any, outputs: int, weights: Any, bias: bool) -> Iterator[tuple[Any, Any]]:
    """Fit a logistic regression for each label; one on all or no images gets its frequency as a constant."""
    present = targets > 0.5
    paths = [
        _constant(column, values.shape[1], bias)
        if column.all() or not column.any()
        else map(_first, _logistic(values, column, None if weights is None else np.where(column, weights[i], 1), bias))
        for i, column in enumerate(present.T)
    ]
    for rows in zip(*paths, strict=True):
        yield np.stack([row for row, _ in rows]), np.array([constant for _, constant in rows])


def _numbers(values: Any, targets: Any, outputs: int, weights: Any, bias: bool) -> Iterator[tuple[Any, Any]]:
    """Fit ridge regressions of squared errors."""
    for strength in STRENGTHS:
        model = Ridge(alpha=strength, fit_intercept=bias, solver="svd").fit(values, targets.reshape(len(values), -1))
        yield np.atleast_2d(model.coef_), np.broadcast_to(model.intercept_, (outputs,)).astype(float)


FITS: dict[str, Fit] = {"class": _classes, "multilabel": _labels, "regression": _numbers}
"""By kind of target, the function that yields weights and constants for standardised features."""


def _logistic(values: Any, labels: Any, weights: Any, bias: bool) -> Iterator[LogisticRegression]:
    """Fit scikit-learn's logistic regressions, each from the one before; the same object every time."""
    model = LogisticRegression(warm_start=True, fit_intercept=bias, max_iter=ITERATIONS)
    for strength in STRENGTHS:
        model.set_params(C=1 / strength)
        with warnings.catch_warnings():
            # A model that is not at its optimum yet is a candidate like all others: validation decides.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(values, labels, sample_weight=weights)
        yield model


def _parts(model: LogisticRegression) -> tuple[Any, Any]:
    return model.coef_, model.intercept_


def _first(model: LogisticRegression) -> tuple[Any, float]:
    return model.coef_[0].copy(), float(np.ravel(model.intercept_)[0])


def _constant(column: Any, width: int, bias: bool) -> Iterator[tuple[Any, float]]:
    """Yield no weights, and the logarithm of the odds with half an image more on both sides."""
    odds = math.log((column.sum() + 0.5) / (len(column) - column.sum() + 0.5))
    return iter([(np.zeros(width), odds if bias else 0.0)] * len(STRENGTHS))
