"""Rates and counts, against a clock that the tests hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.table_server.limits import Bucket, Buckets, ClientLimits, Sieve
from mfdist.table_server.sections import LimitsConfig


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(0.1, 1000),
    st.floats(1, 100),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 1)), min_size=1, max_size=60),
)
def test_no_stretch_of_time_gets_more_than_its_share(
    rate: float, capacity: float, asked: list[tuple[float, float]]
) -> None:
    clock = Clock()
    bucket = Bucket(rate, capacity, clock)
    began, taken = clock.now, 0.0
    for pause, amount in asked:
        clock.now += pause
        wait_s = bucket.take(amount)
        taken += amount if not wait_s else 0.0
        assert taken <= capacity + (clock.now - began) * rate + 1e-6
        if wait_s:
            clock.now += wait_s + 1e-6  # who waits as long as he is told is served
            assert bucket.take(amount) == 0.0
            taken += amount


def test_a_debt_is_waited_for() -> None:
    clock = Clock()
    bucket = Bucket(10.0, 20.0, clock)
    assert bucket.wait_s() == 0.0
    bucket.charge(50.0)
    assert bucket.wait_s() == pytest.approx(3.0)
    clock.now += 3.0
    assert bucket.wait_s() == 0.0


def test_no_rate_is_no_limit() -> None:
    bucket = Bucket(0.0, 0.0)
    bucket.charge(1e12)
    assert bucket.take(1e12) == 0.0


def test_names_from_outside_do_not_fill_the_memory() -> None:
    buckets = Buckets(lambda: Bucket(1.0, 1.0))
    kept = buckets["kept"]
    kept.charge(1.0)
    for number in range(10_000):
        buckets[str(number)].take()
        assert buckets["kept"] is kept
    assert len(buckets._buckets) <= 4096


def test_clients_are_counted_apart() -> None:
    limits = ClientLimits(LimitsConfig(max_requests_in_flight=1))
    assert limits.enter("a")
    assert not limits.enter("a")
    assert limits.enter("b")
    limits.leave("a")
    assert limits.enter("a")
    limits.leave("a")
    limits.leave("b")
    assert limits._in_flight == {}


def test_what_is_held_back_is_counted_and_told_with_the_next() -> None:
    clock = Clock()
    sieve = Sieve(2.0, clock)
    assert [sieve.passes("x") for _ in range(5)] == [(True, 0), (True, 0), (False, 0), (False, 0), (False, 0)]
    assert sieve.passes("y") == (True, 0)
    assert sieve.wait_s("x") == pytest.approx(30.0)
    clock.now += 31.0
    assert sieve.passes("x") == (True, 3)
    assert sieve.passes("x") == (False, 0)
