"""The RPCs whose tensors travel as frames: how servers and clients say so to gRPC."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import grpc

from mfdist.table_server.frames import Frame, reader
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub, add_TableServiceServicer_to_server

if TYPE_CHECKING:
    from mfdist.table_server.service import TableService

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["TableService"]
_LOOKUP: Final = f"/{_SERVICE.full_name}/Lookup"
#: Metadata of a lookup that is one message: its answer then comes in one piece with the status.
_ONCE: Final = ("mfdist-once", "1")
_FRAMED: Final = {"Lookup": (pb.LookupRequest, pb.LookupReply), "Push": (pb.PushRequest, pb.PushReply)}


class Rpcs(TableServiceStub):
    """What a client calls: `Lookup` and `Push` take frames and yield frames, all others the generated messages."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        super().__init__(channel)  # type: ignore[no-untyped-call]
        for name, (_, reply) in _FRAMED.items():
            path = f"/{_SERVICE.full_name}/{name}"
            setattr(self, name, channel.stream_stream(path, Frame.serialized, reader(reply)))
        # A stream of one message is no other on the wire than a message, and takes gRPC half of the time.
        once = channel.unary_unary(_LOOKUP, Frame.serialized, reader(pb.LookupReply))
        self.LookupOnce = functools.partial(once, metadata=(_ONCE,))


def add_service(servicer: "TableService", server: grpc.aio.Server) -> None:
    """Let a server answer the protocol; `Lookup` and `Push` are given frames, and may answer with a message's bytes."""
    once = grpc.unary_unary_rpc_method_handler(servicer.LookupOnce, reader(pb.LookupRequest))
    server.add_generic_rpc_handlers((_Once(once),))
    add_TableServiceServicer_to_server(servicer, _Framing(server))  # type: ignore[no-untyped-call]


class _Once(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Answers lookups that say that they are one message, and leaves all else to the handlers that come after."""

    def __init__(self, handler: grpc.RpcMethodHandler) -> None:
        self._handler = handler

    def service(self, details: Any) -> Any:
        """Return the handler of a call, or None."""
        return self._handler if details.method == _LOOKUP and _ONCE in details.invocation_metadata else None


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
