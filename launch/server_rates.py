"""What happened at a table server between two looks: rates, quantiles of latencies, and what is there now."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from mfdist.table_server.watching import Seen

IsWanted: TypeAlias = Callable[[dict[str, str]], bool]


@dataclass(frozen=True, kw_only=True)
class ServerRates:
    """A server, between two looks; what cannot be told is None."""

    address: str
    problem: str | None  # why it says nothing
    state: str  # serving, draining, unreachable
    role: str | None  # in its pair: primary, alone (a primary), replica, copying (a replica); single without one
    epoch: int
    requests_per_s: float | None
    errors_per_s: float | None
    refusals_per_s: float | None
    request_bytes_per_s: float | None
    reply_bytes_per_s: float | None
    in_flight: float
    queue_depth: float
    latency_s: dict[str, tuple[float, float]]  # RPC → p50 and p99
    log_bytes: float
    log_pending_bytes: float
    checkpoint_age_s: float
    resident_bytes: float


@dataclass(frozen=True, kw_only=True)
class TableRates:
    """A server's part of a table, between two looks."""

    address: str
    table: str
    version: int
    num_rows: int
    row_dim: int
    num_bytes: int
    checkpoint_lag: float
    replica_lag: float
    row_hits: float
    row_hits_per_s: float | None
    updates_per_s: float | None


def server_rates(before: "Seen | None", now: "Seen") -> ServerRates:
    """Return what happened at a server since `before`; rates are None where there is no look before that counts."""
    rate = _rates_between(before, now)
    state = "unreachable" if now.error else "draining" if now.is_draining else "serving"
    return ServerRates(
        address=now.address,
        problem=str(now.error) if now.error else None,
        state=state,
        role=next((labels["role"] for labels, value in now.values("mfdist_role") if value), None),
        epoch=now.epoch,
        requests_per_s=rate("mfdist_requests_total", lambda labels: True),
        errors_per_s=rate("mfdist_requests_total", lambda labels: labels.get("code") != "OK"),
        refusals_per_s=rate("mfdist_refusals_total", lambda labels: True),
        request_bytes_per_s=rate("mfdist_request_bytes_total", lambda labels: True),
        reply_bytes_per_s=rate("mfdist_reply_bytes_total", lambda labels: True),
        in_flight=sum(value for _, value in now.values("mfdist_requests_in_flight")),
        queue_depth=now.samples.get("mfdist_queue_depth", 0.0),
        latency_s=_latencies(before, now),
        log_bytes=now.samples.get("mfdist_log_bytes", 0.0),
        log_pending_bytes=now.samples.get("mfdist_log_pending_bytes", 0.0),
        checkpoint_age_s=now.samples.get("mfdist_checkpoint_age_seconds", 0.0),
        resident_bytes=now.samples.get("process_resident_memory_bytes", 0.0),
    )


def table_rates(before: "Seen | None", now: "Seen") -> list[TableRates]:
    """Return what happened to each table of a server since `before`."""
    rate = _rates_between(before, now)
    found = []
    for table in now.tables:
        hits = [value for labels, value in now.values("mfdist_row_hits_total") if labels["table"] == table.name]
        lags = [value for labels, value in now.values("mfdist_table_checkpoint_lag") if labels["table"] == table.name]
        behind = [value for labels, value in now.values("mfdist_table_replica_lag") if labels["table"] == table.name]
        versions = {seen.name: seen.version for seen in before.tables} if before is not None else {}
        elapsed_s = now.at_s - before.at_s if before is not None else 0.0
        rose = table.version - versions.get(table.name, table.version)
        is_known = table.name in versions and elapsed_s > 0 and rose >= 0
        found.append(
            TableRates(
                address=now.address,
                table=table.name,
                version=table.version,
                num_rows=table.num_rows,
                row_dim=table.row_dim,
                num_bytes=table.num_bytes,
                checkpoint_lag=sum(lags),
                replica_lag=sum(behind),
                row_hits=sum(hits),
                row_hits_per_s=rate("mfdist_row_hits_total", partial(_is_of, table.name)),
                updates_per_s=rose / elapsed_s if is_known else None,
            )
        )
    return found


def quantile(share: float, buckets: list[tuple[float, float]]) -> float | None:
    """Return where `share` of what was counted lies, interpolated as Prometheus does; None where nothing was.

    Args:
        share: in [0, 1].
        buckets: (upper bound, count of all that is not above it), ascending; the last bound is infinity.
    """
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank, lower, below = share * buckets[-1][1], 0.0, 0.0
    for upper, count in buckets:
        if count >= rank and count > below:
            within = (rank - below) / (count - below)
            return lower if math.isinf(upper) else min(upper, lower + (upper - lower) * within)
        lower, below = upper, count
    return None


def _is_of(table: str, labels: dict[str, str]) -> bool:
    return labels["table"] == table


def _rates_between(before: "Seen | None", now: "Seen") -> Callable[[str, IsWanted], float | None]:
    """Return what tells the rate of a counter, of the samples whose labels are wanted."""

    def rate(name: str, is_wanted: IsWanted) -> float | None:
        if before is None or before.error or now.error or now.at_s <= before.at_s:
            return None
        old, new = (sum(value for labels, value in seen.values(name) if is_wanted(labels)) for seen in (before, now))
        return (new - old) / (now.at_s - before.at_s) if new >= old else None  # it has started anew

    return rate


def _latencies(before: "Seen | None", now: "Seen") -> dict[str, tuple[float, float]]:
    """Return p50 and p99 by RPC, of what was answered since `before`."""
    if before is None or before.error or now.error:
        return {}
    counts: dict[str, dict[float, float]] = {}
    for seen, sign in ((before, -1.0), (now, 1.0)):
        for labels, value in seen.values("mfdist_request_seconds_bucket"):
            of_method = counts.setdefault(labels["method"], {})
            bound = float(labels["le"])
            of_method[bound] = of_method.get(bound, 0.0) + sign * value
    found = {}
    for method, by_bound in sorted(counts.items()):
        buckets = sorted(by_bound.items())
        half, most = quantile(0.5, buckets), quantile(0.99, buckets)
        if half is not None and most is not None:
            found[method] = (half, most)
    return found
