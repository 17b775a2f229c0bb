"""Real table servers in processes of their own, to be killed and started again.

with ServerProcesses(folder, 2) as servers:
    tables = TableServers(servers.addresses)
    servers.kill(0)
    servers.start(0)
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mfdist.errors import InternalError

_READY_S = 90.0
_STOP_S = 60.0


class ServerProcesses:
    """`mfdist serve` `number` times, each with a data folder in `folder`; started on entry, ended on exit.

    A server that is started again listens where it did before. What it says goes to `folder`/server-I.log.

    Args:
        folder: made if it is not there.
        number: of servers.
        config: TOML text for all of them.
        arguments: for all of them, after those that are needed.
        environment: variables beside this process's.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        *,
        config: str = "",
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.addresses: list[str] = ["127.0.0.1:0"] * number
        self.processes: list[subprocess.Popen[str] | None] = [None] * number
        self._config = config
        self._arguments = tuple(arguments)
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}

    def __enter__(self) -> "ServerProcesses":
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "server.toml").write_text(self._config, "utf-8")
        try:
            for index in range(len(self.processes)):
                self._launch(index)
            for index in range(len(self.processes)):
                self._hear(index)
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_all()

    def data(self, index: int) -> Path:
        """Return a server's data folder."""
        return self.folder / f"data-{index}"

    def log(self, index: int) -> str:
        """Return what a server has said on stderr."""
        path = self.folder / f"server-{index}.log"
        return path.read_text("utf-8") if path.exists() else ""

    def start(self, index: int) -> str:
        """Start a server again, where it was; return its address once it takes calls.

        Raises:
            InternalError: it ended instead; the message has what it said.
        """
        self._launch(index)
        return self._hear(index)

    def kill(self, index: int) -> None:
        """End a server by SIGKILL."""
        self._signal(index, signal.SIGKILL)

    def stop(self, index: int) -> int:
        """End a server by SIGTERM; return its exit code."""
        return self._signal(index, signal.SIGTERM)

    def pause(self, index: int) -> None:
        """Let a server hang."""
        self._running(index).send_signal(signal.SIGSTOP)

    def resume(self, index: int) -> None:
        """Let it go on."""
        self._running(index).send_signal(signal.SIGCONT)

    def _launch(self, index: int) -> None:
        command = [
            *(sys.executable, "-m", "mfdist", "serve", str(self.folder / "server.toml")),
            *("--data", str(self.data(index)), "--listen", self.addresses[index], *self._arguments),
        ]
        with (self.folder / f"server-{index}.log").open("ab") as log:
            self.processes[index] = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment
            )

    def _hear(self, index: int) -> str:
        process = self._running(index)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        until = time.monotonic() + _READY_S
        line = ""
        while not line.endswith("\n"):
            line += process.stdout.readline()
            if process.poll() is not None or time.monotonic() > until:
                raise InternalError(
                    f"server {index} must say where it listens; it said {line!r} and {self.log(index)!r}"
                )
            time.sleep(0.01)
        self.addresses[index] = line.strip()
        return self.addresses[index]

    def _signal(self, index: int, number: signal.Signals) -> int:
        process = self._running(index)
        process.send_signal(number)
        code = process.wait(_STOP_S)
        self._forget(index)
        return code

    def _running(self, index: int) -> "subprocess.Popen[str]":
        process = self.processes[index]
        if process is None:
            raise InternalError(f"server {index} is not running")
        return process

    def _forget(self, index: int) -> None:
        process = self._running(index)
        if process.stdout is not None:
            process.stdout.close()
        self.processes[index] = None

    def _end_all(self) -> None:
        for process in self.processes:
            if process is not None and process.poll() is None:
                process.kill()
        for index, process in enumerate(self.processes):
            if process is not None:
                process.wait(_STOP_S)
                self._forget(index)
