"""Table servers measured: each a process of its own, beside a gRPC server that does nothing and the local lookup.

Results are compared before anything is timed. What is compared takes turns, because machines are shared.
"""

import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from torch import Tensor

from mfdist.errors import ConsistencyError
from mfdist.optim import RowSGD
from mfdist.sharding.kinds import column_wise
from mfdist.spec import TableSpec
from mfdist.table_server.benchmark_case import CASES, Case, drawn, full_load, made
from mfdist.table_server.benchmark_others import Others
from mfdist.table_server.benchmark_servers import OPTIONS, process_at, running, serve_nothing, serve_table
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.codec import packed_message
from mfdist.table_server.connection import TableServers
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.routing import parts_of

_IN_FLIGHT = 32
_CALLS_A_TURN = 8  # one after the other, as a client's are: the first finds caches that the others used


@dataclass(frozen=True)
class LookupResult:
    """Median seconds of a lookup, and what share of the others' speed it has, turn by turn."""

    case: str
    server_s: float
    grpc_s: float
    local_s: float
    share_of_grpc: float
    share_of_local: float
    request_bytes: int
    reply_bytes: int
    other_cores: float  # of other programs meanwhile


@dataclass(frozen=True)
class LoadResult:
    """64-token lookups, at full load and at half of it."""

    requests_per_s: float
    p50_s: float
    p99_s: float
    memory_growth: float  # of the server while it was fully loaded; a share
    other_cores: float


@dataclass(frozen=True)
class LogResult:
    """Pushes to 32 tables at once, with a log and without."""

    logged_per_s: float
    unlogged_per_s: float
    cost: float  # share of time that the log adds, median over turns
    push_bytes: int
    other_cores: float


def measure_lookups(seconds: float) -> Iterator[LookupResult]:
    """Yield every case's result.

    Raises:
        ConsistencyError: a server's sums are not those of the local lookup.
    """
    with running(serve_table) as address, running(serve_nothing) as idle, TableServers([address]) as servers:
        for case in CASES:
            yield _lookup(case, servers, idle, seconds)


