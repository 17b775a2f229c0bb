"""Looking on from outside: what a server says of itself, through the protocol alone."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from mfdist.errors import MfdistError
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.status import error_of

_NAME = re.compile(r"(\w+)(?:\{(.*)\})?", re.DOTALL)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True)
class SeenTable:
    """A server's part of one table."""

    name: str
    version: int
    num_rows: int
    row_dim: int  # columns held here
    num_bytes: int


@dataclass(frozen=True)
class Seen:
    """One look at one server."""

    address: str
    at_s: float  # on this process's monotonic clock
    error: MfdistError | None = None  # why there is nothing else
    version: str = ""
    epoch: int = 0
    is_draining: bool = False
    tables: tuple[SeenTable, ...] = ()
    samples: dict[str, float] = field(default_factory=dict)  # by name and labels, as `Metrics.samples` has them

    def values(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """Yield labels and value of every sample of a metric."""
        for key, value in self.samples.items():
            if key == name or key.startswith(f"{name}{{"):
                yield labels_of(key), value


async def look(address: str, channel: grpc.aio.Channel, deadline_s: float) -> Seen:
    """Return what a server says of itself now, or why it says nothing. Needs the right to read."""
    stub = TableServiceStub(channel)  # type: ignore[no-untyped-call]
    try:
        described = await stub.Describe(pb.DescribeRequest(), timeout=deadline_s)
        stats = await stub.Stats(pb.StatsRequest(), timeout=deadline_s)
    except grpc.RpcError as error:
        return Seen(address, time.monotonic(), error_of(error, address))
    tables = []
    for status in described.shards:
        region = status.shard.region
        tables.append(
            SeenTable(
                name=status.shard.table.name,
                version=status.version,
                num_rows=region.row_end - region.row_begin,
                row_dim=region.column_end - region.column_begin,
                num_bytes=status.num_bytes,
            )
        )
    return Seen(
        address,
        time.monotonic(),
        version=described.version,
        epoch=described.epoch,
        is_draining=described.is_draining,
        tables=tuple(tables),
        samples=dict(stats.counters),
    )


def labels_of(sample: str) -> dict[str, str]:
    """Return the labels of a sample's name, such as `mfdist_refusals_total{reason="token"}`."""
    match = _NAME.fullmatch(sample)
    if match is None or match[2] is None:
        return {}
    return {
        key: _ESCAPED.sub(lambda escape: "\n" if escape[1] == "n" else escape[1], value)
        for key, value in _LABEL.findall(match[2])
    }
