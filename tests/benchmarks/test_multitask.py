"""The multi-task comparison: the score that chooses learning rates."""

import math

import multitask
import pytest


def test_a_figure_of_zero_lowers_the_score_and_is_no_error():
    """Dividing by it, or taking its logarithm, ended the comparison."""

    def scored(odsf, rmse=2.0):
        result = {"main": {"coast": "odsf", "relief": "rmse"}, "test": {"coast/odsf": odsf, "relief/rmse": rmse}}
        return multitask.score(result, "test")

    assert scored(0.5) == pytest.approx(math.sqrt(0.5 / 2.0))
    assert 0 < scored(0.0) < scored(0.1) < scored(0.1, rmse=1.0)
