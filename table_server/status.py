"""Errors as gRPC statuses, and back: one table for both, `mfdist.errors.OUTCOMES`."""

import grpc

from mfdist.checkpoint.series import NotSavedError
from mfdist.errors import OUTCOMES, ConfigError, InternalError, MfdistError, UnavailableError

#: Trailing metadata that carries an error's kind.
KIND_KEY = "mfdist-error"

#: What gRPC itself says where a connection ends in the middle of a call. Of what a server says, it gives the kind.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


class UnknownTableError(ConfigError):
    """A server has no shard of this table."""


def status_of(error: MfdistError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Return code, message and trailing metadata of an error."""
    name = "NOT_FOUND" if isinstance(error, UnknownTableError | NotSavedError) else OUTCOMES[error.kind][1]
    return grpc.StatusCode[name], str(error), ((KIND_KEY, error.kind),)


def is_said(error: grpc.RpcError) -> bool:
    """Return whether a failed call was answered by its server, and did not fail on the way there or back."""
    return any(key == KIND_KEY for key, _ in error.trailing_metadata() or ())


def error_of(error: grpc.RpcError, server: str) -> MfdistError:
    """Return what a failed call means, as the error its server raised or the nearest one.

    Args:
        error: as grpc raises it.
        server: its address, for the message.
    """
    code, details = error.code(), " ".join(str(error.details() or "").split())
    kinds = [value for key, value in error.trailing_metadata() or () if key == KIND_KEY]
    said = f"{details} (server {server})"
    if kinds:
        return _class_of(kinds[0])(said)
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return ConfigError(said)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(
            f"server {server} must answer before the deadline; it did not; see whether it is overloaded"
        )
    if code in _BROKEN:
        return UnavailableError(f"server {server} must be reachable; got: {details or code.name}; see whether it runs")
    return InternalError(f"server {server} failed with {code.name}: {details}")


def _class_of(kind: str) -> type[MfdistError]:
    classes: list[type[MfdistError]] = [MfdistError]
    for known in classes:
        classes += known.__subclasses__()
    return next((known for known in reversed(classes) if vars(known).get("kind") == kind), InternalError)
