"""One segment of a server's log: a SQLite database that is only ever appended to, then removed as a whole.

It is in WAL mode and its write-ahead log is never folded into it while it is used, so that a group of pushes is
written once. Nothing is written to it after the process that made it: the frames of its write-ahead log are those of
its groups, one after the other, and can be counted. SQLite drops whatever follows a damaged frame and tells nobody;
the count does.

A large push lies in a plain file beside the database, which has its place and its checksum: SQLite would copy it three
times, sum it twice and write it page by page. It is on disk before the group that names it is.
"""

import contextlib
import os
import sqlite3
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mfdist.checkpoint.checksum import crc32c
from mfdist.checkpoint.direct_io import PageMemory
from mfdist.checkpoint.durability import Bytes, fsync
from mfdist.errors import CheckpointError
from mfdist.table_server.disk_room import reason_of
from mfdist.table_server.ledger_large import LargePushes, end_of

#: (table, step, client)
Key = tuple[str, int, int]

_LARGE_BYTES = 16384  # from here on beside the database, which costs a group a second fsync
_PAGE_BYTES = 4096
_CACHE_KIB = 16384
_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_SCHEMA = """
create table pushes (seq integer primary key, name text, step integer, client integer, num_group integer,
                     num_bytes integer, checksum integer, place integer, data blob);
create table records (key text primary key, value blob, num_group integer);
"""