def measure_load(seconds: float) -> LoadResult:
    """Return throughput, latency under half of it, and the server's growth."""
    with running(serve_table) as address, TableServers([address]) as servers:
        remote, _, codes, scores = made(CASES[0], servers)
        parts = parts_of(remote.plan, codes, scores, CASES[0].stride)
        process = psutil.Process(process_at(address))

        async def half(rate: float, for_s: float) -> list[float]:
            times: list[float] = []

            async def one(due: float) -> None:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                began = time.perf_counter()
                await remote._sums(parts)
                times.append(time.perf_counter() - began)

            begin = time.perf_counter()
            await asyncio.gather(*(one(begin + number / rate) for number in range(int(for_s * rate))))
            return sorted(times)

        servers.wait(full_load(lambda: remote._sums(parts), seconds / 2))
        others = Others()
        before = process.memory_info().rss
        rate = servers.wait(full_load(lambda: remote._sums(parts), seconds))
        growth = process.memory_info().rss / before - 1
        gc.collect()
        gc.freeze()  # or p99 would be how long this process's collector looks at all that torch has brought
        times = servers.wait(half(rate / 2, seconds))
        gc.unfreeze()
        return LoadResult(rate, times[len(times) // 2], times[int(0.99 * len(times))], growth, others.cores())


@dataclass(frozen=True)
class MemoryResult:
    """A server's memory under full load, as it was and as it moved."""

    seconds: float
    requests_per_s: float
    pushes_per_s: float
    first_bytes: int  # once it was warm
    last_bytes: int
    least_bytes: int
    most_bytes: int

    @property
    def drift(self) -> float:
        """Return by what share the last minute, or tenth, differs from the first."""
        return self.last_bytes / self.first_bytes - 1


def measure_memory(folder: Path, seconds: float) -> MemoryResult:
    """Return how a server's memory moves while eight lookups and four logged pushes are in flight all the time.

    Args:
        folder: on the disk that the log is to be on.
        seconds: after a tenth of it, or a minute, to warm up.
    """
    case, pushed = CASES[0], Case("push", 256, 16, 64, 256)
    with running(serve_table, folder=folder, log_gib=0.125) as address, TableServers([address]) as servers:
        remote, _, codes, scores = made(case, servers)
        parts = parts_of(remote.plan, codes, scores, case.stride)
        tables = [_trained(pushed, servers, f"t{number}") for number in range(4)]
        _, push_codes, push_scores = drawn(pushed)
        push_parts = parts_of(tables[0].plan, push_codes, push_scores, pushed.stride)
        grad = torch.randn(pushed.num_tokens, pushed.row_dim)
        process = psutil.Process(process_at(address))
        part_s = min(60.0, seconds / 10)

        async def load(for_s: float) -> tuple[int, int, list[int]]:
            until, lookups, pushes, held = time.perf_counter() + for_s, 0, 0, [process.memory_info().rss]

            async def look() -> None:
                nonlocal lookups
                while time.perf_counter() < until:
                    await remote._sums(parts)
                    lookups += 1

            async def push(table: RemoteTable) -> None:
                nonlocal pushes
                while time.perf_counter() < until:
                    await table._push(push_parts, grad, 0.01)
                    pushes += 1

            async def watch() -> None:
                while time.perf_counter() < until:
                    await asyncio.sleep(min(1.0, for_s / 10))
                    held.append(process.memory_info().rss)

            await asyncio.gather(watch(), *(look() for _ in range(8)), *(push(table) for table in tables))
            return lookups, pushes, held

        servers.wait(load(part_s))
        lookups, pushes, held = servers.wait(load(seconds))
        number = max(1, round(len(held) * part_s / seconds))
        first, last = (int(statistics.median(part)) for part in (held[:number], held[-number:]))
        return MemoryResult(seconds, lookups / seconds, pushes / seconds, first, last, min(held), max(held))


def measure_log(folder: Path, rounds: int, pushes: int = 30) -> LogResult:
    """Return what the log costs where 32 tables are pushed to at once.

    Args:
        folder: on the disk that the log is to be on.
        rounds: turns of each.
        pushes: to each table in a turn.
    """
    case = Case("push", 256, 16, 64, 256)
    times: dict[str, list[float]] = {"log": [], "checkpoint": []}
    with (
        running(serve_table, folder=folder) as logged,
        running(serve_table, folder=folder, durability="checkpoint") as unlogged,
        TableServers([logged]) as one,
        TableServers([unlogged]) as other,
    ):
        both = {"log": one, "checkpoint": other}
        tables = {
            name: [_trained(case, servers, f"t{number}") for number in range(_IN_FLIGHT)]
            for name, servers in both.items()
        }
        _, codes, scores = drawn(case)
        grad = torch.randn(case.num_tokens, case.row_dim)
        others = Others()
        for turn in range(rounds + 1):
            for name in both if turn % 2 else reversed(both):
                began = time.perf_counter()
                both[name].wait(_push_all(tables[name], case, codes, scores, grad, pushes))
                both[name].flush()
                if turn:
                    times[name].append(time.perf_counter() - began)
        other_cores = others.cores()
        for mine, theirs in zip(*tables.values(), strict=True):
            if not torch.equal(mine.rows(), theirs.rows()):
                raise ConsistencyError("rows must be the same with a log and without; they are not: report this")
        number = pushes * _IN_FLIGHT
        cost = statistics.median(with_log / without - 1 for with_log, without in zip(*times.values(), strict=True))
        size = grad.numel() * 4 + codes.numel() + scores.numel() * 4
        medians = [number / statistics.median(times[name]) for name in ("log", "checkpoint")]
        return LogResult(medians[0], medians[1], cost, size, other_cores)


async def _push_all(
    tables: list[RemoteTable], case: Case, codes: Tensor, scores: Tensor, grad: Tensor, pushes: int
) -> None:
    async def one(table: RemoteTable) -> None:
        parts = parts_of(table.plan, codes, scores, case.stride)
        for _ in range(pushes):
            await table._push(parts, grad, 0.01)

    await asyncio.gather(*(one(table) for table in tables))


def _lookup(case: Case, servers: TableServers, idle: str, seconds: float) -> LookupResult:
    remote, local, codes, scores = made(case, servers)
    parts = parts_of(remote.plan, codes, scores, case.stride)
    with torch.no_grad():
        expected = local(codes, scores, code_stride=case.stride)
        if not torch.equal(remote(codes, scores, code_stride=case.stride), expected):
            raise ConsistencyError(
                f"a server's sums must be the local lookup's; those of {case.name} are not: report this"
            )
    requests = remote.lookup_messages(parts[0])
    sums = packed_message(expected[: max(1, case.num_tokens // len(requests))])
    reply = pb.LookupReply(sums=sums)
    messages = [pb.LookupRequest.FromString(request.serialized()) for request in requests]
    channel = grpc.insecure_channel(idle, options=OPTIONS)
    stub = TableServiceStub(channel)  # type: ignore[no-untyped-call]
    stub.Write(iter([pb.WriteRequest(values=reply.sums)]))  # what it answers every message with
    calls: dict[str, Callable[[], Any]] = {
        "server": lambda: servers.wait(remote._sums(parts)),
        "grpc": lambda: list(stub.Lookup(iter(messages))),
        "local": lambda: local(codes, scores, code_stride=case.stride),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    others, until = Others(), time.perf_counter() + seconds
    with torch.no_grad():
        while len(times["local"]) < 8 or time.perf_counter() < until:
            for name, call in calls.items():
                times[name].append(statistics.median(_timed(call) for _ in range(_CALLS_A_TURN)))
    other_cores = others.cores()
    channel.close()
    taken = {name: times[name][2:] for name in times}  # the first warm up
    share = {
        name: statistics.median(other / own for other, own in zip(taken[name], taken["server"], strict=True))
        for name in ("grpc", "local")
    }
    return LookupResult(
        case=case.name,
        server_s=statistics.median(taken["server"]),
        grpc_s=statistics.median(taken["grpc"]),
        local_s=statistics.median(taken["local"]),
        share_of_grpc=share["grpc"],
        share_of_local=share["local"],
        request_bytes=sum(len(request.serialized()) for request in requests),
        reply_bytes=len(requests) * reply.ByteSize(),
        other_cores=other_cores,
    )


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _trained(case: Case, servers: TableServers, name: str) -> RemoteTable:
    spec = TableSpec(name=name, num_rows=case.num_slots * case.stride, row_dim=case.row_dim, dtype=torch.float32)
    return RemoteTable(column_wise(spec, [0]), servers, seed=1, fuse=RowSGD(lr=0.01))
