"""Spans that arrive at a real collector: a gRPC server with OpenTelemetry's own protocol."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.sections import TracesConfig
from tests.table_server.served import Config, serving, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:
        with self._lock:
            for group in request.resource_spans:
                service = {item.key: item.value.string_value for item in group.resource.attributes}["service.name"]
                self.spans += [(service, span) for scope in group.scope_spans for span in scope.spans]
        return ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[str, Collector]]:
    collecting = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collecting, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", collecting
    server.stop(0).wait(10)


def test_spans_arrive_under_the_callers(collector: tuple[str, Collector]) -> None:
    endpoint, collecting = collector
    # The caller's own decision goes before ours, which is to trace nothing.
    traces = TracesConfig(endpoint=endpoint, sample_ratio=0.0, service_name="tables-7")
    with serving(Config(traces=traces)) as served, grpc.insecure_channel(served.address) as channel:
        stub = TableServiceStub(channel)  # type: ignore[no-untyped-call]
        for flag in ("00", "01"):
            metadata = (("traceparent", f"00-{TRACE}-{PARENT}-{flag}"), ("authorization", "Bearer s3cr3t"))
            stub.Describe(pb.DescribeRequest(), metadata=metadata, timeout=10)
            with pytest.raises(grpc.RpcError):
                stub.Drop(pb.DropRequest(table="defect"), metadata=metadata, timeout=10)
        stub.Describe(pb.DescribeRequest(), timeout=10)
        until(lambda: len(collecting.spans) >= 2, deadline_s=30)
    assert len(collecting.spans) == 2
    for service, span in collecting.spans:
        attributes = {item.key: item.value.string_value or item.value.int_value for item in span.attributes}
        assert service == "tables-7"
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
        assert attributes["rpc.service"] == "mfdist.table.v1.TableService"
        assert span.end_time_unix_nano >= span.start_time_unix_nano
        assert "s3cr3t" not in str(span)
    codes = {span.name.rpartition("/")[2]: span.status.code for _, span in collecting.spans}
    assert codes == {"Describe": 0, "Drop": 2}


def test_without_a_collector_nothing_of_opentelemetry_is_loaded() -> None:
    code = (
        "import sys\n"
        "from mfdist.table_server.interceptors import interceptors\n"
        "from mfdist.table_server.metrics import Metrics, Observed\n"
        "from tests.table_server.served import Config\n"
        "interceptors(Config(), Metrics(Observed()))\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
