"""Tokens and logs for tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mfdist.table_server.auth import new_token
from mfdist.table_server.ledger import Ledger


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
