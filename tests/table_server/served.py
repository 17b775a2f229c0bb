"""A real gRPC server behind the real interceptors, in a thread; its servicer is as small as the protocol allows."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from mfdist.errors import CheckpointError, RowIdError
from mfdist.table_server.interceptors import interceptors, server_options
from mfdist.table_server.metrics import Metrics, Observed
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceServicer, add_TableServiceServicer_to_server
from mfdist.table_server.sections import LimitsConfig, LogsConfig, MetricsConfig, SecurityConfig, TracesConfig
from mfdist.table_server.tls import server_credentials


@dataclass(frozen=True)
class Config:
    """As the server's own configuration, with these sections alone."""

    security: SecurityConfig = field(default_factory=SecurityConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    logs: LogsConfig = field(default_factory=LogsConfig)
    traces: TracesConfig = field(default_factory=TracesConfig)


class Echo(TableServiceServicer):
    """Answers with what it was asked; a table's name decides what goes wrong."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.may_go_on = asyncio.Event()
        self.version = 0

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:
        table = pb.TableSpec(name="words", num_rows=1000, row_dim=64, dtype=pb.FLOAT32)
        shard = pb.Shard(table=table, region=pb.Region(row_begin=100, row_end=300, column_end=64))
        return pb.DescribeReply(
            server_id="echo", version="1.2", epoch=3, shards=[pb.ShardStatus(shard=shard, version=self.version)]
        )

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:
        return pb.StatsReply(counters=self.metrics.samples())

    async def Barrier(self, request: pb.BarrierRequest, context: Any) -> pb.BarrierReply:
        self.version += 1
        return pb.BarrierReply(version=self.version)

    async def Drop(self, request: pb.DropRequest, context: Any) -> pb.DropReply:
        if request.table == "row":
            raise RowIdError('row id 7 is outside table "row" (num_rows=7)')
        if request.table == "disk":
            raise CheckpointError("the log must be writable; got ENOSPC")
        if request.table == "defect":
            raise ZeroDivisionError("a secret number")
        if request.table == "wait":
            await self.may_go_on.wait()
        return pb.DropReply(was_there=True)

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        return pb.JoinReply(epoch=1)

    async def Gather(self, request: pb.GatherRequest, context: Any) -> AsyncIterator[pb.Rows]:
        for version in range(3):
            yield pb.Rows(version=version)

    async def Lookup(self, requests: AsyncIterator[pb.LookupRequest], context: Any) -> AsyncIterator[pb.LookupReply]:
        async for request in requests:
            yield pb.LookupReply(sums=request.lookups.row_ids)
            if request.table == "enough":
                return

    async def Write(self, requests: AsyncIterator[pb.WriteRequest], context: Any) -> pb.WriteReply:
        async for _ in requests:
            pass
        return pb.WriteReply()


@dataclass
class Served:
    """A running server and what it counts."""

    address: str
    metrics: Metrics
    echo: Echo
    loop: asyncio.AbstractEventLoop

    def count(self, name: str) -> float:
        """Return a sample; 0 where nothing was counted yet."""
        return self.metrics.samples().get(name, 0.0)


@contextmanager
def serving(config: Config | None = None, observed: Observed | None = None) -> Iterator[Served]:
    """Run a server on a free port of loopback while the context lasts."""
    config, observed = config or Config(), observed or Observed()
    ready: list[Served] = []
    started, done = threading.Event(), []

    async def serve() -> None:
        metrics = Metrics(observed)
        server = grpc.aio.server(interceptors=interceptors(config, metrics), options=server_options(config.limits))
        echo = Echo(metrics)
        add_TableServiceServicer_to_server(echo, server)  # type: ignore[no-untyped-call]
        credentials = server_credentials(config.security)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        done.append(lambda: loop.call_soon_threadsafe(stop.set))
        ready.append(Served(f"127.0.0.1:{port}", metrics, echo, loop))
        started.set()
        await stop.wait()
        await server.stop(0)

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            failures.append(error)
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    if failures:
        thread.join(30)
        raise failures[0]
    try:
        yield ready[0]
    finally:
        done[0]()
        thread.join(30)
        assert not thread.is_alive()


def until(holds: Callable[[], bool], deadline_s: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def certificates(folder: Path, days: float = 30.0) -> Path:
    """Return a folder with an authority, certificates that are valid for `days` (negative: expired), and tokens."""
    from mfdist.table_server.certificates import init_tls

    init_tls(folder, days=days)
    return folder
