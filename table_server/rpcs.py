"""The RPCs whose tensors travel as frames: how servers and clients say so to gRPC."""

from collections.abc import Callable
from typing import Any, Final

import grpc

from mfdist.table_server.frames import Frame, reader
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import (
    TableServiceServicer,
    TableServiceStub,
    add_TableServiceServicer_to_server,
)

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["TableService"]
_FRAMED: Final = {"Lookup": (pb.LookupRequest, pb.LookupReply), "Push": (pb.PushRequest, pb.PushReply)}


class Rpcs(TableServiceStub):
    """What a client calls: `Lookup` and `Push` take frames and yield frames, all others the generated messages."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        super().__init__(channel)  # type: ignore[no-untyped-call]
        for name, (_, reply) in _FRAMED.items():
            path = f"/{_SERVICE.full_name}/{name}"
            setattr(self, name, channel.stream_stream(path, Frame.serialized, reader(reply)))
        # A stream of one message is no other on the wire than a message, and takes gRPC half of the time.
        path = f"/{_SERVICE.full_name}/Lookup"
        self.LookupOnce = channel.unary_unary(path, Frame.serialized, reader(pb.LookupReply))


def add_service(servicer: TableServiceServicer, server: grpc.aio.Server) -> None:
    """Let a server answer the protocol; `Lookup` and `Push` are given frames, and may answer with a message's bytes."""
    add_TableServiceServicer_to_server(servicer, _Framing(server))  # type: ignore[no-untyped-call]


class _Framing:
    """A server as the generated code sees it, which knows no other messages than its own."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Leave it to the next."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Add the service."""
        framed = {
            name: grpc.stream_stream_rpc_method_handler(
                handlers[name].stream_stream, reader(request), _serialized(handlers[name].response_serializer)
            )
            for name, (request, _) in _FRAMED.items()
        }
        generic = grpc.method_handlers_generic_handler(service, handlers | framed)
        self._server.add_generic_rpc_handlers((generic,))


def _serialized(serializer: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    return lambda reply: reply if isinstance(reply, bytes) else serializer(reply)
