"""Hosts for machines that may not create network namespaces: an address of loopback each, and no links.

They are used as `tests.distributed.hosts.Hosts` are, but for what needs a network of their own: there is no link to cut
or to slow, all have one name, and a program that binds every address meets the others.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

_MARK = "MFDIST_LOOPBACK_HOST"
_DEADLINE_S = 60.0


class LoopbackHost:
    """One of several `LoopbackHosts`: an address, and the processes that were started in it."""

    def __init__(self, hosts: "LoopbackHosts", index: int) -> None:
        self.index = index
        self.name = f"host{index}"
        self.address = f"127.0.0.{index + 2}"  # not 127.0.0.1: Ray takes the machine's own address for that
        self._hosts = hosts
        self._mark = f"{_MARK}={hosts.folder}/{self.name}"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line that runs `arguments` in this host."""
        return ["env", self._mark, *arguments]

    def start(self, arguments: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]":
        """Start a process in this host; it ends with the hosts at the latest."""
        process = subprocess.Popen(self.command(arguments), **popen)
        self._hosts.started.append(process)
        return process

    def run(
        self, arguments: Sequence[str], *, timeout_s: float = _DEADLINE_S, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in this host to its end; return its output and exit code, whatever that is."""
        return subprocess.run(self.command(arguments), capture_output=True, text=True, timeout=timeout_s, env=env)

    def pids(self) -> list[int]:
        """Return every process of this host: they and their children have its mark in their environment."""
        mark, found = self._mark.encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """Send every process SIGKILL until none is left."""
        until = time.monotonic() + _DEADLINE_S
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > until:
                raise TimeoutError(f"all processes of {self.name} must end within {_DEADLINE_S} s; left: {pids}")
            time.sleep(0.01)


class LoopbackHosts(Sequence[LoopbackHost]):
    """`number` hosts; what was started in them is gone on exit.

    Attributes:
        folder: with a short path, for what the hosts need; removed on exit.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.folder = Path()
        self.started: list[subprocess.Popen[Any]] = []
        self._hosts: list[LoopbackHost] = []

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: int) -> LoopbackHost:  # type: ignore[override]
        return self._hosts[index]

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="mfloop-", dir="/tmp"))
        self._hosts = [LoopbackHost(self, index) for index in range(self.number)]
        return self

    def __exit__(self, *_: object) -> None:
        for host in self:
            host.kill()
        for process in self.started:
            process.wait(_DEADLINE_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)
