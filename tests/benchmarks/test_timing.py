"""How long calls take, and how far their times spread."""

import math
import time

import pytest
import torch

from mfdist.benchmarks.timing import Work, quartile_spread, timings


def test_the_spread_is_that_of_the_quartiles() -> None:
    assert quartile_spread([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx(2.0 / 3.0)
    assert quartile_spread([7.0, 7.0]) == 0.0
    assert math.isnan(quartile_spread([7.0]))


def test_calls_that_take_now_long_and_now_short_spread_widely() -> None:
    turns = iter(range(10**6))

    def sleep_in_turns(_: int) -> None:
        time.sleep(0.001 if next(turns) % 2 else 0.05)

    before = torch.get_num_threads()
    torch.set_num_threads(2)  # one thread's time is the processor's, which sleeping does not take
    try:
        (found,) = timings([Work(sleep_in_turns)], "cpu", 0.5)
    finally:
        torch.set_num_threads(before)
    assert found.spread > 0.5
