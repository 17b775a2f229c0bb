"""Addresses to listen on, and which of them anyone but this machine can reach."""

import ipaddress

from mfdist.errors import ConfigError
from mfdist.table_server.sections import SecurityConfig


def split_address(address: str, what: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT` or `[IPV6]:PORT`; `what` names it in messages.

    Raises:
        ConfigError: it is no such address.
    """
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address without brackets: its end may be a port or not
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f'{what} must be HOST:PORT, such as 127.0.0.1:0 or [::1]:7400; got "{address}"')
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """Return host and port as one address, the reverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str, what: str = "an address") -> bool:
    """Return whether only this machine can reach `address`: HOST:PORT with a loopback host, or unix:PATH.

    Raises:
        ConfigError: it is neither; `what` names it in the message.
    """
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host, _ = split_address(address, what)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name; whatever it means today


def check_exposure(address: str, security: SecurityConfig, what: str = "the address") -> None:
    """Allow loopback to all; any other address with a certificate and tokens, or where `insecure` says so.

    Raises:
        ConfigError: it is not allowed; nothing was listened on.
    """
    if is_loopback(address, what) or security.insecure:
        return
    missing = [
        name
        for name, value in (("certificate", security.certificate), ("token_file", security.token_file))
        if value is None
    ]
    if missing:
        lacking = " and ".join(f"security.{name}" for name in missing)
        raise ConfigError(
            f"{what} must be loopback, or have TLS and tokens; got {address} without {lacking}; "
            "make them with mfdist serve --init-tls DIR, or give --insecure where everyone on that network is trusted"
        )
