"""Tokens, logs, and a server with a client of raw messages, for tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mfdist.table_server.auth import new_token
from mfdist.table_server.ledger import Ledger
from tests.table_server.processes import ServerProcess, server
from tests.table_server.raw_client import RawClient, table_names


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """Return name → token of a file `tokens.toml` in the test's folder."""
    path = tmp_path / "tokens.toml"
    return {
        "reader": new_token(path, "reader", ["read"]),
        "trainer": new_token(path, "trainer", ["read", "push"]),
        "admin": new_token(path, "admin", ["read", "push", "admin"]),
    }


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger")
    yield ledger
    ledger.close()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the module's tests."""
    with server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(process: ServerProcess) -> Iterator[RawClient]:
    """The one client of that server, joined."""
    made = RawClient(process.address)
    made.join()
    yield made
    made.channel.close()


@pytest.fixture
def table(client: RawClient) -> str:
    """The name of a table made for a test."""
    name = next(table_names)
    client.create(name)
    return name
