"""The process: listens, tells its health, drains on SIGTERM."""

import asyncio
import contextlib
import signal
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mfdist.errors import ConfigError
from mfdist.table_server.codec import MAX_MESSAGE_BYTES
from mfdist.table_server.config import ServerConfig
from mfdist.table_server.node import Node
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import add_TableServiceServicer_to_server
from mfdist.table_server.service import TableService

_NAME = pb.DESCRIPTOR.services_by_name["TableService"].full_name
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share its calls
)


def serve(config: ServerConfig, on_listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running calls end, checkpoint, and return.

    Args:
        config: of the server.
        on_listening: called with HOST:PORT once calls are taken.

    Raises:
        UnavailableError: another server holds the data folder.
        CheckpointError: what is in it is damaged.
        ConfigError: it cannot listen there.

    Called on: the main thread of a process.
    """
    node = Node(config.server)
    try:
        asyncio.run(_serve(node, config, on_listening))
    finally:
        node.close()


async def _serve(node: Node, config: ServerConfig, on_listening: Callable[[str], None]) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    server = grpc.aio.server(options=_OPTIONS)
    add_TableServiceServicer_to_server(TableService(node), server)  # type: ignore[no-untyped-call]
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = _listen(server, config.server.listen)
    await server.start()
    for service in ("", _NAME):
        await status.set(service, health_pb2.HealthCheckResponse.SERVING)
    on_listening(address)
    checkpointing = asyncio.create_task(node.checkpoint_when_full())
    await stopping.wait()
    node.is_draining = True
    await status.enter_graceful_shutdown()
    await server.stop(config.server.drain_s)
    checkpointing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await checkpointing
    await node.checkpoint()


def _listen(server: grpc.aio.Server, address: str) -> str:
    """Bind, and return HOST:PORT as bound."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not host:
        raise ConfigError(f'a server listens on HOST:PORT, such as 127.0.0.1:0; got "{address}"')
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigError(f"a server must be able to listen; {address} is taken or not this machine's; give another")
    return f"{host}:{bound}"
