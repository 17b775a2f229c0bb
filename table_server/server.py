"""The process: listens, tells its health, drains on SIGTERM."""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mfdist import __version__
from mfdist.errors import InternalError, UnavailableError
from mfdist.table_server import allocator, logs
from mfdist.table_server.addresses import check_exposure, is_loopback, join_address, split_address
from mfdist.table_server.channel import check_reachable
from mfdist.table_server.config import ServerConfig
from mfdist.table_server.interceptors import interceptors, server_options
from mfdist.table_server.metrics import Metrics, MetricsPage
from mfdist.table_server.node import Node
from mfdist.table_server.observation import observed
from mfdist.table_server.pairing import Pairing
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.replicator import Replicator
from mfdist.table_server.rpcs import add_service
from mfdist.table_server.service import TableService
from mfdist.table_server.tls import server_credentials

_NAME = pb.DESCRIPTOR.services_by_name["TableService"].full_name
_LOOKS_OF_MIDDLE_AGE = 50  # of the collector, before one at everything
_LOOK_S = 1.0  # between looks at whether the log fails
_ONE_SERVER_A_PORT = ("grpc.so_reuseport", 0)  # a second one must fail, not share its calls

_logger = logging.getLogger(__name__)


def serve(
    config: ServerConfig, on_listening: Callable[[str, str | None], None], *, pairing: Pairing | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running calls end, checkpoint, and return.

    Args:
        config: of the server.
        on_listening: called with HOST:PORT once calls are taken, and with that of the metrics page, if there is one.
        pairing: of a server whose peer is told while it runs; `config.replication` says how to reach it, not where.

    Raises:
        UnavailableError: another server holds the data folder, or the address.
        CheckpointError: what is in it is damaged.
        ConfigError: it must not listen there without TLS and tokens, or a file of these is wrong.

    Called on: the main thread of a process.
    """
    allocator.keep_memory()
    check_exposure(config.server.listen, config.security, "server.listen")
    if config.metrics.listen:
        check_exposure(config.metrics.listen, config.security, "metrics.listen")
    logs.configure(config.logs)
    if config.replication.peer:
        check_reachable(config.replication.peer, config.replication, "replication.peer")
    node = Node(config.server, config.replication, is_paired=pairing is not None)
    if pairing is not None:
        pairing.begin(node.standing)
    # The collector looks seldom, and not at what is there now, which stays: each long look holds all calls up.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], _LOOKS_OF_MIDDLE_AGE)
    try:
        asyncio.run(_serve(node, config, on_listening))
    finally:
        node.close()


async def _serve(node: Node, config: ServerConfig, on_listening: Callable[[str, str | None], None]) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    metrics = Metrics(observed(node))
    server = grpc.aio.server(
        interceptors=interceptors(config, metrics), options=[*server_options(config.limits), _ONE_SERVER_A_PORT]
    )
    add_service(TableService(node, metrics), server)
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = _listen(server, config)
    page = MetricsPage(metrics, config.metrics, config.security) if config.metrics.listen else None
    await server.start()
    await _set_health(status, "SERVING")
    _tell(config, address, page)
    on_listening(address, page.address if page else None)
    running = [asyncio.create_task(node.checkpointer.run()), asyncio.create_task(_keep_health(node, status))]
    if node.standing.role != "single":
        running.append(asyncio.create_task(Replicator(node, config.replication).run()))
    defect = await _until_stopped(stopping, running)
    _logger.info("draining", extra={"fields": {"address": address}})
    node.is_draining = True
    await status.enter_graceful_shutdown()
    node.follower.end()
    await server.stop(config.server.drain_s)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    if node.standing.is_whole:
        await node.checkpoint()
    if page is not None:
        page.stop()
    _logger.info("stopped", extra={"fields": {"address": address}})
    if defect is not None:
        raise defect


async def _until_stopped(stopping: asyncio.Event, running: Sequence[asyncio.Task[None]]) -> BaseException | None:
    """Wait for a signal, or for the end of a task that should never end; return what ended it."""
    stopped = asyncio.ensure_future(stopping.wait())
    await asyncio.wait([stopped, *running], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    defects = [task.exception() for task in running if task.done()]
    if not defects:
        return None
    defect = defects[0] or InternalError("a task of the server must run as long as it does; one has ended")
    _logger.critical("a defect ends this server", exc_info=defect)
    return defect


async def _keep_health(node: Node, status: health.aio.HealthServicer) -> None:
    """Let health checks know when pushes cannot be logged, and when they can again; runs until it is cancelled.

    Who balances load or watches acts on it. Clients and the other server of a pair do not: they go by what calls say.
    """
    was_failing = False
    while True:
        await asyncio.sleep(_LOOK_S)
        is_failing = node.store.ledger.failure is not None
        if is_failing != was_failing:
            await _set_health(status, "NOT_SERVING" if is_failing else "SERVING")
        was_failing = is_failing


async def _set_health(status: health.aio.HealthServicer, name: str) -> None:
    for service in ("", _NAME):
        await status.set(service, health_pb2.HealthCheckResponse.ServingStatus.Value(name))


def _listen(server: grpc.aio.Server, config: ServerConfig) -> str:
    """Bind, and return HOST:PORT as bound."""
    address = config.server.listen
    host, _ = split_address(address, "server.listen")
    credentials = server_credentials(config.security)
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise UnavailableError(
            f"a server must be able to listen; {address} is taken or not this machine's; give another"
        )
    return join_address(host, bound)


def _tell(config: ServerConfig, address: str, page: MetricsPage | None) -> None:
    fields = {
        "address": address,
        "metrics": page.address if page else None,
        "tls": config.security.certificate is not None,
        "client_certificates": config.security.client_ca is not None,
        "tokens": config.security.token_file is not None,
        "data": str(config.server.data),
        "version": __version__,
    }
    _logger.info("serving", extra={"fields": fields})
    if not is_loopback(config.server.listen) and not (fields["tls"] and fields["tokens"]):
        _logger.warning("insecure: whoever reaches %s may read and change every row", address)
