"""Table servers as processes of their own, to be killed; forked from one that has imported what they need."""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path
from typing import Any

DEADLINE_S = 60.0


class ServerProcess:
    """A server on a data folder, started on the same port again and again.

    Args:
        data: its folder.
        settings: more keys of `[server]`, and `log`, the file of its stderr.
    """

    def __init__(self, data: Path, **settings: Any) -> None:
        self.data, self.settings = data, settings
        self.address = f"127.0.0.1:{_free_port()}"
        self.peer = ""  # address of the other server of a pair
        self._process: Any = None

    def start(self) -> "ServerProcess":
        """Start it and wait until it listens."""
        self.begin()
        self.listening()
        return self

    def begin(self) -> None:
        """Start it."""
        assert self._process is None or self._process.exitcode is not None
        self._said, theirs = _CONTEXT.Pipe(duplex=False)
        settings = {"data": self.data, "listen": self.address, "threads": 1, "peer": self.peer, **self.settings}
        self._process = _CONTEXT.Process(target=_serve, args=(settings, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def listening(self) -> None:
        """Wait until it listens."""
        assert self._said.poll(DEADLINE_S), "a server did not start in time"
        try:
            said = self._said.recv()
        except EOFError:
            self._process.join(DEADLINE_S)
            raise AssertionError(f"a server ended with {self._process.exitcode} before it listened") from None
        if isinstance(said, BaseException):
            self._process.join(DEADLINE_S)
            raise said

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()
        self._process.join(DEADLINE_S)
        assert self._process.exitcode == -signal.SIGKILL

    def stop(self) -> None:
        """End it by SIGTERM, as an operator does."""
        self._process.terminate()
        self._process.join(DEADLINE_S)
        assert self._process.exitcode == 0

    @property
    def pid(self) -> int:
        """Return its process id."""
        pid: int = self._process.pid
        return pid

    @property
    def is_running(self) -> bool:
        """Return whether it runs."""
        return self._process is not None and self._process.is_alive()

    @property
    def memory_bytes(self) -> int:
        """Return how much memory it holds."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def server(data: Path, **settings: Any) -> Iterator[ServerProcess]:
    """Run a server while the context lasts."""
    process = ServerProcess(data, **settings).start()
    try:
        yield process
    finally:
        if process.is_running:
            process.kill()


def until(holds: Any, deadline_s: float = DEADLINE_S) -> None:
    """Wait until something holds."""
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def _serve(settings: dict[str, Any], said: Connection) -> None:
    from mfdist.table_server.config import ReplicationConfig, ServerConfig, ServerSection
    from mfdist.table_server.server import serve

    if (log := settings.pop("log", None)) is not None:
        with Path(log).open("ab") as file:
            os.dup2(file.fileno(), 2)
    if (limit := settings.pop("file_bytes", None)) is not None:  # a disk that is full once a file is this long
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if (limit := settings.pop("memory_bytes", None)) is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pair = ReplicationConfig(peer=settings.pop("peer"), timeout_s=settings.pop("timeout_s", 10.0))
    try:
        config = ServerConfig(server=ServerSection(**settings), replication=pair)
        serve(config, lambda address, _: said.send(address))
    except Exception as error:  # noqa: BLE001 - the test's
        said.send(error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


os.environ.setdefault("OMP_NUM_THREADS", "1")
_CONTEXT = multiprocessing.get_context("forkserver")
set_forkserver_preload(["mfdist.table_server.server", "mfdist.kernels.gather_sum.cpu_impl"])
