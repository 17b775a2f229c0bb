"""An address where no Ray can be joined is told at once, with what is there instead."""

import http.server
import re
import socket
import threading
from collections.abc import Iterator

import grpc
import pytest

from mfdist.errors import ConfigError, UnavailableError
from mfdist.launch.head_port import check_head


@pytest.fixture
def website() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("address", ["", "nowhere", "10.0.0.1", "10.0.0.1:", "10.0.0.1:ray"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f'HOST:PORT of the head, such as 10.0.0.1:6379; got "{address}"')):
        check_head(address)


def test_a_port_where_nothing_listens_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UnavailableError, match=f"must be reachable at {address}; Connection refused; see whether"):
        check_head(address)
    with pytest.raises(UnavailableError, match=r"must be reachable at no\.such\.host\.invalid:1"):
        check_head("no.such.host.invalid:1")


def test_a_port_that_something_else_has_is_told(website: int) -> None:
    with pytest.raises(ConfigError, match=f"Ray must listen at 127.0.0.1:{website}; something else has that port"):
        check_head(f"127.0.0.1:{website}")


def test_a_port_that_closes_or_is_silent_is_not_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfdist.launch.head_port._ANSWER_S", 0.3)
    says = pytest.raises(ConfigError, match="something else has that port")
    with socket.create_server(("127.0.0.1", 0)) as silent, says:
        check_head(f"127.0.0.1:{silent.getsockname()[1]}")


def test_grpc_is_taken_for_ray() -> None:
    server = grpc.server(None)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        check_head(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait(30)
