"""OpenTelemetry spans of requests, where a collector is configured; the only module that imports opentelemetry."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mfdist.errors import ConfigError
from mfdist.table_server.calls import Call
from mfdist.table_server.sections import TracesConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_BAD = ("UNKNOWN", "INTERNAL", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED")  # a server's errors


class Spans:
    """Makes a span of each request that is sampled, as a child of the caller's where its metadata has `traceparent`.

    Spans leave in the background, in batches; where the collector does not answer, they are dropped.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("mfdist.table_server")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Any:
        """Return the span of a call that arrived."""
        from opentelemetry.trace import SpanKind

        carrier = {key: value for key, value in metadata or () if key in ("traceparent", "tracestate")}
        service, _, name = method.removeprefix("/").partition("/")
        return self._tracer.start_span(
            f"{service}/{name}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )

    def end(self, span: Any, code: str, call: Call) -> None:
        """End a call's span."""
        from opentelemetry.trace import StatusCode

        if span.is_recording():
            span.set_attribute("rpc.response.status_code", code)
            span.set_attribute("mfdist.request_bytes", call.request_bytes)
            span.set_attribute("mfdist.reply_bytes", call.reply_bytes)
            if call.client is not None:
                span.set_attribute("mfdist.client", call.client.name)
            if code in _BAD:
                span.set_status(StatusCode.ERROR, code)
        span.end()

    def close(self) -> None:
        """Send what is left; waits at most a few seconds."""
        self._provider.shutdown()


def open_spans(config: TracesConfig) -> Spans | None:
    """Return what makes spans; None where no collector is configured.

    Raises:
        ConfigError: opentelemetry is not installed.
    """
    if not config.endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError:
        raise ConfigError(
            f'traces.endpoint needs opentelemetry; got "{config.endpoint}" and no package; pip install "mfdist[traces]"'
        ) from None
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
        resource=Resource.create({"service.name": config.service_name}),
    )
    exporter = OTLPSpanExporter(endpoint=config.endpoint, insecure=not config.endpoint.startswith("https://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Spans(provider)
