"""What a server counts, and the page on which Prometheus reads it.

`Stats` answers with the same samples under the same names, so that whoever has a channel needs no second port.
"""

import logging
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import make_wsgi_app
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mfdist.errors import UnavailableError
from mfdist.table_server.addresses import check_exposure, join_address, split_address
from mfdist.table_server.auth import Tokens, bearer_token
from mfdist.table_server.sections import MetricsConfig, SecurityConfig

_BUCKETS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REPLY_DEADLINE_S = 10.0

_logger = logging.getLogger(__name__)


class TableFigures(NamedTuple):
    """One table as a server holds it."""

    name: str
    version: int  # updates so far
    num_rows: int  # of the shard held here
    num_bytes: int  # of its rows and optimiser state
    row_hits: int  # rows read or updated since the start
    saved_version: int  # the version that the last checkpoint has
    replica_lag: int = 0  # updates that the replica has not acknowledged


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What only the server knows, asked when somebody looks. Called from any thread; must not block."""

    tables: Callable[[], Iterable[TableFigures]] = tuple
    queue_depth: Callable[[], float] = lambda: 0.0  # requests that wait for a kernel thread
    log_bytes: Callable[[], float] = lambda: 0.0  # on disk, and in no checkpoint
    log_pending_bytes: Callable[[], float] = lambda: 0.0  # accepted, not yet on disk
    checkpoint_age_s: Callable[[], float] = lambda: 0.0  # since the last checkpoint, or the start
    failing: Callable[[], Mapping[str, bool]] = dict  # log, checkpoint → whether the last attempt to write it failed
    epoch: Callable[[], float] = lambda: 0.0
    role: Callable[[], str] = lambda: "single"  # or primary, alone (a primary), replica, copying (a replica)


class Metrics:
    """The figures of one server, in a registry of its own. Counting is cheap and may be done in any thread.

    Args:
        observed: the server's own figures.
    """

    def __init__(self, observed: Observed) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._requests = Counter(
            "mfdist_requests", "Requests answered, by status code.", ["method", "code"], registry=self.registry
        )
        self._seconds = Histogram(
            "mfdist_request_seconds",
            "From a request's arrival to the end of its answer.",
            ["method"],
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "mfdist_requests_in_flight", "Requests that are being answered.", ["method"], registry=self.registry
        )
        self._request_bytes = Counter(
            "mfdist_request_bytes", "Bytes of requests' messages.", ["method"], registry=self.registry
        )
        self._reply_bytes = Counter(
            "mfdist_reply_bytes", "Bytes of answers' messages.", ["method"], registry=self.registry
        )
        self._refusals = Counter(
            "mfdist_refusals",
            "Requests that were turned away, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self._children: dict[str, _OfMethod] = {}
        self.registry.register(_Asked(observed))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def began(self, method: str) -> None:
        """Count a request that arrived; `finished` must follow."""
        self._of(method).in_flight.inc()

    def finished(self, method: str, code: str, elapsed_s: float, request_bytes: int, reply_bytes: int) -> None:
        """Count a request's end, with the name of its status code and the bytes of its messages."""
        children = self._of(method)
        children.in_flight.dec()
        self._requests.labels(method, code).inc()
        children.seconds.observe(elapsed_s)
        children.request_bytes.inc(request_bytes)
        children.reply_bytes.inc(reply_bytes)

    def _of(self, method: str) -> "_OfMethod":
        """Return a method's children; looking them up one by one is what counting would spend most of its time on."""
        children = self._children.get(method)
        if children is None:
            children = self._children[method] = _OfMethod(
                self._in_flight.labels(method),
                self._seconds.labels(method),
                self._request_bytes.labels(method),
                self._reply_bytes.labels(method),
            )
        return children

    def refused(self, reason: str) -> None:
        """Count a refusal: token, right, rate, in_flight, size or malformed."""
        self._refusals.labels(reason).inc()

    def samples(self) -> dict[str, float]:
        """Return every sample by name and labels, as the page has it: `mfdist_refusals_total{reason="token"}`."""
        return {
            _sample_name(sample.name, sample.labels): float(sample.value)
            for family in self.registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }


