"""How long work takes that ranks do together: which of the turns and of the ranks count, in which order it is done."""

import pytest

from mfdist.testing.run_ranks import RankPool
from tests.benchmarks import clock_ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool() as made:
        yield made


def test_the_quickest_turn_but_the_first_counts_and_of_the_ranks_the_median(pool):
    seconds_of_ranks = [
        {"compiled": (0.5, 9.0, 1.0, 4.0), "even": (2.0,)},  # a first time never counts, not even where it was quick
        {"compiled": (99.0, 2.0, 3.0, 8.0), "even": (2.0,)},
        {"compiled": (99.0, 70.0, 80.0, 60.0), "even": (5.0,)},
    ]
    for found, done in pool.run(clock_ranks.in_turns, 3, seconds_of_ranks, timeout_s=120):
        assert found == [2.0, 2.0]
        assert done == ["compiled", "even"] * 4


def test_what_work_stands_behind_is_no_part_of_its_time(pool):
    for found, num_works, num_busy in pool.run(clock_ranks.behind_other_work, 3, 0.5, (0.25, 0.75, 3.0), timeout_s=120):
        assert found == 0.75
        assert (num_works, num_busy) == (3 * (1 + 25), 3 * 2 * 64)
