"""How the overlap of an exchange with computing is counted."""

from mfdist.benchmarks.sharding_exchange import shared_share


def test_time_in_which_anything_else_ran_counts_once():
    exchanging = [(0.0, 4.0), (3.0, 6.0), (10.0, 14.0)]
    computing = [(5.0, 7.0), (5.5, 8.0), (13.0, 20.0), (2.0, 2.5)]
    assert shared_share(exchanging, computing) == (0.5 + 1.0 + 1.0) / 10.0


def test_no_time_in_an_exchange_has_no_share():
    assert shared_share([], [(0.0, 1.0)]) is None
    assert shared_share([(1.0, 2.0)], []) == 0.0
