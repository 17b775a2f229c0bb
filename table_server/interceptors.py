"""What stands between gRPC and the RPCs: every call is counted, traced, let in or refused, and its errors are answered.

The servicer raises errors of `mfdist.errors`; here they become the protocol's status codes. A request is parsed only
once its caller is known, has the right, and is within its limits.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from mfdist.errors import MfdistError
from mfdist.table_server.admission import Admission
from mfdist.table_server.calls import Call, Refusal, abort
from mfdist.table_server.metrics import Metrics
from mfdist.table_server.sections import LimitsConfig, Surroundings
from mfdist.table_server.status import status_of
from mfdist.table_server.traces import Spans, open_spans

_DRAIN_BYTES, _DRAIN_S, _DRAIN_PAUSE_S = 64 * 2**20, 1.0, 0.25

_logger = logging.getLogger(__name__)


def interceptors(config: Surroundings, metrics: Metrics) -> list[grpc.aio.ServerInterceptor]:
    """Return the interceptors of a server, for `grpc.aio.server(interceptors=…)`.

    Args:
        config: the sections security, limits and traces count.
        metrics: where calls are counted.

    Raises:
        ConfigError: the token file is wrong or open to others, or traces need a package that is not installed.
    """
    return [_CallInterceptor(Admission(config.security, config.limits), metrics, open_spans(config.traces))]


def server_options(limits: LimitsConfig) -> list[tuple[str, int]]:
    """Return the options of a server under these limits, for `grpc.aio.server(options=…)`.

    Messages over the limit are refused by name here; gRPC itself cuts off, unseen, what is more than twice as large.
    """
    return [
        ("grpc.max_receive_message_length", int(limits.max_message_mib * 2**21)),
        ("grpc.max_send_message_length", -1),
    ]


class _CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Answers every call through a handler whose requests are a stream, so that none is read before it is let in."""

    def __init__(self, admission: Admission, metrics: Metrics, spans: Spans | None) -> None:
        self._admission, self._metrics, self._spans = admission, metrics, spans

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Return the handler that answers this call."""
        handler = await continuation(details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = details.method

        async def answer(_: AsyncIterator[bytes], context: Any) -> bytes | None:
            # What gRPC gives to iterate over refers to itself, and so keeps each call until the collector comes by.
            call = Call(method, context.peer())
            async with self._answering(call, context):
                if handler.request_streaming:
                    argument: Any = self._requests(call, handler, context)
                else:
                    argument = await self._request(call, handler, context, await context.read())
                if not handler.response_streaming:
                    behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
                    return _serialized(call, handler, await behaviour(argument, context))
                behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
                replies = behaviour(argument, context)
                if hasattr(replies, "__aiter__"):
                    async with contextlib.aclosing(replies):
                        async for reply in replies:
                            await context.write(_serialized(call, handler, reply))
                else:  # it writes to the context itself
                    await replies
            return None

        if handler.response_streaming:
            late = Call(method, "")  # such replies count for nobody

            def serialize(reply: Any) -> bytes:
                return reply if isinstance(reply, bytes) else _serialized(late, handler, reply)

            return grpc.stream_stream_rpc_method_handler(answer, None, serialize)
        return grpc.stream_unary_rpc_method_handler(answer, None, None)

    @contextlib.asynccontextmanager
    async def _answering(self, call: Call, context: Any) -> AsyncIterator[None]:
        self._metrics.began(call.name)
        span = self._spans.begin(call.method, context.invocation_metadata()) if self._spans is not None else None
        code, answer = grpc.StatusCode.UNKNOWN, None
        try:
            with self._admission.admitting(call, context):
                yield
            code = context.code() or grpc.StatusCode.OK
        except Refusal as refusal:
            code, answer = refusal.code, (str(refusal), refusal.kind, refusal.wait_s)
            self._metrics.refused(refusal.reason)
            self._admission.log(call, refusal)
        except MfdistError as error:
            code, message, _ = status_of(error)
            answer = message, error.kind, 0.0
            if error.kind == "internal":
                _logger.exception("a defect in %s", call.name, extra={"fields": call.fields()})
        except grpc.aio.AbortError:
            code = context.code() or code
            raise
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            message = f"{call.name} failed in the server ({type(error).__name__}); its log says where"
            code, answer = grpc.StatusCode.INTERNAL, (message, "internal", 0.0)
            _logger.exception("a defect in %s", call.name, extra={"fields": call.fields()})
        finally:
            self._finish(call, code, span)
        if answer is not None:
            await _drain(context)
            await abort(context, code, *answer)

    def _finish(self, call: Call, code: grpc.StatusCode, span: Any) -> None:
        elapsed_s = time.perf_counter() - call.started_s
        self._metrics.finished(call.name, code.name, elapsed_s, call.request_bytes, call.reply_bytes)
        if self._spans is not None:
            self._spans.end(span, code.name, call)
        if _logger.isEnabledFor(logging.DEBUG):
            fields = {**call.fields(), "code": code.name, "seconds": round(elapsed_s, 6)}
            fields |= {"request_bytes": call.request_bytes, "reply_bytes": call.reply_bytes}
            _logger.debug("answered", extra={"fields": fields})

    async def _requests(self, call: Call, handler: Any, context: Any) -> AsyncIterator[Any]:
        while (data := await context.read()) is not grpc.aio.EOF:
            yield await self._request(call, handler, context, data)

    async def _request(self, call: Call, handler: Any, context: Any, data: bytes | object) -> Any:
        """Return a message that is within the limits and one of the protocol; else answer, and raise."""
        try:
            if not isinstance(data, bytes):
                raise _malformed(call, "got none, or one far over limits.max_message_mib")
            self._admission.check_size(call, len(data))
            return handler.request_deserializer(data) if handler.request_deserializer is not None else data
        except DecodeError:
            await self._refuse(call, context, _malformed(call, "got bytes that are not"))
        except Refusal as refusal:
            await self._refuse(call, context, refusal)

    async def _refuse(self, call: Call, context: Any, refusal: Refusal) -> None:
        """Answer in mid-stream, whatever the servicer makes of the exception that this raises."""
        self._metrics.refused(refusal.reason)
        self._admission.log(call, refusal)
        await _drain(context)
        await abort(context, refusal.code, str(refusal), refusal.kind, refusal.wait_s)


async def _drain(context: Any) -> None:
    """Take in what the client is still sending, within bounds, and drop it.

    gRPC's asyncio client loses a status that comes while it writes: it says INTERNAL, "Internal error from Core".
    """
    num_bytes, now = 0, asyncio.get_running_loop().time
    end = now() + _DRAIN_S
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_PAUSE_S) as patience:
            while isinstance(data := await context.read(), bytes):
                num_bytes += len(data)
                if num_bytes > _DRAIN_BYTES or now() > end:
                    return
                patience.reschedule(now() + _DRAIN_PAUSE_S)


def _malformed(call: Call, problem: str) -> Refusal:
    message = f"{call.name} needs a message as table_v1.proto has it; {problem}; compare the client's proto file"
    return Refusal("malformed", grpc.StatusCode.INVALID_ARGUMENT, message)


def _serialized(call: Call, handler: Any, reply: Any) -> bytes:
    data: bytes = handler.response_serializer(reply) if handler.response_serializer is not None else reply
    call.reply_bytes += len(data)
    return data
