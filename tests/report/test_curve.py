"""Thinned curves against means taken one by one."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.report.curve import MAX_POINTS, thinned

VALUES = st.lists(st.none() | st.floats(-1e6, 1e6), max_size=60)


@given(VALUES, st.integers(1, 70))
def test_each_stretch_has_its_mean_least_and_largest(values, max_points):
    steps = list(range(1, len(values) + 1))
    found = thinned({"step": steps}, {"x": values}, max_points)
    json.dumps(found, allow_nan=False)
    curve, places = found["curves"]["x"], found["places"]["step"]
    number = min(len(values), max_points)
    assert len(places) == len(curve["mean"]) == number
    edges = [index * len(values) // max(1, number) for index in range(number + 1)]
    for index in range(number):
        stretch = [value for value in values[edges[index] : edges[index + 1]] if value is not None]
        assert places[index] == steps[edges[index + 1] - 1]
        if not stretch:
            assert curve["mean"][index] is None
            continue
        scale = max(map(abs, stretch))
        assert curve["mean"][index] == pytest.approx(sum(stretch) / len(stretch), rel=1e-4, abs=1e-4 * scale)
        if "low" in curve:
            assert curve["low"][index] == pytest.approx(min(stretch), rel=1e-4)
            assert curve["high"][index] == pytest.approx(max(stretch), rel=1e-4)
    assert ("low" in curve) == (len(values) > max_points)


def test_a_spike_among_many_steps_is_still_seen():
    loss = np.full(100_000, 2.0)
    loss[51_234] = 9.0
    found = thinned({"step": list(range(100_000))}, {"loss": loss.tolist()})
    assert len(found["curves"]["loss"]["mean"]) == MAX_POINTS
    assert max(found["curves"]["loss"]["high"]) == 9.0 and max(found["curves"]["loss"]["mean"]) < 2.1
    assert len(json.dumps(found)) < 20_000


def test_what_is_not_finite_is_left_out():
    found = thinned({"step": [1, 2, 3]}, {"loss": [1.0, math.inf, math.nan]})
    assert found["curves"]["loss"]["mean"] == [1, None, None]
    assert thinned({"step": []}, {"loss": []}) == {"places": {"step": []}, "curves": {"loss": {"mean": []}}}
