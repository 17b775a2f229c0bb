"""A Ray cluster of this machine alone: one process tree with a private folder and a token of its own."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

import mfdist
from mfdist.errors import UnavailableError
from mfdist.launch.job import ClusterAddress
from mfdist.launch.local_head import TAKEN_OVER

_START_S = 90.0
_END_S = 20.0
_ORPHANS_S = 3.0
#: Of a cluster of one machine: no drain when it ends, since its job has ended before.
_LOCAL_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_DEDUP_LOGS": "0",
}


class LocalHead:
    """A cluster of this machine that is starting, with `cpus` to offer; its folder is private.

    It ends with this process, however that ends, until `hand_over`.
    """

    def __init__(self, cpus: int) -> None:
        self._temp_dir = tempfile.mkdtemp(prefix="mfdist-ray-", dir="/tmp")  # short: sockets lie in it
        self._log = Path(self._temp_dir, "head.log")
        token_file = self._token_file = Path(self._temp_dir, "token")
        with os.fdopen(os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = os.pathsep.join(
            filter(None, [str(Path(mfdist.__file__).absolute().parents[1]), os.environ.get("PYTHONPATH", "")])
        )
        settings = {**_LOCAL_SETTINGS, "RAY_AUTH_TOKEN_PATH": str(token_file), "PYTHONPATH": path}
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mfdist.launch.local_head", self._temp_dir, str(cpus)],
                env={**kept, **settings},
                stdin=subprocess.PIPE,  # at its end, whose other end the kernel closes with this process, it ends
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for this process, not for that
            )

    def ready(self) -> ClusterAddress:
        """Wait until it can be joined, and return where.

        Raises:
            UnavailableError: it ended or did not come up in time.
        """
        known = Path(self._temp_dir, "ray_current_cluster")
        until = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError):
                if address := known.read_text("utf-8").strip():
                    began = psutil.Process(self.process.pid).create_time()
                    return ClusterAddress(
                        address=address,
                        token_file=str(self._token_file),
                        head_pid=self.process.pid,
                        head_began=began,
                        temp_dir=self._temp_dir,
                    )
            if self.process.poll() is not None or time.monotonic() > until:
                said = self._log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
                self.abandon()
                raise UnavailableError(f"a local Ray must start within {_START_S:g} s; it said: {' '.join(said)}")
            time.sleep(0.05)

    def hand_over(self) -> None:
        """Let it outlive this process: a supervisor has taken over, and ends it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:  # where it has ended, that shows soon
            pipe.write(TAKEN_OVER)

    def abandon(self) -> None:
        """End it, and all it started."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(_END_S)
        shutil.rmtree(self._temp_dir, ignore_errors=True)


def is_head_alive(cluster: ClusterAddress) -> bool:
    """Return whether the process of a cluster that mfdist started on this machine is still there."""
    try:
        process = psutil.Process(cluster.head_pid)
        return bool(abs(process.create_time() - cluster.head_began) < 1 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end_local(cluster: ClusterAddress, *, at_once: bool = False) -> None:
    """End a cluster that mfdist started on this machine, and remove its folder; leave one that others started alone.

    Args:
        cluster: which.
        at_once: by SIGKILL.
    """
    if not cluster.is_ours:
        return
    if not at_once:
        ask_to_end(cluster)
    if at_once or not wait_for_end(cluster, _END_S):
        for process in _members(cluster):
            with contextlib.suppress(psutil.Error):
                process.kill()
        wait_for_end(cluster, _END_S)
    # Workers notice that their host's process is gone, and end by themselves.
    until = time.monotonic() + _ORPHANS_S
    while _members(cluster) and time.monotonic() < until:
        time.sleep(0.05)
    for process in _members(cluster):
        with contextlib.suppress(psutil.Error):
            process.kill()
    if cluster.temp_dir:
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)


def ask_to_end(cluster: ClusterAddress) -> None:
    """Ask a cluster to end, which this process may be part of."""
    if is_head_alive(cluster):
        os.kill(cluster.head_pid, signal.SIGTERM)


def wait_for_end(cluster: ClusterAddress, timeout_s: float) -> bool:
    """Return whether the process of a local cluster ended in time."""
    until = time.monotonic() + timeout_s
    while is_head_alive(cluster):
        with contextlib.suppress(ChildProcessError):  # where it is this process's own
            os.waitpid(cluster.head_pid, os.WNOHANG)
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _members(cluster: ClusterAddress) -> list[psutil.Process]:
    """Return what is left of a local cluster: processes of its session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == cluster.head_pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
