"""The client's side of a connection: plain to loopback; TLS, a token and a certificate of its own elsewhere."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
from pydantic import Field, model_validator

from mfdist.errors import ConfigError
from mfdist.table_server.addresses import is_loopback
from mfdist.table_server.auth import read_secret
from mfdist.table_server.certificates import valid_until
from mfdist.table_server.sections import Section
from mfdist.table_server.tls import read_public

_MAX_MESSAGE_BYTES = 16 * 2**20  # as the protocol has it


class ChannelConfig(Section):
    """How a client reaches its servers."""

    token_file: Path | None = Field(
        default=None, description="file with the token alone; others must not be able to read it"
    )
    ca: Path | None = Field(default=None, description="PEM of the authority of the servers' certificates; turns TLS on")
    certificate: Path | None = Field(default=None, description="this client's certificate, PEM, for mutual TLS")
    private_key: Path | None = Field(default=None, description="its key, PEM; others must not be able to read it")
    server_name: str = Field(
        default="", description="name in the server's certificate, where it is not that of the address"
    )
    insecure: bool = Field(default=False, description="talk to any address without TLS")

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key must be given together; got one of them; add the other")
        if self.certificate is not None and self.ca is None:
            raise ValueError("certificate needs ca, the authority of the servers' certificates; add it")
        return self


def client_channel(
    address: str, config: ChannelConfig | None = None, options: Sequence[tuple[str, Any]] = ()
) -> grpc.aio.Channel:
    """Return a channel to a server; it connects at the first call. Called in a running event loop.

    Args:
        address: HOST:PORT, or unix:PATH.
        config: what to show and whom to trust; by default nothing and nobody, which loopback allows.
        options: gRPC's own channel options, which go before the ones chosen here.

    Raises:
        ConfigError: the address is not loopback and there is no `ca`; a file cannot be read, or others may read a
            secret; a certificate is not valid now.
    """
    config = config or ChannelConfig()
    check_reachable(address, config)
    token = _token(config.token_file) if config.token_file is not None else None
    chosen: dict[str, Any] = {
        "grpc.max_receive_message_length": _MAX_MESSAGE_BYTES,
        "grpc.max_send_message_length": -1,
    }
    if config.ca is None:
        extra = _token_interceptors(token) if token is not None else None
        return grpc.aio.insecure_channel(address, options=[*(chosen | dict(options)).items()], interceptors=extra)
    if config.server_name:
        chosen["grpc.ssl_target_name_override"] = config.server_name
    credentials = _credentials(config, config.ca)
    if token is not None:
        credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
    return grpc.aio.secure_channel(address, credentials, options=[*(chosen | dict(options)).items()])


def check_reachable(address: str, config: ChannelConfig, what: str = "an address") -> None:
    """Allow loopback to all, any other address with the authority of its certificate.

    Args:
        address: of a server.
        config: how it is to be reached.
        what: what messages call the address.

    Raises:
        ConfigError: it is none, or neither loopback nor secured.
    """
    if config.ca is not None or is_loopback(address, what):
        return
    if not config.insecure:
        raise ConfigError(
            f"a server must be reached by TLS unless it is on loopback; got {address} without ca; "
            "give the PEM file of its authority, or insecure where nobody listens on that network"
        )
    if config.token_file is not None:
        raise ConfigError(f"a token must not travel in the clear; got {address} without ca; give ca, or no token")


def _credentials(config: ChannelConfig, ca: Path) -> grpc.ChannelCredentials:
    roots = read_public(ca)
    valid_until(roots, ca)
    if config.certificate is None or config.private_key is None:
        return grpc.ssl_channel_credentials(roots)
    chain = read_public(config.certificate)
    valid_until(chain, config.certificate)
    return grpc.ssl_channel_credentials(roots, read_secret(config.private_key, "the private key"), chain)


def _token(path: Path) -> str:
    try:
        token = read_secret(path, "the token file").decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(f"the token file must hold one token and nothing else; {path} does not; check the path")
    return token


def _token_interceptors(token: str) -> list[grpc.aio.ClientInterceptor]:
    """Return what adds the token to calls of a plain channel: gRPC's own credentials want TLS. One for each kind."""

    def with_token(details: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add("authorization", f"Bearer {token}")
        return details._replace(metadata=metadata)

    async def intercept(
        self: Any, continuation: Callable[[Any, Any], Awaitable[Any]], details: Any, request: Any
    ) -> Any:
        return await continuation(with_token(details), request)

    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    found = []
    for kind in kinds:
        words = kind.title().replace("_", "")
        base = getattr(grpc.aio, f"{words}ClientInterceptor")
        found.append(type(f"_Token{words}", (base,), {f"intercept_{kind}": intercept})())
    return found
