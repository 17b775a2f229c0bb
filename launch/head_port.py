"""The port of a cluster's head: whether something answers there, and whether that can be Ray.

Ray itself waits for most of a minute where nothing, or something else, listens.
"""

import os
import socket

from mfdist.errors import ConfigError, UnavailableError

_ANSWER_S = 10.0
_RAY_PORT = 6379
#: What a client of HTTP/2, and so of gRPC, says first, with an empty frame of settings; a server answers with its own.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4  # the type of such a frame, its fourth byte


def check_head(address: str) -> None:
    """Raise where no Ray can be joined at an address.

    Raises:
        ConfigError: it is not HOST:PORT, or something other than Ray listens there.
        UnavailableError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f'--address must be auto or HOST:PORT of the head, such as 10.0.0.1:{_RAY_PORT}; got "{address}"'
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as connection:
            is_ray = os.environ.get("RAY_USE_TLS") == "1" or _speaks_http2(connection)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise UnavailableError(
            f"a Ray cluster must be reachable at {address}; {said}; "
            f"see whether its head runs, and its port ({_RAY_PORT}, unless ray start said another)"
        ) from None
    if not is_ray:
        raise ConfigError(
            f"Ray must listen at {address}; something else has that port; "
            "take the address that ray start --head said, or start the head with another --port"
        )


def _speaks_http2(connection: socket.socket) -> bool:
    try:
        connection.sendall(_PREFACE)
        answer = b""
        while len(answer) < 4:
            received = connection.recv(9 - len(answer))
            if not received:
                return False
            answer += received
    except (TimeoutError, ConnectionError):
        return False
    return answer[3] == _SETTINGS
