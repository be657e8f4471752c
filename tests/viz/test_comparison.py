"""Axes of plots that compare runs: sizes are read from at least two powers of ten."""

import math

import pytest

from vispeft.viz.comparison import Point, trade_off


@pytest.mark.parametrize("sizes", [[2570, 49_674], [18_846, 218_177], [500], [1000, 1000], [900, 1100], [10, 10**7]])
def test_the_axis_of_sizes_has_two_labels(sizes):
    drawn = trade_off([Point(name=str(i), size=size, value=0.5) for i, size in enumerate(sizes)], "bytes", "accuracy")
    low, high = drawn.axes[0].get_xlim()
    assert low < min(sizes)
    assert max(sizes) < high
    assert math.floor(math.log10(high)) - math.ceil(math.log10(low)) >= 1
