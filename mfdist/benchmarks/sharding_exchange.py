"""What a sharded table's exchange takes by itself, beside a plain all-to-all, and how much of it computing hides."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]

from mfdist.sharding.exchange import Exchange
from mfdist.sharding.sent import Sent
from mfdist.sharding.tags import Call
from mfdist.tables.sharded import ShardedTable

_TURNS = 7
_CALL = Call(table="", kind="bench", phase="check")


@dataclass(frozen=True, kw_only=True)
class Alone:
    """The exchange of one step without its lookups.

    Args:
        sent_bytes: what this rank sends to others.
        exchange_s: the same messages once more, and nothing else.
        plain_s: one plain all-to-all in which every rank sends as much as the one that sends most.
    """

    sent_bytes: int
    exchange_s: float
    plain_s: float


def exchange_alone(table: ShardedTable, step: Callable[[], object]) -> Alone:
    """Return what the exchange of a step takes by itself; called on all ranks of a table with more than one."""
    exchanges = table.exchanges
    for exchange in exchanges.all:
        exchange.traffic.clear()
        exchange.traffic.sends = []
    step()
    sends: list[tuple[Exchange, Sent, Tensor]] = []
    for exchange in exchanges.all:
        recorded, exchange.traffic.sends = exchange.traffic.sends or [], None
        sends += [
            (exchange, sent, torch.zeros(sum(sent.sizes), dtype=sent.dtype, device=exchanges.device))
            for sent in recorded
        ]
    num_bytes = sum(sum(exchange.traffic.num_bytes.values()) for exchange in exchanges.all)
    size = -(-num_bytes // (exchanges.world_size - 1))
    largest = max(line[0] for line in exchanges.everyone.open(_CALL, [size]).wait())
    payload = torch.zeros(largest * exchanges.world_size, dtype=torch.uint8, device=exchanges.device)
    return Alone(
        sent_bytes=num_bytes,
        exchange_s=_median_s(lambda: _replay(sends), exchanges.device),
        plain_s=_median_s(lambda: _plain(payload), exchanges.device),
    )


def overlap(step: Callable[[], object]) -> float | None:
    """Return the share of a step's time in NCCL during which other kernels ran too; None where it was never in NCCL."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        step()
    nccl: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    for event in profile.events() or ():
        if event.device_type == DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            (nccl if "nccl" in event.name.lower() else others).append(span)
    return shared_share(nccl, others)


def shared_share(exchanging: Sequence[tuple[float, float]], computing: Sequence[tuple[float, float]]) -> float | None:
    """Return the share of the time in some spans that lies in others too; None where there is no time in them."""
    exchanging, computing = _union(exchanging), _union(computing)
    total = sum(end - begin for begin, end in exchanging)
    shared = sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in exchanging for first, last in computing)
    return shared / total if total else None


def _replay(sends: Sequence[tuple[Exchange, Sent, Tensor]]) -> None:
    opened = {exchange: exchange.open(_CALL) for exchange, _, _ in sends}
    for exchange, sent, payload in sends:
        exchange.swap(opened[exchange], payload, sent.sizes, sent.arriving, sent.largest)
    for each in opened.values():
        each.wait()


def _plain(payload: Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(payload), payload)


def _median_s(work: Callable[[], None], device: torch.device) -> float:
    taken = []
    for _ in range(_TURNS + 1):
        dist.barrier()
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return spans of time that do not overlap and cover the same."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
