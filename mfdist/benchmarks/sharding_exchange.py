"""What a sharded table's exchange takes by itself, beside a plain all-to-all, and how much of it computing hides."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]

from mfdist.sharding.exchange import Exchange
from mfdist.sharding.sent import Sent
from mfdist.sharding.tags import Call
from mfdist.tables.sharded import ShardedTable

_TURNS = 7
#: Products of fp32 matrices that keep a GPU at work for some milliseconds, longer than a host takes to queue a step.
_BUSY_SIZE, _BUSY_TIMES = 4096, 4
_CALL = Call(table="", kind="bench", phase="check")
#: Bytes that the parts of a plain all-to-all are a multiple of: NCCL copies others far slower.
_ALIGNED = 512
#: What only moves data between GPUs, or waits for others' to arrive, has one of these in its name in a profile.
_EXCHANGING = ("nccl", "memcpy ptop", "symmetric_memory::barrier")


@dataclass(frozen=True, kw_only=True)
class Alone:
    """The exchange of one step without its lookups.

    Args:
        sent_bytes: what this rank sends to others.
        exchange_s: the same messages once more, and nothing else; on a GPU behind other work, as in a model, so that
            they are there before it is their turn.
        plain_s: likewise, one plain all-to-all in which every rank sends as much as the one that sends most.
        started_s, plain_started_s: the same two begun while the device is idle, the host's calls included.
    """

    sent_bytes: int
    exchange_s: float
    plain_s: float
    started_s: float
    plain_started_s: float


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
    device = exchanges.device
    part = -(-largest // _ALIGNED) * _ALIGNED
    payload = torch.zeros(part * exchanges.world_size, dtype=torch.uint8, device=device)
    started_s, exchange_s = _median_s(lambda: _replay(sends), device)
    plain_started_s, plain_s = _median_s(lambda: _plain(payload), device)
    return Alone(
        sent_bytes=num_bytes,
        exchange_s=exchange_s,
        plain_s=plain_s,
        started_s=started_s,
        plain_started_s=plain_started_s,
    )


def overlap(step: Callable[[], object]) -> float | None:
    """Return the share of the time a step exchanges during which kernels compute; None where it never exchanges.

    It exchanges while NCCL's kernels run, copies to other GPUs, or waits for what they write here; kernels that put
    codes and scores together where others read them count as computing.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        step()
    exchanging: list[tuple[float, float]] = []
    computing: list[tuple[float, float]] = []
    for event in profile.events() or ():
        if event.device_type == DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            (exchanging if is_exchanging(event.name) else computing).append(span)
    return shared_share(exchanging, computing)


def is_exchanging(kernel: str) -> bool:
    """Return whether what a profile calls so moves data between GPUs, or waits for it, and does nothing else."""
    return any(name in kernel.lower() for name in _EXCHANGING)


def shared_share(exchanging: Sequence[tuple[float, float]], computing: Sequence[tuple[float, float]]) -> float | None:
    """Return the share of the time in some spans that lies in others too; None where there is no time in them."""
    exchanging, computing = _union(exchanging), _union(computing)
    total = sum(end - begin for begin, end in exchanging)
    shared = sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in exchanging for first, last in computing)
    return shared / total if total else None


def _replay(sends: Sequence[tuple[Exchange, Sent, Tensor]]) -> None:
    opened = {exchange: exchange.open(_CALL) for exchange, _, _ in sends}
    for exchange, sent, payload in sends:
        if not sent.is_lent:
            exchange.swap(opened[exchange], payload, sent.sizes, sent.arriving, sent.largest)
            continue
        parts = payload.split_with_sizes(sent.sizes)
        exchange.lend(
            opened[exchange],
            partial(_write, parts),
            sent.dtype,
            sent.sizes,
            sent.arriving,
            sent.largest,
            own=parts[exchange.rank] if sent.has_own else None,
        )
    for each in opened.values():
        each.wait()


def _write(parts: Sequence[Tensor], rank: int, part: Tensor) -> None:
    part.copy_(parts[rank])


def _plain(payload: Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(payload), payload)


def _median_s(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return how long work takes that begins while the device is idle, and how long behind other work."""
    alone, behind = [], []
    for _ in range(_TURNS + 1):
        alone.append(_timed_s(work, device))
        behind.append(_behind_s(work, device) if device.type == "cuda" else alone[-1])
    return statistics.median(alone[1:]), statistics.median(behind[1:])


def _timed_s(work: Callable[[], None], device: torch.device) -> float:
    _begin_together(device)
    began = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - began


def _behind_s(work: Callable[[], None], device: torch.device) -> float:
    """Return what the GPU takes for work that is queued before it is its turn."""
    factor = torch.ones(_BUSY_SIZE, _BUSY_SIZE, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    _begin_together(device)
    for _ in range(_BUSY_TIMES):
        factor @ factor
    begin.record()
    work()
    end.record()
    _synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def _begin_together(device: torch.device) -> None:
    _synchronize(device)
    dist.barrier()
    _synchronize(device)


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
