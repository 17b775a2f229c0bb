"""An actor's side of supervision: it tells that it lives and what it does, and hears what is wanted of it.

The actor's work runs in the main thread, as it would in a process of its own, signals included; a thread beside it
calls the supervisor. An actor that cannot reach its supervisor for long ends itself: by then another may have been put
in its place.
"""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

import mfdist
from mfdist import idle_threads
from mfdist.errors import MfdistError
from mfdist.launch.happenings import Kind
from mfdist.training.events import Event, Preparing, Saved, Started, Warned

BEAT_S = 0.5
_LAST_S = 5.0  # for the last words
_FENCED = 71  # exit code


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a supervisor answers.

    Args:
        order: go on; save, and end; end at once.
        addresses: of all table servers, where they are or last were.
    """

    order: Literal["go on", "stop", "end"]
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Post:
    """An actor's place in its job."""

    kind: Kind
    index: int
    incarnation: int
    log: str
    threads: int
    silence_s: float

    @property
    def name(self) -> str:
        """Return the actor's name for people."""
        return f"{self.kind}-{self.index}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an actor says of itself."""

    post: Post
    pid: int
    host: str
    memory_bytes: int
    received_bytes: int  # by its host, since that started
    sent_bytes: int
    events: tuple[Event, ...] = ()
    first: int = 0  # how many were told before these
    committed: int = 0
    address: str = ""
    role: str = ""  # of a server in its pair


class Pulse:
    """Tells a supervisor of this process.

    Args:
        post: which actor this is.
        host: its host's address.
        call: takes a deadline in seconds and a `Report`, returns an `Answer`; raises MfdistError where nobody answers.
    """

    def __init__(self, post: Post, host: str, call: Callable[[float, Report], Answer]) -> None:
        self.post = post
        self._host = host
        self._call = call
        self._events: deque[Event] = deque()
        self._changed = threading.Event()
        self._over = threading.Event()
        self._num_told = 0
        self._committed = 0
        self._address = ""
        self._role: Callable[[], str] = str
        self._addresses: tuple[str, ...] = ()
        self._on_addresses: Callable[[tuple[str, ...]], None] | None = None
        self._is_ready = False
        self._is_asked = False
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._run, name="mfdist-pulse", daemon=True)
        self._thread.start()

    def observe(self, event: Event) -> None:
        """Tell of an event of training. Of work before it, only the latest counts."""
        if isinstance(event, Warned) and self._is_asked:
            return  # SIGTERM, which the supervisor asked for
        if isinstance(event, Started):
            self._committed = max(self._committed, event.first_step)
            self.be_ready()
        elif isinstance(event, Saved):
            self._committed = max(self._committed, event.step)
        if isinstance(event, Preparing) and self._events:
            last = self._events[-1]
            if isinstance(last, Preparing) and last.activity == event.activity:
                self._events[-1] = event
                return
        self._events.append(event)
        self._changed.set()

    def be_ready(self, address: str = "") -> None:
        """Say that SIGTERM is caught from now on, and where a server listens."""
        self._address = address
        self._is_ready = True
        self._changed.set()

    def follow(self, on_addresses: Callable[[tuple[str, ...]], None], role: Callable[[], str] = str) -> None:
        """Pass on where table servers are, now and whenever one has moved; tell a server's role with each beat."""
        self._role = role
        self._on_addresses = on_addresses
        self._changed.set()

    def finish(self) -> None:
        """Send what is left to tell, and be silent."""
        self._over.set()
        self._changed.set()
        self._thread.join(_LAST_S)

    def _run(self) -> None:
        heard = time.monotonic()
        while True:
            is_last = self._over.is_set()
            self._changed.clear()
            events = [self._events.popleft() for _ in range(len(self._events))]
            while events is not None:
                try:
                    self._obey(self._call(max(1.0, self.post.silence_s / 4), self._report(events)))
                    self._num_told += len(events)
                    break
                except MfdistError:
                    if is_last and time.monotonic() - heard > _LAST_S:
                        return
                    if time.monotonic() - heard > 0.75 * self.post.silence_s:
                        sys.stderr.write(f"{self.post.name}: its supervisor cannot be reached; it ends itself\n")
                        sys.stderr.flush()
                        os._exit(_FENCED)
                    time.sleep(BEAT_S)
            heard = time.monotonic()
            if is_last:
                return
            self._changed.wait(BEAT_S)
            time.sleep(BEAT_S / 10)  # steps of a millisecond are told together

    def _report(self, events: list[Event]) -> Report:
        traffic = psutil.net_io_counters()
        return Report(
            post=self.post,
            pid=os.getpid(),
            host=self._host,
            memory_bytes=self._process.memory_info().rss,
            received_bytes=traffic.bytes_recv,
            sent_bytes=traffic.bytes_sent,
            events=tuple(events),
            first=self._num_told,
            committed=self._committed,
            address=self._address,
            role=self._role(),
        )

    def _obey(self, answer: Answer) -> None:
        if answer.order == "end":
            os._exit(_FENCED)
        if self._on_addresses is not None and answer.addresses != self._addresses:
            self._addresses = answer.addresses
            self._on_addresses(answer.addresses)
        if answer.order == "stop" and self._is_ready and not self._is_asked and not self._over.is_set():
            self._is_asked = True
            os.kill(os.getpid(), signal.SIGTERM)


def settle(post: Post) -> None:
    """Make this process its actor's: threads as many as it may use, its words into its log. Before torch is loaded."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(post.threads)
    idle_threads.sleep()
    # torch's profiler, which measures the share of the lookups, would write on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    path = Path(post.log)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    code = f"mfdist {mfdist.__version__} of {Path(mfdist.__file__).parent}"
    sys.stderr.write(f"--- {post.name}, start {post.incarnation}, {now}, pid {os.getpid()}, {code}\n")
    sys.stderr.flush()
