"""Threads that sleep between lookups: said to processes that begin, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

from mfdist.table_server import idle_threads

SHOW = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"


def told() -> str:
    return subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True).stdout.strip()


def test_children_that_begin_meanwhile_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with idle_threads.asleep_in_children():
        assert told() == "passive"
    assert "OMP_WAIT_POLICY" not in os.environ


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with idle_threads.asleep_in_children():
        assert told() == "active"
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def test_a_server_says_it_before_torch_is_there() -> None:
    code = (
        "import sys; from mfdist.table_server import idle_threads; idle_threads.sleep(); "
        f"assert 'torch' not in sys.modules; {SHOW}"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.stdout.strip() == "passive", ran.stderr
