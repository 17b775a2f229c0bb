"""Real runs of the command line on a little text: in processes of their own where that matters, else in this one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfdist.launch.cli import app

TINY = Path(__file__).parents[1] / "tiny.toml"
COMMAND = [sys.executable, "-c", "from mfdist.launch.cli import main; main()"]
DEADLINE_S = 120
_UNUSUAL = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "PYTHONUNBUFFERED")


def environment(cache: Path) -> dict[str, str]:
    """Return an environment without this machine's settings for streams, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in _UNUSUAL}
    root = Path(__file__).parents[3]  # the tests also run where mfdist is not installed
    return {
        **kept,
        "PYTHONPATH": str(root),
        "XDG_CACHE_HOME": str(cache),
        "TERM": "xterm-256color",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with text in it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text").mkdir()
    for number in range(20):
        words = " ".join(f"word{(number * 7 + index * index) % 50}" for index in range(200))
        (folder / "text" / f"{number:02d}.txt").write_text(f"Document {number}. {words}\n", "utf-8")
    return folder


@pytest.fixture
def mfdist(workplace, monkeypatch, capsys):
    """Runs the command in this process, where torch is loaded once; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()

    def run(*arguments):
        code = app.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    signal.signal(signal.SIGTERM, before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def new_run(workplace):
    """The arguments that begin a tiny run."""

    def arguments(out, *more):
        return ["train", str(TINY), "--out", str(out), "--set", f"data.source={workplace / 'text'}", *map(str, more)]

    return arguments


@pytest.fixture(scope="session")
def finished(workplace, new_run):
    """A finished run, its JSON summary, and what its process wrote on stderr."""
    command = [*COMMAND, *new_run("finished run", "--json")]
    settings = {"cwd": workplace, "env": environment(workplace / "cache"), "timeout": DEADLINE_S}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stderr
    return workplace / "finished run", json.loads(done.stdout), done.stderr
