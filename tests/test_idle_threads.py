"""Threads that sleep between kernels: said before torch is loaded, unless the environment says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfdist import idle_threads

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


@pytest.mark.parametrize(
    "said_by",
    [
        "from mfdist import idle_threads; idle_threads.sleep()",
        "from mfdist.launch.cli.app import run; run(['train', '--out', 'unused'])",
        "from mfdist.launch.pulse import Post, settle; "
        "settle(Post(kind='trainer', index=0, incarnation=0, log=sys.argv[1], threads=1, silence_s=9.0))",
    ],
    ids=["itself", "mfdist train", "an actor"],
)
def test_it_is_said_before_torch_is_there(said_by: str, tmp_path: Path) -> None:
    is_so = "assert 'torch' not in sys.modules and os.environ['OMP_WAIT_POLICY'] == 'passive'"
    code = f"import os, sys; {said_by}; {is_so}"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    log = tmp_path / "log"
    ran = subprocess.run([sys.executable, "-c", code, log], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr + (log.read_text("utf-8") if log.exists() else "")
