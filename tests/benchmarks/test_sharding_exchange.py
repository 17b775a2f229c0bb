"""How the overlap of an exchange with computing is counted."""

import pytest

from mfdist.benchmarks.sharding_exchange import is_exchanging, shared_share


def test_time_in_which_anything_else_ran_counts_once():
    exchanging = [(0.0, 4.0), (3.0, 6.0), (10.0, 14.0)]
    computing = [(5.0, 7.0), (5.5, 8.0), (13.0, 20.0), (2.0, 2.5)]
    assert shared_share(exchanging, computing) == (0.5 + 1.0 + 1.0) / 10.0


def test_no_time_in_an_exchange_has_no_share():
    assert shared_share([], [(0.0, 1.0)]) is None
    assert shared_share([(1.0, 2.0)], []) == 0.0


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [  # as an H200's profile names them
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", True),
        ("Memcpy PtoP (Device -> Device)", True),
        ("c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)", True),
        ("Memcpy DtoD (Device -> Device)", False),
        ("_update_row", False),
    ],
)
def test_what_exchanges_is_known_by_its_name(kernel, expected):
    assert is_exchanging(kernel) is expected
