"""Workloads: how many different rows are asked for, and what cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.errors import ConfigError
from mfdist.sharding.workload import TableLoad, Workload

LOAD = TableLoad(num_lookups=4, code_stride=8)


@pytest.mark.parametrize("load", [LOAD, TableLoad(num_lookups=4)], ids=["slots", "row ids"])
def test_unique_rows_are_those_of_ids_drawn_evenly(load):
    """Against counting: the mean of many draws lies within a few standard errors."""
    rng, num_tokens, num_draws = np.random.default_rng(0), 9, 4000
    counts = np.empty(num_draws)
    for draw in range(num_draws):
        ids = rng.integers(0, 8, (num_tokens, 4)) + 8 * np.arange(4) if load.code_stride else rng.integers(0, 32, 36)
        counts[draw] = np.unique(ids).size
    error = counts.std() / np.sqrt(num_draws)
    assert abs(load.num_unique(32, num_tokens) - counts.mean()) < 4 * error


@given(st.integers(1, 1000), st.integers(1, 8), st.integers(0, 10_000), st.none() | st.floats(0, 0.99))
def test_unique_rows_are_at_most_rows_and_lookups(num_slots, stride, num_tokens, share):
    load = TableLoad(num_lookups=num_slots, code_stride=stride, duplicate_share=share)
    unique = load.num_unique(num_slots * stride, num_tokens)
    assert 0 <= unique <= min(num_slots * stride, num_slots * num_tokens) * (1 + 1e-9)


def test_a_given_duplicate_share_is_taken_as_it_is():
    assert TableLoad(num_lookups=4, duplicate_share=0.25).num_unique(10**9, 100) == 300


def test_tokens_are_shared_by_ranks_and_micro_batches():
    workload = Workload(batch_tokens=1000, loads={}, micro_batches=3)
    assert workload.tokens_per_exchange(8) == 42


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TableLoad(num_lookups=0), "at least once"),
        (lambda: TableLoad(num_lookups=1, duplicate_share=1.0), r"\[0, 1\); got 1.0"),
        (lambda: Workload(batch_tokens=0, loads={}), "batch_tokens=0"),
        (lambda: Workload(batch_tokens=1, loads={}, micro_batches=0), "micro_batches=0"),
        (lambda: Workload(batch_tokens=1, loads={}, rule="lamb"), 'got "lamb"'),
        (lambda: Workload(batch_tokens=1, loads={}).load("t"), 'it lacks "t"'),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
