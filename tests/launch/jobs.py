"""Launched jobs for tests: real Ray clusters of this machine, ended by their processes' numbers whatever happens."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch

from mfdist.config import RunConfig, parse_config
from mfdist.launch.job import JobFiles
from mfdist.launch.local_cluster import end_local, is_head_alive
from mfdist.training.checkpointed import load_run_model
from mfdist.training.metrics import read_metrics
from mfdist.training.run import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 240.0

TOML = """
[model]
num_layers = 1
hidden_dim = 32
num_heads = 2
bits = 4
max_seq_len = 64
[data]
source = "{source}"
tokenizer = "bytes"
validation_fraction = 0.2
cache_dir = "{cache}"
[optimizer.dense]
lr = 5e-3
schedule = "constant"
warmup_fraction = 0.0
[optimizer.tables]
rule = "adam"
schedule = "constant"
warmup_fraction = 0.0
[training]
steps = {steps}
batch_size = 4
seq_len = 16
device = "cpu"
eval_every = 1000
eval_sequences = 4
sample_prompt = ""
[checkpoint]
every = {every}
[servers]
kind = "whole"
deadline_s = 120
[launch]
silence_s = 30
"""


def config_file(folder: Path, *, steps: int, every: int) -> Path:
    """Return a configuration over a folder of text, which is written once."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for number in range(8):
            (text / f"{number}.txt").write_text(f"Rows are looked up, {number} of them, and summed. " * 20)
    path = folder / f"{steps}-{every}.toml"
    path.write_text(TOML.format(source=text, cache=folder / "cache", steps=steps, every=every))
    return path


def config_of(path: Path, *overrides: str) -> RunConfig:
    return parse_config(path.read_text(), origin=str(path), overrides=overrides)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}


def mfdist(*arguments: object, deadline_s: float = DEADLINE_S) -> "subprocess.CompletedProcess[str]":
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "mfdist", *map(str, arguments)]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=deadline_s)


def begin(*arguments: object, log: Path) -> "subprocess.Popen[bytes]":
    """Start the command, in a group of its own as a shell would, and come back."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's is handed down
    try:
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "mfdist", *map(str, arguments)],
                env=environment(),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def ended_afterwards(run: Path) -> Iterator[JobFiles]:
    """Give the files of a run's jobs; end the last one's cluster at the end, and see that nothing is left."""
    files = JobFiles(run.absolute())
    try:
        yield files
    finally:
        if (files.folder / "job.json").exists():
            end_local(files.read_job().cluster)
    if (files.folder / "job.json").exists():
        assert_nothing_left(files)


def assert_nothing_left(files: JobFiles) -> None:
    cluster = files.read_job().cluster
    assert not is_head_alive(cluster)
    assert not Path(cluster.temp_dir).exists()
    left = [process for process in psutil.process_iter() if is_of(process, cluster.head_pid)]
    assert left == []
    assert [path for path in Path("/dev/shm").iterdir() if str(cluster.head_pid) in path.name] == []


@dataclass(frozen=True)
class Held:
    """What a running job of a local cluster has taken of the machine."""

    ports: frozenset[tuple[str, int]]
    shared: frozenset[Path]  # files in shared memory

    def assert_free(self) -> None:
        for address in self.ports:
            with pytest.raises(ConnectionError), socket.create_connection(address, timeout=10):
                pass
        assert [path for path in self.shared if path.exists()] == []


def held_by(files: JobFiles) -> Held:
    """Return what a job holds now: where its processes listen, what they map or have open in shared memory."""
    ports, shared = set[tuple[str, int]](), set[Path]()
    for process in psutil.process_iter():
        if not is_of(process, files.read_job().cluster.head_pid):
            continue
        with contextlib.suppress(OSError, psutil.Error):
            listening = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
            ports |= {(_reachable(each.laddr.ip), each.laddr.port) for each in listening}
            opened = [str(fd.readlink()) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
            words = [*Path(f"/proc/{process.pid}/maps").read_text().split(), *opened]
            shared |= {Path(word) for word in words if word.startswith("/dev/shm/")}
    return Held(frozenset(ports), frozenset(shared))


def _reachable(ip: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ip, ip)


def is_of(process: psutil.Process, session: int) -> bool:
    """Return whether a process is of a session and lives; dead ones wait for a parent that may never ask."""
    with contextlib.suppress(OSError, psutil.Error):
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_running(pid: int | None) -> bool:
    with contextlib.suppress(psutil.Error):
        return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def until(holds: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, f"it never came true: {what}"
        time.sleep(0.02)


def pid_of(files: JobFiles, actor: str) -> int:
    """Wait until an actor is known, and return its process."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = [each["pid"] for each in files.read_state().get("actors", ()) if each["name"] == actor]
        return bool(found and found[0])

    until(is_there, f"{actor} runs")
    return found[0]


def actors_of(files: JobFiles, kind: str = "") -> list[dict[str, Any]]:
    """Return what is known of a job's actors, or of those of one kind."""
    return [actor for actor in files.read_state().get("actors", ()) if actor["name"].startswith(kind)]


def hosts_of(files: JobFiles, kind: str) -> dict[str, str]:
    return {actor["name"]: actor["host"] for actor in actors_of(files, kind)}


def hold_until_whole(files: JobFiles, process: "subprocess.Popen[bytes]", lost: str = "") -> str:
    """Let training stand still until a pair of servers has both of them, one following the other, none on a host.

    What is known of actors may be a second old, so their processes are looked at as well. Returns the primary's name.
    """
    named = dict[str, str]()

    def is_whole() -> bool:
        servers = actors_of(files, "server")
        are_up = all(
            _is_running(each["pid"]) and each["state"] == "serving" and each["host"] != lost for each in servers
        )
        named.clear()
        named.update({str(each["role"]): each["name"] for each in servers})
        return are_up and named.keys() == {"primary", "replica"}

    kill(files, "trainer-0", signal.SIGSTOP)
    until(lambda: is_whole() or process.poll() is not None, "the pair is whole", 100.0)
    assert process.poll() is None
    kill(files, "trainer-0", signal.SIGCONT)
    return named["primary"]


def kill(files: JobFiles, actor: str, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid_of(files, actor), number)


def has_come_to(run: Path, step: int, event: Literal["stepped", "saved"] = "stepped") -> bool:
    return any(record["step"] >= step for record in read_metrics(run / "metrics.jsonl", event))


def losses(run: Path) -> dict[int, float]:
    """Return the last told loss of each step."""
    return {record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl", "stepped")}


def outcome(files: JobFiles) -> dict[str, object]:
    state = files.read_state()
    assert state["outcome"] is not None, json.dumps(state, indent=1)
    return dict(state["outcome"])


def assert_the_same(one: Path, other: Path) -> None:
    """Compare losses, and every bit of both models."""
    assert losses(one) == losses(other)
    assert_same_models(one, other)


def assert_same_models(one: Path, other: Path) -> None:
    """Compare every bit of two runs' models."""
    ours, theirs = (load_run_model(RunDirectory.open(run))[0].state_dict() for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
