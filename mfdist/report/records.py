"""A run's metrics, read as they are written: only what is new is parsed again."""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class RunRecords:
    """The records of a metrics file by event, in the order they happened.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self.by_event: dict[str, list[Record]] = {}
        self.first: Record | None = None
        self.last: Record | None = None
        self.longest_gap_s = 0.0  # between two records of one stretch of training
        self.is_torn = False  # what follows cannot be read: a line that a crash left half written

    def refresh(self) -> bool:
        """Read what was appended since; begin anew where the file was replaced. Return whether anything changed."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                if identity != self._file or status.st_size < self._offset:
                    self._begin(identity)
                elif status.st_size == self._offset:
                    return False
                file.seek(self._offset)
                self._take(file.read())
        except FileNotFoundError:
            was_there, self._file = self._file is not None, None
            if was_there:
                self._begin(None)
            return was_there
        return True

    @property
    def version(self) -> str:
        """Return what changes whenever records do."""
        return f"{self._file[1] if self._file else 0:x}.{self._offset:x}"

    def of(self, event: str) -> list[Record]:
        """Return the records of one kind of event."""
        return self.by_event.get(event, [])

    def last_of(self, event: str) -> Record | None:
        """Return the latest of one kind, if there is one."""
        found = self.of(event)
        return found[-1] if found else None

    def _begin(self, identity: tuple[int, int] | None) -> None:
        self._file, self._offset, self.by_event = identity, 0, {}
        self.first = self.last = None
        self.longest_gap_s = 0.0
        self.is_torn = False

    def _take(self, content: bytes) -> None:
        """Take whole lines; the last one may still be in the writing."""
        end = content.rfind(b"\n") + 1
        self._offset += end
        for line in content[:end].splitlines():
            if self.is_torn:
                return
            try:
                record = json.loads(line)
            except ValueError:  # also bytes that are no text
                self.is_torn = True
                return
            if not isinstance(record, dict):
                self.is_torn = True
                return
            self.by_event.setdefault(str(record.get("event")), []).append(record)
            if self.last is not None and record.get("event") != "started":
                self.longest_gap_s = max(self.longest_gap_s, record.get("time", 0.0) - self.last.get("time", 0.0))
            self.first = self.first or record
            self.last = record
