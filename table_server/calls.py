"""One call of an RPC, from its arrival to its end, whatever its kind."""

import functools
import time
import urllib.parse
from typing import Any

import grpc

from mfdist.table_server.auth import SERVICE, Client
from mfdist.table_server.status import KIND_KEY

_MAX_MESSAGE_CHARS = 1000  # of a status: it travels as a header, and headers have limits
_END_CHARS = 200  # of a longer one that are kept: what to do


class Refusal(Exception):
    """A call is turned away before it is looked at.

    Args:
        reason: the word that metrics have for it.
        code: the status it is answered with.
        message: one line, without secrets.
        kind: the error's kind, as in `mfdist.errors`.
        wait_s: when to try again; 0: not at all, or at any time.
        is_new: whether it is worth a line in the log.
    """

    def __init__(
        self,
        reason: str,
        code: grpc.StatusCode,
        message: str,
        *,
        kind: str = "config",
        wait_s: float = 0.0,
        is_new: bool = True,
    ) -> None:
        super().__init__(message)
        self.reason, self.code, self.kind, self.wait_s, self.is_new = reason, code, kind, wait_s, is_new


class Call:
    """What is known of one call.

    Args:
        method: /service/name, as it arrived.
        peer: the other end, as gRPC writes it.
    """

    __slots__ = ("client", "host", "method", "name", "reply_bytes", "request_bytes", "started_s")

    def __init__(self, method: str, peer: str) -> None:
        service, _, name = method.removeprefix("/").partition("/")
        self.method = method
        self.name = name if service == SERVICE else f"{service}/{name}"
        self.host = host_of(peer)
        self.client: Client | None = None
        self.request_bytes = self.reply_bytes = 0
        self.started_s = time.perf_counter()

    def fields(self) -> dict[str, Any]:
        """Return what a line of the log says of it."""
        return {"method": self.name, "client": self.client.name if self.client else None, "host": self.host}


@functools.lru_cache(maxsize=1024)  # a connection's calls all have the same
def host_of(peer: str) -> str:
    """Return the host of a peer such as `ipv4:10.0.0.7:4411` or `ipv6:%5B::1%5D:4411`; unix sockets are one host."""
    family, _, address = urllib.parse.unquote(peer).partition(":")
    return address.rpartition(":")[0].strip("[]") if family in ("ipv4", "ipv6") else family


async def abort(context: Any, code: grpc.StatusCode, message: str, kind: str, wait_s: float = 0.0) -> None:
    """End the call with a status, its kind in the trailing metadata, and when to try again; raises."""
    trailing: tuple[tuple[str, str], ...] = ((KIND_KEY, kind),)
    if wait_s:
        trailing += (("grpc-retry-pushback-ms", str(max(1, round(wait_s * 1000)))),)  # gRPC's clients heed it
    if len(message) > _MAX_MESSAGE_CHARS:
        message = f"{message[: _MAX_MESSAGE_CHARS - _END_CHARS]} … {message[-_END_CHARS:]}"
    await context.abort(code, message, trailing)
