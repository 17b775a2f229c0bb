"""A server's log: what must be on disk before a push is acknowledged, through SQLite.

    ledger/00000001.db, 00000001.db-wal, 00000001.db-large, 00000002.db, …   one after the other; see `ledger_segment`

One thread writes. It takes all that has come while it was writing as its next group, which costs an fsync or two
whatever its size. A segment that has grown enough is followed by the next, and removed once everything in it has been
dropped; the small map of records is carried along.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from mfdist.checkpoint.direct_io import PageMemory
from mfdist.errors import CheckpointError, ConfigError, UnavailableError
from mfdist.table_server.disk_room import reason_of
from mfdist.table_server.ledger_segment import Key, Segment
from mfdist.table_server.step_set import StepSet

_GROUP_BYTES = 8 << 20  # more in one group makes the first wait longer and gains nothing
_SEGMENT_BYTES = 256 << 20
_RETRY_S = 1.0
_RESERVED_BYTES = 1 << 20
_MAX_STEP = 1 << 62

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedPush:
    """A push as it was appended, its parts joined."""

    step: int
    client: int
    payload: bytes


class Ledger:
    """A durable, ordered log of pushes and a small map, in one folder. Methods may be called from any thread.

    Writes return a future that is done when they are on disk. Where the disk is full or fails, the futures of all that
    waits get CheckpointError, but nothing is forgotten: it is tried again, in its order, with the next write and
    every second. Whoever appends the same push again gets a future that is done once it is on disk. So there is never
    a hole in the log, and a caller that stops taking pushes while there is a `failure` bounds what waits in memory.

    Args:
        folder: made if it is not there.
        segment_bytes: after how many bytes another file is begun.

    Raises:
        CheckpointError: it is damaged, or cannot be read.
        UnavailableError: another process uses it.
    """

    def __init__(self, folder: Path, *, segment_bytes: int = _SEGMENT_BYTES) -> None:
        self.folder = folder
        self.notes: list[str] = []  # what recovery dropped: a group that was being written when the process died
        self.failure: CheckpointError | None = None  # of the last write, until one works again
        self._segment_bytes = segment_bytes
        self._segments: list[Segment] = []
        self._records: dict[str, bytes] = {}
        self._known: dict[str, dict[int, StepSet]] = {}  # table → client → steps
        self._has_work = threading.Condition()
        self._waiting: deque[_Write] = deque()
        self._unwritten: dict[Key, _Write] = {}
        self._waiting_bytes = 0
        self._is_closing = False
        self._is_retired = False  # whether the segment written to is to be followed by another
        self._number = 0
        self._removed_bytes = 0  # of segments that were removed
        self._memory = PageMemory()
        self._reserve = folder / "reserve"  # room for another segment, so that a full disk can be emptied
        self._open()
        self._writer = threading.Thread(target=self._run, name="mfdist-ledger", daemon=True)
        self._writer.start()

    # Writing.

    def append(self, table: str, step: int, client: int, payload: bytes | Sequence[bytes]) -> "Future[None]":
        """Log a push, whose parts must not change until it is on disk; what is there already is not logged again.

        Raises:
            ConfigError: the step cannot be counted up to.
        """
        if not 0 <= step < _MAX_STEP:
            raise ConfigError(f'a step must be in [0, 2**62); got {step} for table "{table}"')
        parts = [payload] if isinstance(payload, bytes) else payload
        key, done = (table, step, client), _running()
        with self._has_work:
            if self._known.setdefault(table, {}).setdefault(client, StepSet()).add(step):
                self._unwritten[key] = write = _Write(key, parts or [b""], num_bytes=sum(map(len, parts)))
                self._enqueue(write, done)
            elif (unwritten := self._unwritten.get(key)) is not None:
                unwritten.futures.append(done)
                self._has_work.notify()
            else:
                done.set_result(None)
        return done

    def put(self, key: str, value: bytes) -> "Future[None]":
        """Set a record, in order with what is appended; `get` has it once it is on disk."""
        return self._record(key, value)

    def delete(self, key: str) -> "Future[None]":
        """Remove a record, if it is there."""
        return self._record(key, None)

    def drop(self, table: str, through: int = _MAX_STEP) -> None:
        """Say that the pushes of a table appended so far are needed no more, up to a step.

        Cost: nothing is written, which a full disk would not allow; files are removed when nothing in them is needed.
        Until then, `pushes` yields what was dropped, also where the log is opened again; drop it again then. A table
        that begins anew needs another name.
        """
        with self._has_work:
            for steps in self._known.get(table, {}).values():
                steps.forget(through)
            self._enqueue(_Write(None, [], drops=(table, through)))

    def close(self) -> None:
        """Write what waits, then let the folder go. What could not be written has said so through its future."""
        with self._has_work:
            self._is_closing = True
            self._has_work.notify()
        self._writer.join()
        self._let_go()

    # Reading.

    def get(self, key: str) -> bytes | None:
        """Return a record."""
        with self._has_work:
            return self._records.get(key)

    def items(self, prefix: str = "") -> list[tuple[str, bytes]]:
        """Return the records whose keys begin like this, in the order of their keys."""
        with self._has_work:
            return [(key, self._records[key]) for key in sorted(self._records) if key.startswith(prefix)]

    def tables(self) -> list[str]:
        """Return the tables with pushes on disk that were not dropped, sorted."""
        with self._has_work:
            return sorted({name for segment in self._segments for name in segment.newest})

    def pushes(self, table: str, after: int = -1) -> Iterator[LoggedPush]:
        """Yield the pushes of a table that are on disk when this is called, in the order they were appended.

        Args:
            table: of which.
            after: only pushes of later steps.

        Raises:
            CheckpointError: a push is not what was written.
        """
        for segment in list(self._segments):
            for (name, step, client), number in segment.pushes():
                if name == table and step > after:
                    yield LoggedPush(step, client, segment.payload(number))

    @property
    def num_bytes(self) -> int:
        """Return how much room the log takes on disk."""
        return sum(segment.num_bytes for segment in list(self._segments))

    @property
    def num_written_bytes(self) -> int:
        """Return how much room it would take had nothing been removed since it was opened; it only grows."""
        with self._has_work:
            return self._removed_bytes + self.num_bytes

    def num_bytes_after(self, steps: Mapping[str, int]) -> int:
        """Return how much room the files take that hold any push of a table after its step; 0 where none is given."""
        with self._has_work:
            needed = [
                segment
                for segment in self._segments
                if any(step > steps.get(table, 0) for table, step in segment.newest.items())
            ]
        return sum(segment.num_bytes for segment in needed)

    @property
    def waiting_bytes(self) -> int:
        """Return how many bytes of pushes are not on disk yet."""
        return self._waiting_bytes

    # The writer's thread.

    def _run(self) -> None:
        group: list[_Write] = []
        while True:
            with self._has_work:
                if self.failure is not None and not self._is_closing:
                    self._has_work.wait(_RETRY_S)
                while not group and not self._waiting and not self._is_closing:
                    self._has_work.wait()
                if not group:
                    group = self._next_group()
            if not group:
                return
            try:
                self._write(group)
            except Exception as error:  # noqa: BLE001 - were this thread to end, everyone would wait for ever
                self._fail(error, group)
                if self._is_closing:
                    return
            else:
                self._finish(group)
                group = []

    def _next_group(self) -> "list[_Write]":
        group, num_bytes = list[_Write](), 0
        while self._waiting and num_bytes < _GROUP_BYTES:
            group.append(self._waiting.popleft())
            num_bytes += group[-1].num_bytes
            if group[-1].drops is not None:
                break  # what comes behind it is not dropped
        return group

    def _write(self, group: "list[_Write]") -> None:
        pushes = [(write.key, write.parts) for write in group if isinstance(write.key, tuple)]
        records = {write.key: write.value for write in group if isinstance(write.key, str)}
        if not pushes and not records:
            return
        if not self._segments or self._is_retired:
            self._begin_segment()
        self._segments[-1].commit(pushes, records)

    def _begin_segment(self) -> None:
        if self.failure is not None:
            self._reserve.unlink(missing_ok=True)
        segment = Segment.create(self.folder / f"{self._number + 1:08}.db", self._records, self._memory)
        with self._has_work:
            self._number += 1
            self._segments.append(segment)
            self._is_retired = False
        if self.failure is None and not self._reserve.exists():
            with contextlib.suppress(OSError):
                self._reserve.write_bytes(bytes(_RESERVED_BYTES))

    def _finish(self, group: "list[_Write]") -> None:
        if self.failure is not None:
            _logger.warning("the log is written again", extra={"fields": {"folder": str(self.folder)}})
        with self._has_work:
            self.failure = None
            for write in group:
                self._waiting_bytes -= write.num_bytes
                if isinstance(write.key, tuple):
                    if self._unwritten[write.key] is write:  # it may have been dropped and come again
                        del self._unwritten[write.key]
                elif write.key is not None and write.value is None:
                    self._records.pop(write.key, None)
                elif write.key is not None and write.value is not None:
                    self._records[write.key] = write.value
            futures = [future for write in group for future in write.futures]
        if group[-1].drops is not None:
            self._truncate(*group[-1].drops)
        if self._segments and self._segments[-1].num_bytes >= self._segment_bytes:
            self._is_retired = True
        for future in futures:
            future.set_result(None)

    def _truncate(self, table: str, through: int) -> None:
        """Remove the segments of which nothing is needed; the last is the records', until another is begun."""
        with self._has_work:
            for segment in self._segments:
                if segment.newest.get(table, through + 1) <= through:
                    del segment.newest[table]
            last = self._segments[-1] if self._segments else None
        is_worth_it = self.failure is not None or (last is not None and last.num_bytes > self._segment_bytes // 64)
        if last is not None and not last.newest and is_worth_it:
            with contextlib.suppress(sqlite3.Error, OSError):  # no room for another yet
                self._begin_segment()
        with self._has_work:
            gone = [segment for segment in self._segments[:-1] if not segment.newest]
            self._removed_bytes += sum(segment.num_bytes for segment in gone)
            self._segments = [segment for segment in self._segments if segment not in gone]
        for segment in gone:
            segment.remove()

    def _fail(self, error: Exception, group: "list[_Write]") -> None:
        before = self.failure
        with self._has_work:
            self.failure = CheckpointError(
                f"a push must be on disk before it is acknowledged; {self.folder}: "
                f"{reason_of(error, self.folder)}; make room or see that the disk works, and it will be written"
            )
            futures = [future for write in (*group, *self._waiting) for future in write.futures]
            for write in (*group, *self._waiting):
                write.futures.clear()
            drops = [write.drops for write in (*group, *self._waiting) if write.drops is not None]
        if str(before) != str(self.failure):
            _logger.warning("pushes are refused: %s", self.failure)
        for future in futures:
            future.set_exception(CheckpointError(str(self.failure)))
        for drop in drops:  # what they are waiting for may be the room that they give
            self._truncate(*drop)

    def _record(self, key: str, value: bytes | None) -> "Future[None]":
        done = _running()
        with self._has_work:
            self._enqueue(_Write(key, [], value=value, num_bytes=len(value or b"")), done)
        return done

    def _enqueue(self, write: "_Write", done: "Future[None] | None" = None) -> None:
        if self._is_closing:
            raise CheckpointError(f"a log must be open to be written; {self.folder} is closed")
        if done is not None:
            write.futures.append(done)
        self._waiting.append(write)
        self._waiting_bytes += write.num_bytes
        self._has_work.notify()

    def _open(self) -> None:
        self._folder_lock = _locked(self.folder)
        try:
            paths = sorted(self.folder.glob("[0-9]*.db"))
            for rest in self.folder.glob("[0-9]*.db-*"):  # of one whose removal was cut short
                if not rest.with_name(rest.name.partition("-")[0]).exists():
                    rest.unlink()
            self._number, self._is_retired = int(paths[-1].stem) if paths else 0, True
            while paths:
                segment = Segment(paths[0], is_last=len(paths) == 1)
                del paths[0]
                self._take(segment)
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        for segment in self._segments:
            segment.close()
        if self._folder_lock >= 0:
            os.close(self._folder_lock)
            self._folder_lock = -1

    def _take(self, segment: Segment) -> None:
        if not segment.is_whole:
            segment.remove()
            return
        self._segments.append(segment)
        self._records = segment.records()
        for (table, step, client), _ in segment.pushes():
            self._known.setdefault(table, {}).setdefault(client, StepSet()).add(step)
        if segment.note:
            self.notes.append(segment.note)


@dataclass(eq=False)
class _Write:
    key: Key | str | None  # a push, a record, or None
    parts: Sequence[bytes]
    value: bytes | None = None
    num_bytes: int = 0
    drops: tuple[str, int] | None = None  # pushes of a table up to a step
    futures: "list[Future[None]]" = field(default_factory=list)


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"a server's log needs a folder; {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UnavailableError(f"one process at a time may use a log; another one uses {folder}; stop it") from None
    return lock


def _running() -> "Future[None]":
    future = Future[None]()
    future.set_running_or_notify_cancel()  # its caller cannot cancel it: it is written whatever happens
    return future
