"""A table server beside what else answers lookups from a process of its own: each started several times, in turns.

Others on the machine take from one start more than from the next, so that one of each would compare nothing.
"""

import gc
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias

import torch
from torch import Tensor

from mfdist.errors import ConsistencyError
from mfdist.sharding.kinds import column_wise
from mfdist.spec import TableSpec
from mfdist.table_server.benchmark_case import CASES, drawn, full_load
from mfdist.table_server.benchmark_others import Others
from mfdist.table_server.benchmark_servers import running, serve_table
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.codec import packed_message
from mfdist.table_server.connection import TableServers
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.routing import parts_of
from mfdist.tables.local import LocalTable

_OURS = "table server"
_WARM_SHARE = 0.25  # of the time that is measured
_RELATIVE_ERROR = 2e-6  # two fp32 sums of the same 64 rows, in whatever order


@dataclass(frozen=True)
class Batch:
    """What every contender is asked for again and again, and what must come back.

    Args:
        spec: of the table.
        rows: [R, D], fp32.
        codes: [N, K], uint8; row k · stride + code of slot k.
        ids: [N, K], int64: the same rows by their ids.
        scores: [N, K], fp32.
        stride: rows a slot.
        sums: [N, D], fp32, of the local lookup.
    """

    spec: TableSpec
    rows: Tensor
    codes: Tensor
    ids: Tensor
    scores: Tensor
    stride: int
    sums: Tensor

    @classmethod
    def of_64_tokens(cls) -> Self:
        """Draw one of the decode case."""
        case = CASES[0]
        spec, codes, scores = drawn(case)
        local = LocalTable(spec)
        with torch.no_grad():
            local.weight.normal_(generator=torch.Generator().manual_seed(1))
            sums = local(codes, scores, code_stride=case.stride)
        ids = codes.long() + torch.arange(case.num_slots) * case.stride
        return cls(spec, local.weight.detach(), codes, ids, scores, case.stride, sums)


class Started(Protocol):
    """A contender that has started.

    Attributes:
        num_threads: with which it looks up.
    """

    num_threads: int

    def sums(self) -> Tensor:
        """Return one answer [N, D]."""

    def num_bytes(self) -> tuple[int, int]:
        """Return the bytes of a request and of its reply."""

    def load(self, seconds: float) -> float:
        """Return requests a second while `IN_FLIGHT` are under way all the time, each made anew from the batch."""


Start: TypeAlias = Callable[[Batch], AbstractContextManager[Started]]


@dataclass(frozen=True)
class ContestResult:
    """What was found of a contender, turn by turn; what compares is the table server's.

    Args:
        requests_per_s: of each start.
        times_as_fast: the table server's requests a second over this one's, of each turn.
        bytes_ratio: this one's bytes over the table server's.
        other_cores: how many cores other programs used, in each start.
    """

    contender: str
    num_threads: int
    requests_per_s: list[float]
    times_as_fast: list[float]
    request_bytes: int
    reply_bytes: int
    bytes_ratio: float
    other_cores: list[float]

    @property
    def median_per_s(self) -> float:
        """Return the median over starts."""
        return statistics.median(self.requests_per_s)


def measure_contest(others: Mapping[str, Start], starts: int, seconds: float) -> list[ContestResult]:
    """Return what 64-token lookups of a table server and of others come to; the server's result is the first.

    Args:
        others: by name.
        starts: of each.
        seconds: for which each start is measured, after a quarter of that to warm up.

    Raises:
        ConsistencyError: a contender's sums are not those of the local lookup.
    """
    batch = Batch.of_64_tokens()
    contenders: dict[str, Start] = {_OURS: _started_server, **others}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    disturbed: dict[str, list[float]] = {name: [] for name in contenders}
    facts: dict[str, tuple[int, int, int]] = {}
    for turn in range(starts):
        for name in contenders if turn % 2 == 0 else reversed(contenders):
            with contenders[name](batch) as started:
                _check(name, started.sums(), batch.sums)
                facts[name] = (started.num_threads, *started.num_bytes())
                started.load(seconds * _WARM_SHARE)
                gc.collect()
                gc.freeze()  # this process's collector would look at all that torch and others have brought
                meanwhile = Others()
                rates[name].append(started.load(seconds))
                disturbed[name].append(meanwhile.cores())
                gc.unfreeze()
    our_bytes = sum(facts[_OURS][1:])
    return [
        ContestResult(
            contender=name,
            num_threads=threads,
            requests_per_s=rates[name],
            times_as_fast=[ours / theirs for ours, theirs in zip(rates[_OURS], rates[name], strict=True)],
            request_bytes=request,
            reply_bytes=reply,
            bytes_ratio=(request + reply) / our_bytes,
            other_cores=disturbed[name],
        )
        for name, (threads, request, reply) in facts.items()
    ]


def _check(name: str, sums: Tensor, expected: Tensor) -> None:
    error = float((sums.double() - expected.double()).norm() / expected.double().norm())
    if not error <= _RELATIVE_ERROR:
        raise ConsistencyError(
            f"sums of a {name} must be the local lookup's; they differ by {error:.1e}, of which at most "
            f"{_RELATIVE_ERROR:.0e} is rounding; nothing was timed: report this"
        )


@contextmanager
def _started_server(batch: Batch) -> Iterator[Started]:
    with running(serve_table) as address, TableServers([address]) as servers:
        table = RemoteTable(column_wise(batch.spec, [0]), servers)
        table.load_rows(batch.rows)
        yield _Server(batch, table)


class _Server:
    """A table server and its client, asked as a lookup asks: from tensors to tensors."""

    def __init__(self, batch: Batch, table: RemoteTable) -> None:
        self._batch, self._table = batch, table
        self.num_threads = os.cpu_count() or 1  # as a server does, unless its configuration says otherwise

    def sums(self) -> Tensor:
        batch = self._batch
        with torch.no_grad():
            found: Tensor = self._table(batch.codes, batch.scores, code_stride=batch.stride)
            return found

    def num_bytes(self) -> tuple[int, int]:
        batch, table = self._batch, self._table
        (part,) = parts_of(table.plan, batch.codes, batch.scores, batch.stride)
        request = sum(len(message.serialized()) for message in table.lookup_messages(part))
        return request, pb.LookupReply(sums=packed_message(batch.sums)).ByteSize()

    def load(self, seconds: float) -> float:
        batch, table = self._batch, self._table
        return table.servers.wait(
            full_load(
                lambda: table._sums(parts_of(table.plan, batch.codes, batch.scores, batch.stride)),
                seconds,
            )
        )