class MetricsPage:
    """Serves the figures over HTTP on a port of its own, in threads of its own, until `stop`.

    Args:
        metrics: what it shows.
        config: where it listens.
        security: the server's; the same certificate and tokens guard this port where it is not loopback. A token needs
            the right to read.

    Raises:
        ConfigError: the address is no address, or may not be listened on like this.
        UnavailableError: it is taken.
    """

    def __init__(self, metrics: Metrics, config: MetricsConfig, security: SecurityConfig) -> None:
        check_exposure(config.listen, security, "metrics.listen")
        host, port = split_address(config.listen, "metrics.listen")
        is_guarded = security.token_file is not None and not security.insecure
        tokens = Tokens(security.token_file) if is_guarded and security.token_file else None
        try:
            self._server = make_server(
                host, port, _guarded(make_wsgi_app(metrics.registry), tokens), _Server, handler_class=_Handler
            )
        except OSError as error:
            raise UnavailableError(
                f"metrics.listen must be free; {config.listen}: {error.strerror}; choose another port"
            ) from None
        if security.certificate is not None and security.private_key is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(security.certificate, security.private_key)
            # Handshakes are left to the threads that answer: a caller that is silent holds up nobody else.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.address = join_address(host, self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the port; calling it again does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_REPLY_DEADLINE_S)


class _OfMethod(NamedTuple):
    in_flight: Gauge
    seconds: Histogram
    request_bytes: Counter
    reply_bytes: Counter


class _Asked(Collector):
    """Gauges of what the server knows, asked at each look."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def collect(self) -> Iterator[Metric]:
        seen = self._observed
        for name, about, ask in (
            ("mfdist_queue_depth", "Requests that wait for a kernel thread.", seen.queue_depth),
            ("mfdist_log_bytes", "Bytes of the log that no checkpoint has.", seen.log_bytes),
            ("mfdist_log_pending_bytes", "Bytes accepted and not yet on disk.", seen.log_pending_bytes),
            ("mfdist_checkpoint_age_seconds", "Since the last checkpoint, or the start.", seen.checkpoint_age_s),
            ("mfdist_epoch", "The server's epoch.", seen.epoch),
        ):
            yield GaugeMetricFamily(name, about, value=ask())
        failing = GaugeMetricFamily("mfdist_failing", "1 of what cannot be written to disk.", labels=["what"])
        for what, is_failing in seen.failing().items():
            failing.add_metric([what], float(is_failing))
        role = GaugeMetricFamily("mfdist_role", "1 of what the server is in its pair.", labels=["role"])
        role.add_metric([seen.role()], 1)
        version = GaugeMetricFamily("mfdist_table_version", "Updates so far.", labels=["table"])
        lag = GaugeMetricFamily("mfdist_table_checkpoint_lag", "Updates that no checkpoint has.", labels=["table"])
        behind = GaugeMetricFamily(
            "mfdist_table_replica_lag", "Updates that the replica has not acknowledged.", labels=["table"]
        )
        rows = GaugeMetricFamily("mfdist_table_rows", "Rows held here.", labels=["table"])
        size = GaugeMetricFamily("mfdist_table_bytes", "Bytes of rows and optimiser state.", labels=["table"])
        hits = CounterMetricFamily("mfdist_row_hits", "Rows read or updated.", labels=["table"])
        for table in seen.tables():
            label = [table.name]
            version.add_metric(label, table.version)
            lag.add_metric(label, table.version - table.saved_version)
            behind.add_metric(label, table.replica_lag)
            rows.add_metric(label, table.num_rows)
            size.add_metric(label, table.num_bytes)
            hits.add_metric(label, table.row_hits)
        yield from (failing, role, version, lag, behind, rows, size, hits)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 16

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line what the socket server would print as a traceback: a caller went away, or spoke no TLS."""
        _logger.info("a look at the metrics failed", exc_info=_logger.isEnabledFor(logging.DEBUG))


class _Handler(WSGIRequestHandler):
    timeout = _REPLY_DEADLINE_S  # of a read: a caller that is silent is let go

    def log_message(self, format: str, *args: Any) -> None:
        _logger.debug("metrics: %s", args[0] if args else format)

    def address_string(self) -> str:
        return str(self.client_address[0])


def _guarded(app: Callable[..., Any], tokens: Tokens | None) -> Callable[..., Any]:
    """Return the page behind a token with the right to read; the page itself where there are no tokens."""
    if tokens is None:
        return app

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        token = bearer_token([("authorization", environ.get("HTTP_AUTHORIZATION", ""))])
        client = tokens.client_of(token) if token is not None else None
        if client is None or "read" not in client.rights:
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
            return [b"a token with the right to read is needed\n"]
        return app(environ, start_response)

    return guarded


_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def _sample_name(name: str, labels: dict[str, str]) -> str:
    if not labels:
        return name
    inner = ",".join(f'{key}="{value.translate(_ESCAPES)}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inner}}}"
