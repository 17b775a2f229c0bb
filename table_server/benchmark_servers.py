"""Servers as the benchmark starts them: processes of their own, on loopback."""

import asyncio
import multiprocessing
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import psutil

from mfdist.errors import UnavailableError
from mfdist.idle_threads import asleep_in_children
from mfdist.table_server.codec import MAX_MESSAGE_BYTES
from mfdist.table_server.config import ServerConfig, ServerSection
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceServicer, add_TableServiceServicer_to_server
from mfdist.table_server.sections import LogsConfig
from mfdist.table_server.server import serve

#: Of a channel and of a server that only moves bytes.
OPTIONS = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES))
_START_S = 60.0


def process_at(address: str) -> int:
    """Return the process id of the child that listens there."""
    port = int(address.rpartition(":")[2])
    for child in psutil.Process().children(recursive=True):
        if any(each.laddr.port == port and each.status == "LISTEN" for each in child.net_connections("tcp")):
            return int(child.pid)
    raise UnavailableError(f"a server must listen at {address}; no child of this process does")


@contextmanager
def running(target: Callable[..., None], folder: Path | None = None, **settings: Any) -> Iterator[str]:
    """Give the address of a server in a process of its own, killed on the way out, and its data with it.

    Args:
        target: `serve_table` or `serve_nothing`.
        folder: in which its data lie.
        settings: of its section in a configuration.

    Raises:
        UnavailableError: it did not start.
    """
    context = multiprocessing.get_context("spawn")
    said, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="mfdist-bench-", dir=folder) as data:
        process = context.Process(target=target, args=(theirs, data, settings), daemon=True)
        with asleep_in_children():
            process.start()
        theirs.close()
        try:
            if not said.poll(_START_S):
                raise UnavailableError(f"a server must start within {_START_S:g} s; it did not")
            yield said.recv()
        finally:
            process.kill()
            process.join()


def serve_table(said: Connection, data: str, settings: dict[str, Any]) -> None:
    """Be a table server."""
    section = ServerSection(data=Path(data), **settings)
    quiet = LogsConfig(level="warning")
    serve(ServerConfig(server=section, logs=quiet), lambda address, _: said.send(address))


class _Nothing(TableServiceServicer):
    """Answers each message of a lookup with what it was last told to answer."""

    def __init__(self) -> None:
        self._reply = pb.LookupReply()

    async def Write(self, requests: AsyncIterator[pb.WriteRequest], context: Any) -> pb.WriteReply:
        async for request in requests:
            self._reply = pb.LookupReply(sums=request.values)
        return pb.WriteReply()

    async def Lookup(self, requests: AsyncIterator[pb.LookupRequest], context: Any) -> AsyncIterator[pb.LookupReply]:
        async for _ in requests:
            yield self._reply


def serve_nothing(said: Connection, data: str, settings: dict[str, Any]) -> None:
    """Be a gRPC server that answers lookups with what it was told to."""

    async def run() -> None:
        server = grpc.aio.server(options=OPTIONS)
        add_TableServiceServicer_to_server(_Nothing(), server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        said.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(run())
