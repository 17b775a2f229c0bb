"""One file of a server's log: a SQLite database that is only ever appended to, then removed as a whole.

It is in WAL mode and its write-ahead log is never folded into it while it is used, so that a group of pushes is
written once and costs one fsync. Nothing is written to it after the process that made it: the frames of its
write-ahead log are those of its groups, one after the other, and can be counted. SQLite drops whatever follows a
damaged frame and tells nobody; the count does.
"""

import contextlib
import os
import sqlite3
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mfdist.checkpoint.checksum import crc32c
from mfdist.checkpoint.durability import Bytes, fsync
from mfdist.errors import CheckpointError

#: (table, step, client)
Key = tuple[str, int, int]

_PAGE_BYTES = 16384  # smaller ones cost time where a push is megabytes, larger ones room where it is small
_CACHE_KIB = 16384
_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_SCHEMA = """
create table parts (seq integer primary key, name text, step integer, client integer, num_left integer,
                    num_group integer, checksum integer, data blob);
create table records (key text primary key, value blob, num_group integer);
"""


class Segment:
    """A file of the log. One thread writes, if this process made it; any may read.

    Args:
        path: of the database; it is opened to be read, so that a damaged one stays as it is.
        is_last: whether it may end in a group that was being written when its process died.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, path: Path, *, is_last: bool = True, _is_new: bool = False) -> None:
        self.path = path
        self.note = ""  # what recovery dropped
        self.newest: dict[str, int] = {}  # table → last step that is needed
        _, self._wal, _, self._journal = _files(path)
        self._lock = threading.Lock()
        self._connection = self._connect_to_write() if _is_new else self._connect()
        try:
            with _named(path):
                self._num_groups, self._num_parts = self._find(is_last)
        except BaseException:
            self._connection.close()
            raise

    @classmethod
    def create(cls, path: Path, records: Mapping[str, bytes]) -> "Segment":
        """Make a new one that begins with these records, on disk when this returns.

        Raises:
            sqlite3.Error, OSError: it could not be made; nothing is left.
        """
        try:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
                connection.execute(f"pragma page_size={_PAGE_BYTES}")
                connection.executescript(f"pragma synchronous=extra; begin immediate; {_SCHEMA}")
                connection.executemany("insert into records values (?, ?, 0)", records.items())
                connection.execute("commit")
                connection.execute("pragma journal_mode=wal")
            fsync(path.parent)
            return cls(path, _is_new=True)
        except BaseException:
            for file in _files(path):
                file.unlink(missing_ok=True)
            raise

    @property
    def num_bytes(self) -> int:
        """Return how much room it takes on disk."""
        num_bytes = 0
        for file in (self.path, self._wal):
            with contextlib.suppress(FileNotFoundError):
                num_bytes += file.stat().st_size
        return num_bytes

    @property
    def is_whole(self) -> bool:
        """Say whether it was ever made; it was not if its process died over that."""
        return self._num_groups >= 0

    def commit(self, pushes: Sequence[tuple[Key, Sequence[Bytes]]], records: Mapping[str, bytes | None]) -> None:
        """Append a group, on disk when this returns; none of it is kept if this raises. A record of None is deleted.

        Raises:
            sqlite3.Error: the disk is full or fails. The same group may be tried again, and only the same: it then
                takes the place of what was written of it.
        """
        group, parts = self._num_groups + 1, []
        for (name, step, client), payload in pushes:
            for num_left, data in zip(range(len(payload) - 1, -1, -1), payload, strict=True):
                checksum = _checksum(name, step, client, num_left, data)
                parts.append((name, step, client, num_left, group, checksum, data))
        with self._lock:
            try:
                self._connection.execute("begin immediate")
                self._connection.executemany(
                    "insert into parts (name, step, client, num_left, num_group, checksum, data) "
                    "values (?, ?, ?, ?, ?, ?, ?)",
                    parts,
                )
                self._connection.executemany(
                    "insert or replace into records values (?, ?, ?)",
                    [(key, value, group) for key, value in records.items()],
                )
                self._connection.execute("commit")
            except BaseException:
                if self._connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):  # what made the commit fail may make this fail
                        self._connection.execute("rollback")
                raise
        self._num_groups, self._num_parts = group, self._num_parts + len(parts)
        for (name, step, _), _ in pushes:
            self.newest[name] = max(step, self.newest.get(name, 0))

    def records(self) -> dict[str, bytes]:
        """Return all records as of the last group."""
        with self._lock, _named(self.path):
            found = self._connection.execute("select key, value from records where value is not null order by key")
            return dict(found.fetchall())

    def pushes(self) -> list[tuple[Key, int]]:
        """Return the key and the number of the last part of each push, in the order they were appended."""
        with self._lock, _named(self.path):
            found = self._connection.execute(
                "select name, step, client, seq from parts where num_left = 0 order by seq"
            ).fetchall()
        return [((name, step, client), seq) for name, step, client, seq in found]

    def payload(self, first: int, last: int) -> bytes:
        """Return the joined parts of the push with these first and last parts.

        Raises:
            CheckpointError: it is not what was written.
        """
        with self._lock, _named(self.path):
            found = self._connection.execute(
                "select name, step, client, num_left, data, checksum from parts where seq between ? and ? order by seq",
                (first, last),
            ).fetchall()
        if [row[3] for row in found] != list(range(last - first, -1, -1)):
            raise _damaged(self.path, f"parts {first} to {last} are not those of one push")
        for name, step, client, num_left, data, checksum in found:
            if _checksum(name, step, client, num_left, data) != checksum:
                raise _damaged(self.path, f"the push of client {client} for step {step} of {name} fails its checksum")
        return b"".join(row[4] for row in found)

    def close(self) -> None:
        """Let it go; SQLite folds the write-ahead log into the database, or leaves it where there is no room."""
        self._connection.close()

    def remove(self) -> None:
        """Remove it from disk; what it holds must be needed no more."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self._wal, 0)  # or closing would fold it into a file that is gone
        for file in _files(self.path):
            file.unlink(missing_ok=True)
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )

    def _connect_to_write(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=0, check_same_thread=False)
        for setting in ("locking_mode=exclusive", "synchronous=full", "wal_autocheckpoint=0"):
            connection.execute(f"pragma {setting}")
        connection.execute(f"pragma cache_size=-{_CACHE_KIB}")
        return connection

    def _find(self, is_last: bool) -> tuple[int, int]:
        """Return how many groups and parts there are, −1 groups where it was never made.

        Raises:
            CheckpointError: groups are missing that had been on disk.
        """
        written, has_rest = _groups_written(self._wal)
        if not written and (self._journal.exists() or not self._connection.execute(_NUM_TABLES).fetchone()[0]):
            return -1, 0
        groups = max(self._connection.execute(query).fetchone()[0] or 0 for query in _LAST_GROUP)
        num_missing = max(0, written - groups)
        if num_missing > 1 or (num_missing and not is_last):
            raise _damaged(self.path, f"{num_missing} groups of pushes behind group {groups} cannot be read")
        num_parts, last = self._connection.execute("select count(*), coalesce(max(seq), 0) from parts").fetchone()
        if num_parts != last:
            raise _damaged(self.path, f"it has {num_parts} of {last} parts of pushes")
        if num_missing or (has_rest and is_last):
            self.note = (
                f"{self.path}: dropped its last group of pushes, which was not whole; it followed group {groups}"
            )
        if num_missing:  # or it would be missed again, when this is no longer the last
            self._connection.close()
            with contextlib.closing(sqlite3.connect(self.path)) as connection:
                connection.execute("pragma wal_checkpoint(truncate)").fetchone()
            self._connection = self._connect()
        for name, step in self._connection.execute("select name, max(step) from parts group by name"):
            self.newest[name] = step
        return groups, num_parts


