"""Cuts: even and proportional ones, and what is wrong with others."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.errors import ConfigError
from mfdist.sharding.cuts import check_cuts, even_cuts, levelling_cuts


@given(st.integers(0, 200), st.integers(1, 30), st.integers(1, 7))
def test_even_cuts_are_as_even_as_pieces_allow(num_pieces, num_parts, step):
    cuts = even_cuts(num_pieces * step, num_parts, step)
    check_cuts(cuts, num_pieces * step, "rows", "t", step)
    sizes = [right - left for left, right in pairwise(cuts)]
    assert len(sizes) == num_parts
    assert max(sizes) - min(sizes) <= step


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 7)), min_size=1, max_size=12), st.integers(1, 9))
def test_levelling_keeps_loads_within_the_largest_piece(tables, num_parts):
    loads = [0.0] * num_parts
    for num_pieces, step in tables:
        cuts = levelling_cuts(num_pieces * step, loads, step)
        check_cuts(cuts, num_pieces * step, "rows", "t", step)
        loads = [load + right - left for load, (left, right) in zip(loads, pairwise(cuts), strict=True)]
    assert max(loads) - min(loads) <= max(step for _, step in tables)
    assert sum(loads) == sum(num_pieces * step for num_pieces, step in tables)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((), "at least one part"),
        ((0,), "at least one part"),
        ((2, 12), r"rows \[0, 2\) have no owner"),
        ((0, 8, 4, 12), r"rows \[4, 8\) have two owners"),
        ((0, 8), r"rows \[8, 12\) have no owner"),
        ((0, 16), r"rows \[12, 16\) do not exist"),
        ((0, 5, 12), "got 5 in t; nearest that fit: 4 and 8"),
    ],
)
def test_wrong_cuts_are_told_by_their_rows(cuts, message):
    with pytest.raises(ConfigError, match=message):
        check_cuts(cuts, 12, "rows", "t", 4)
