"""Rates and quantiles from two looks that are written by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.errors import UnavailableError
from mfdist.launch.server_rates import quantile, server_rates, table_rates
from mfdist.table_server.watching import Seen, SeenTable, labels_of


def look(
    at_s: float, requests: float, errors: float, fast: float, slow: float, *, version: int = 0, hits: float = 0
) -> Seen:
    return Seen(
        "a:1",
        at_s,
        epoch=2,
        tables=(SeenTable("t", version, 100, 8, 3200),),
        samples={
            'mfdist_requests_total{code="OK",method="Lookup"}': requests,
            'mfdist_requests_total{code="ABORTED",method="Push"}': errors,
            'mfdist_request_bytes_total{method="Lookup"}': 10 * requests,
            'mfdist_requests_in_flight{method="Lookup"}': 2,
            'mfdist_requests_in_flight{method="Push"}': 3,
            'mfdist_request_seconds_bucket{le="0.001",method="Lookup"}': fast,
            'mfdist_request_seconds_bucket{le="0.01",method="Lookup"}': fast + slow,
            'mfdist_request_seconds_bucket{le="+Inf",method="Lookup"}': fast + slow,
            'mfdist_row_hits_total{table="t"}': hits,
            'mfdist_row_hits_total{table="u"}': 1e9,
            'mfdist_table_checkpoint_lag{table="t"}': 4,
            'mfdist_table_replica_lag{table="t"}': 3,
            'mfdist_role{role="alone"}': 1,
            "mfdist_queue_depth": 7,
        },
    )


def test_rates_are_differences_over_time() -> None:
    before, now = look(10.0, 100, 5, 90, 10, version=3, hits=50), look(12.0, 300, 9, 288, 12, version=7, hits=250)
    rates = server_rates(before, now)
    assert (rates.state, rates.problem, rates.epoch) == ("serving", None, 2)
    assert rates.requests_per_s == pytest.approx((204) / 2)
    assert rates.errors_per_s == pytest.approx(2)
    assert rates.request_bytes_per_s == pytest.approx(1000)
    assert rates.refusals_per_s == 0
    assert (rates.in_flight, rates.queue_depth, rates.role) == (5, 7, "alone")
    half, most = rates.latency_s["Lookup"]
    assert half == pytest.approx(0.001 * 100 / 198)  # 198 of 200 were fast
    assert most == pytest.approx(0.001)
    [table] = table_rates(before, now)
    assert (table.version, table.checkpoint_lag, table.replica_lag, table.row_hits) == (7, 4, 3, 250)
    assert (table.updates_per_s, table.row_hits_per_s) == (2.0, 100.0)


def test_a_first_look_has_no_rates() -> None:
    rates = server_rates(None, look(10.0, 100, 5, 90, 10))
    assert rates.requests_per_s is None
    assert rates.latency_s == {}
    assert table_rates(None, look(10.0, 1, 1, 1, 1))[0].updates_per_s is None


def test_a_server_that_started_anew_or_is_gone_has_no_rates() -> None:
    before = look(10.0, 100, 5, 90, 10, version=9, hits=50)
    anew = look(11.0, 3, 0, 3, 0, version=2, hits=1)
    assert server_rates(before, anew).requests_per_s is None
    assert table_rates(before, anew)[0].updates_per_s is None
    gone = Seen("a:1", 11.0, UnavailableError("server a:1 must be reachable"))
    rates = server_rates(before, gone)
    assert (rates.state, rates.problem) == ("unreachable", "server a:1 must be reachable")
    assert rates.requests_per_s is None
    assert server_rates(gone, look(12.0, 1, 1, 1, 1)).requests_per_s is None


@given(st.lists(st.floats(0.0001, 9.0), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_a_quantile_lies_in_the_bucket_that_has_it(values: list[float], share: float) -> None:
    bounds = [0.001, 0.01, 0.1, 1.0, 10.0, math.inf]
    found = quantile(share, [(bound, float(sum(value <= bound for value in values))) for bound in bounds])
    exact = sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
    upper = next(bound for bound in bounds if exact <= bound)
    lower = max([0.0, *(bound for bound in bounds if bound < upper)])
    assert found is not None
    assert lower <= found <= upper


def test_quantiles_of_nothing_and_of_what_is_beyond() -> None:
    assert quantile(0.5, []) is None
    assert quantile(0.5, [(1.0, 0.0), (math.inf, 0.0)]) is None
    assert quantile(0.99, [(1.0, 1.0), (math.inf, 10.0)]) == 1.0


@pytest.mark.parametrize("table", ["plain", 'quo"te', "back\\slash", "new\nline", "comma,=}{", "\\n"])
def test_labels_are_read_as_they_were_written(table: str) -> None:
    from mfdist.table_server.metrics import Metrics, Observed, TableFigures

    figures = TableFigures(name=table, version=1, num_rows=1, num_bytes=1, row_hits=1, saved_version=1)
    metrics = Metrics(Observed(tables=lambda: [figures]))
    names = [name for name in metrics.samples() if name.startswith("mfdist_table_version")]
    assert [labels_of(name) for name in names] == [{"table": table}]
