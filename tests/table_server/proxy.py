"""A TCP proxy on loopback between a client and a server, with the faults that a network has."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Literal

Direction = Literal["up", "down"]


class Proxy:
    """Carries bytes both ways until it is closed.

    Args:
        target: HOST:PORT behind it.
        limits: given the number of a connection, how many bytes (up, down) it carries before it is cut; None: any.
    """

    def __init__(
        self, target: str, limits: Callable[[int], tuple[float, float]] = lambda number: (float("inf"),) * 2
    ) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._limits = (host, int(port)), limits
        self.delay_s = 0.0  # of everything on its way up
        self.is_cut = False
        self.num_connections = self.num_cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Cut everything."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for each in (self._listener, *sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def cut(self) -> None:
        """Cut all connections, and carry none until `mend`."""
        self.is_cut = True
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Carry again."""
        self.is_cut = False

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.is_cut:
                    raise ConnectionError
                server = socket.create_connection(self._target, 5.0)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._sockets |= {client, server}
                number, self.num_connections = self.num_connections, self.num_connections + 1
            up, down = self._limits(number)
            for source, sink, limit, direction in ((client, server, up, "up"), (server, client, down, "down")):
                threading.Thread(target=self._carry, args=(source, sink, limit, direction), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, limit: float, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if direction == "up" and self.delay_s:
                    time.sleep(self.delay_s)
                sink.sendall(data[: int(min(limit, len(data)))])
                limit -= len(data)
                if limit <= 0:
                    self.num_cuts += 1
                    break
        for each in (source, sink):
            with contextlib.suppress(OSError):  # a reset, not an orderly end
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
            each.close()
            with self._lock:
                self._sockets.discard(each)