class Segment:
    """A segment of the log. One thread writes, if this process made it; any may read.

    Args:
        path: of the database; it is opened to be read, so that a damaged one stays as it is.
        is_last: whether it may end in a group that was being written when its process died.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, path: Path, *, is_last: bool = True, _memory: PageMemory | None = None) -> None:
        self.path = path
        self.note = ""  # what recovery dropped
        self.newest: dict[str, int] = {}  # table → last step that is needed
        _, self._wal, _, self._journal, large = _files(path)
        self._lock = threading.Lock()
        self._large, self._large_bytes = LargePushes(large, _memory), 0
        self._connection = self._connect() if _memory is None else self._connect_to_write()
        try:
            with _named(path):
                self._num_groups = self._find(is_last)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, records: Mapping[str, bytes], memory: PageMemory) -> "Segment":
        """Make a new one that begins with these records, on disk when this returns.

        Args:
            path: of the database.
            records: key → value.
            memory: to write large pushes from.

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
            _files(path)[-1].touch(exist_ok=False)
            fsync(path.parent)
            return cls(path, _memory=memory)
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
        return num_bytes + self._large_bytes

    @property
    def is_whole(self) -> bool:
        """Say whether it was ever made; it was not if its process died over that."""
        return self._num_groups >= 0

    def commit(self, pushes: Sequence[tuple[Key, Sequence[Bytes]]], records: Mapping[str, bytes | None]) -> None:
        """Append a group, on disk when this returns; none of it is kept if this raises. A record of None is deleted.

        Raises:
            sqlite3.Error, OSError: the disk is full or fails. The same group may be tried again, and only the same: it
                then takes the place of what was written of it.
        """
        group, rows = self._num_groups + 1, []
        sizes = [sum(map(len, parts)) for _, parts in pushes]
        large = [parts for (_, parts), size in zip(pushes, sizes, strict=True) if size >= _LARGE_BYTES]
        places = iter(self._large.write(large, end_of(self._large_bytes)) if large else ())
        end = self._large_bytes
        for ((name, step, client), parts), size in zip(pushes, sizes, strict=True):
            place, data = None, None
            if size >= _LARGE_BYTES:
                place = next(places)
                end = place + size
            else:
                data = b"".join(parts)
            rows.append((name, step, client, group, size, _checksum(name, step, client, parts), place, data))
        with self._lock:
            try:
                self._connection.execute("begin immediate")
                self._connection.executemany(
                    "insert into pushes (name, step, client, num_group, num_bytes, checksum, place, data) "
                    "values (?, ?, ?, ?, ?, ?, ?, ?)",
                    rows,
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
        self._num_groups, self._large_bytes = group, end
        for (name, step, _), _ in pushes:
            self.newest[name] = max(step, self.newest.get(name, 0))

    def records(self) -> dict[str, bytes]:
        """Return all records as of the last group."""
        with self._lock, _named(self.path):
            found = self._connection.execute("select key, value from records where value is not null order by key")
            return dict(found.fetchall())

    def pushes(self) -> list[tuple[Key, int]]:
        """Return the key and the number of each push, in the order they were appended."""
        with self._lock, _named(self.path):
            found = self._connection.execute("select name, step, client, seq from pushes order by seq").fetchall()
        return [((name, step, client), seq) for name, step, client, seq in found]

    def payload(self, number: int) -> bytes:
        """Return a push by its number.

        Raises:
            CheckpointError: it is not what was written.
        """
        with self._lock, _named(self.path):
            found = self._connection.execute(
                "select name, step, client, num_bytes, checksum, place, data from pushes where seq = ?", (number,)
            ).fetchone()
            if found is None:
                raise _damaged(self.path, f"push {number} is not there")
            name, step, client, num_bytes, checksum, place, data = found
            payload: bytes = data if place is None else self._large.read(place, num_bytes)
        if len(payload) != num_bytes or _checksum(name, step, client, [payload]) != checksum:
            raise _damaged(self.path, f"the push of client {client} for step {step} of {name} fails its checksum")
        return payload

    def close(self) -> None:
        """Let it go; SQLite folds the write-ahead log into the database, or leaves it where there is no room."""
        self._connection.close()
        with self._lock:
            self._large.close()

    def remove(self) -> None:
        """Remove it from disk; what it holds must be needed no more."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self._wal, 0)  # or closing would fold it into a file that is gone
        for file in _files(self.path):
            file.unlink(missing_ok=True)
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        with self._lock:
            self._large.close()

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

    def _find(self, is_last: bool) -> int:
        """Return how many groups there are, −1 where it was never made.

        Raises:
            CheckpointError: groups are missing that had been on disk.
        """
        written, has_rest = _groups_written(self._wal)
        if not written and (self._journal.exists() or not self._connection.execute(_NUM_TABLES).fetchone()[0]):
            return -1
        groups = max(self._connection.execute(query).fetchone()[0] or 0 for query in _LAST_GROUP)
        num_missing = max(0, written - groups)
        if num_missing > 1 or (num_missing and not is_last):
            raise _damaged(self.path, f"{num_missing} groups of pushes behind group {groups} cannot be read")
        number, last, self._large_bytes = self._connection.execute(_EXTENT).fetchone()
        if number != last:
            raise _damaged(self.path, f"it has {number} of {last} pushes")
        if (size := self._large.num_bytes) < self._large_bytes:
            raise _damaged(self.path, f"large pushes must be {self._large_bytes} bytes; there are {size}")
        if num_missing or (has_rest and is_last):
            self.note = (
                f"{self.path}: dropped its last group of pushes, which was not whole; it followed group {groups}"
            )
        if num_missing:  # or it would be missed again, when this is no longer the last
            self._connection.close()
            with contextlib.closing(sqlite3.connect(self.path)) as connection:
                connection.execute("pragma wal_checkpoint(truncate)").fetchone()
            self._connection = self._connect()
        for name, step in self._connection.execute("select name, max(step) from pushes group by name"):
            self.newest[name] = step
        return groups


_EXTENT = "select count(*), coalesce(max(seq), 0), coalesce(max(place + num_bytes), 0) from pushes"
_NUM_TABLES = "select count(*) from sqlite_schema"
_LAST_GROUP = (
    "select max(num_group) from pushes where seq = (select max(seq) from pushes)",
    "select max(num_group) from records",
)


def _files(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal", "-large")]


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


def _checksum(name: str, step: int, client: int, parts: Sequence[Bytes]) -> int:
    checksum = crc32c(f"{name}/{step}/{client}/".encode())
    for part in parts:
        checksum = crc32c(part, checksum)
    return checksum


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"a server's log must be whole; {path} is damaged: {what}; restore it from a copy, or move the log's folder "
        "away, create the tables anew and load them from their last checkpoint"
    )


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system raise into our errors."""
    try:
        yield
    except CheckpointError:
        raise
    except (sqlite3.Error, OSError) as error:
        kind = getattr(error, "sqlite_errorname", "")  # some are the module's own
        if kind.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise _damaged(path, str(error)) from None
        raise CheckpointError(
            f"a server's log must be readable; {path}: {reason_of(error, path)}; see that its disk works and has room"
        ) from None