_NUM_TABLES = "select count(*) from sqlite_schema"
_LAST_GROUP = (
    "select max(num_group) from parts where seq = (select max(seq) from parts)",
    "select max(num_group) from records",
)


def _files(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal")]


def _groups_written(wal: Path) -> tuple[int, bool]:
    """Return how many groups a write-ahead log has the last frame of, damaged ones too, and whether frames follow."""
    num_groups, has_rest = 0, False
    with contextlib.suppress(FileNotFoundError), wal.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for at in range(_WAL_HEADER_BYTES, size, _FRAME_HEADER_BYTES + _PAGE_BYTES):
            header = os.pread(file.fileno(), _FRAME_HEADER_BYTES, at)
            is_frame = at + _FRAME_HEADER_BYTES + _PAGE_BYTES <= size
            ends_group = is_frame and struct.unpack(">I", header[4:8])[0] > 0  # pages after the commit; 0 inside one
            num_groups, has_rest = num_groups + ends_group, not ends_group
    return num_groups, has_rest


def _checksum(name: str, step: int, client: int, num_left: int, data: Bytes) -> int:
    return crc32c(data, crc32c(f"{name}/{step}/{client}/{num_left}".encode()))


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"a server's log must be whole; {path} is damaged: {what}; restore it from a copy, or move the log's folder "
        "away, create the tables anew and load them from their last checkpoint"
    )


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what SQLite raises into our errors."""
    try:
        yield
    except sqlite3.Error as error:
        kind = getattr(error, "sqlite_errorname", "")  # some are the module's own
        if kind.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise _damaged(path, str(error)) from None
        raise CheckpointError(
            f"a server's log must be readable; {path}: {error}; see that its disk works and has room"
        ) from None
