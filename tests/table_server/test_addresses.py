"""Which addresses are loopback, and what the others need."""

from pathlib import Path

import pytest

from mfdist.errors import ConfigError
from mfdist.table_server.addresses import check_exposure, is_loopback, join_address, split_address
from mfdist.table_server.sections import SecurityConfig

WITH_TLS = {"certificate": Path("s.pem"), "private_key": Path("s.key")}


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("[::1]:7400", "::1", 7400),
        ("a.example.org:65535", "a.example.org", 65535),
    ],
)
def test_addresses_are_split_and_joined(address: str, host: str, port: int) -> None:
    assert split_address(address, "x") == (host, port)
    assert join_address(host, port) == address


@pytest.mark.parametrize("address", ["", "localhost", ":80", "::1:80", "host:", "host:http", "host:65536", "host:-1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="listen must be HOST:PORT"):
        split_address(address, "listen")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/tmp/x.sock"])
def test_loopback_is_open_to_all(address: str) -> None:
    assert is_loopback(address)
    check_exposure(address, SecurityConfig())


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.7:1", "a.example.org:1", "localhost.org:1"])
def test_other_addresses_need_tls_and_tokens_or_an_explicit_word(address: str) -> None:
    assert not is_loopback(address)
    token_file = Path("t.toml")
    for given, lacking in (
        ({}, "without security.certificate and security.token_file;"),
        (WITH_TLS, "without security.token_file;"),
        ({"token_file": token_file}, "without security.certificate;"),
    ):
        with pytest.raises(ConfigError, match=lacking):
            check_exposure(address, SecurityConfig.model_validate(given))
    check_exposure(address, SecurityConfig.model_validate({**WITH_TLS, "token_file": token_file}))
    check_exposure(address, SecurityConfig(insecure=True))
