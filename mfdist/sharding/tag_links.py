"""Sockets between the ranks of one host, for tags: they take microseconds where a collective has threads to wake.

Tags arrive in the order they were sent. A rank that ends closes its sockets, and those that wait for it know at once.
"""

import contextlib
import os
import select
import socket
import struct
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mfdist.errors import ConfigError

_RANK = struct.Struct("<i")
_ACCEPT_S = 60.0
#: For so long a rank asks again and again what has come, before it sleeps: to be woken takes a virtual machine as long.
_AWAKE_S = 2e-4


class LinkError(RuntimeError):
    """A rank has ended, or did not come before the deadline."""


class TagLinks:
    """One rank's sockets to all others; see `connect`."""

    def __init__(self, rank: int, sockets: dict[int, socket.socket]) -> None:
        self.rank, self.world_size = rank, len(sockets) + 1
        self._sockets = sockets
        for link in sockets.values():
            link.setblocking(False)
        weakref.finalize(self, _close, list(sockets.values()))
        self._under_way: deque[TagWork] = deque()

    def start(self, received: Tensor, sent: Tensor, deadline_s: float) -> "TagWork":
        """Send each rank its line of `sent` [W, L]; once waited for, `received` [W, L] has theirs. Both are on the CPU.

        Raises:
            LinkError: a rank has ended.
        """
        lines = sent.numpy()
        received.numpy()[self.rank] = lines[self.rank]
        until_s = time.monotonic() + deadline_s
        for rank, link in self._sockets.items():
            _move(link, link.send, select.POLLOUT, rank, memoryview(lines[rank]).cast("B"), until_s)
        work = TagWork(self, received, deadline_s)
        self._under_way.append(work)
        return work

    def trade_files(self, file: int, deadline_s: float) -> list[int]:
        """Return a descriptor of each rank's file, for one of this rank's.

        Raises:
            LinkError: a rank has ended, or did not come before the deadline.
        """
        if self._under_way:
            self.receive(self._under_way[-1])
        files = {self.rank: file}
        try:
            for rank, link in self._sockets.items():
                with _told(rank):
                    link.settimeout(deadline_s)
                    socket.send_fds(link, [b"f"], [file])
            for rank, link in self._sockets.items():
                with _told(rank):
                    _, (files[rank], *_), _, _ = socket.recv_fds(link, 1, 1)
        finally:
            for link in self._sockets.values():
                link.setblocking(False)
        return [files[rank] for rank in range(self.world_size)]

    def receive(self, last: "TagWork") -> None:
        """Receive all that was begun up to `last`."""
        until_s = time.monotonic() + last.deadline_s
        while not last.is_done:
            work = self._under_way[0]
            lines = work.received.numpy()
            for rank, link in self._sockets.items():
                _move(link, link.recv_into, select.POLLIN, rank, memoryview(lines[rank]).cast("B"), until_s)
            work.is_done = True
            self._under_way.popleft()

    def close(self) -> None:
        """Close all sockets."""
        _close(list(self._sockets.values()))


class TagWork:
    """Tags that are under way, as torch.distributed has its works."""

    def __init__(self, links: TagLinks, received: Tensor, deadline_s: float) -> None:
        self._links, self.received, self.deadline_s = links, received, deadline_s
        self.is_done = False

    def wait(self) -> None:
        """Return once all have come.

        Raises:
            LinkError: a rank has ended, or did not come before the deadline.
        """
        self._links.receive(self)


def connect(control: Any) -> TagLinks | None:
    """Return sockets among the ranks of a process group, or None where they are not processes of one host.

    Args:
        control: the process group, on the CPU's network.

    Called on: all ranks of the group; all get sockets, or none.
    """
    rank, world_size = dist.get_rank(control), dist.get_world_size(control)
    if len(set(gathered(_host(), control))) > 1 or world_size == 1:
        return None
    sockets: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        path, listener = "", None
        with contextlib.suppress(OSError):  # such as a path that is too long for a socket
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mfdist-"))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(Path(folder) / "tags"))
            listener.listen(world_size)
            path = str(Path(folder) / "tags")
        paths = gathered(path, control)
        if listener is not None and all(paths):
            with contextlib.suppress(OSError):
                sockets = _connected(rank, paths, listener)
        links = TagLinks(rank, sockets)
        if all(gathered(len(sockets) == world_size - 1, control)):
            return links
        links.close()
        return None


def gathered(value: Any, control: Any) -> list[Any]:
    """Return the values of all ranks of a process group on the CPU's network."""
    everyones: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(everyones, value, group=control)
    return everyones


def check_alike(value: Any, what: str, control: Any) -> None:
    """Raise ConfigError unless all ranks of a process group on the CPU's network have the same value."""
    everyones = gathered(value, control)
    own = everyones[dist.get_rank(control)]
    if others := [(rank, each) for rank, each in enumerate(everyones) if each != own]:
        rank, other = others[0]
        raise ConfigError(
            f"all ranks must have the same {what}; got {own} on rank {dist.get_rank()} and {other} on rank "
            f"{dist.get_global_rank(control, rank)}"
        )


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


def _connected(rank: int, paths: list[str], listener: socket.socket) -> dict[int, socket.socket]:
    """Return a socket to each other rank; each connects to those before it."""
    found: dict[int, socket.socket] = {}
    for other in range(rank):
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(_ACCEPT_S)
        link.connect(paths[other])
        link.sendall(_RANK.pack(rank))
        found[other] = link
    listener.settimeout(_ACCEPT_S)
    for _ in range(rank + 1, len(paths)):
        link, _ = listener.accept()
        link.settimeout(_ACCEPT_S)
        found[_RANK.unpack(link.recv(_RANK.size, socket.MSG_WAITALL))[0]] = link
    return dict(sorted(found.items()))


def _host() -> tuple[str, str, int]:
    """Return what processes of one host, and of one network where a host has several, have alike."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
        return socket.gethostname(), boot, Path("/proc/self/ns/net").stat().st_ino
    return socket.gethostname(), "", 0


def _move(
    link: socket.socket, move: Callable[[memoryview], int], event: int, rank: int, line: memoryview, until_s: float
) -> None:
    """Have a socket `move` a line, which it can whenever there is an event, before a deadline."""
    asleep_s = 0.0
    with _told(rank):
        while line:
            try:
                size = move(line)
            except BlockingIOError:
                now_s = time.monotonic()
                asleep_s = asleep_s or now_s + _AWAKE_S
                if now_s < asleep_s:
                    os.sched_yield()
                else:
                    _sleep(link, event, until_s - now_s)
                continue
            if not size:
                raise ConnectionResetError("Connection closed by peer")
            line = line[size:]


def _sleep(link: socket.socket, event: int, seconds: float) -> None:
    """Return once there is an event, such as that something has come."""
    waiting = select.poll()
    waiting.register(link, event)
    if seconds <= 0 or not waiting.poll(1e3 * seconds):
        raise TimeoutError("timed out")


@contextlib.contextmanager
def _told(rank: int) -> Any:
    """Turn what sockets raise into what collectives do."""
    try:
        yield
    except OSError as error:
        raise LinkError(f"{error} (rank {rank} of those on this host)") from error
