"""One writer at a time where there are no file locks: a lease in an object that its holder renews.

Whoever finds the lock taken watches it. If it changes, its holder lives, and the watcher is refused; if it does not for
as long as a lease lasts, the holder is dead, and the watcher takes it over. Only durations are measured, each on the
watcher's own clock, so clocks that disagree do no harm.
"""

import contextlib
import secrets
import threading
import time
from typing import Protocol

from mfdist.errors import UnavailableError

#: How long a dead holder's lease keeps others out.
LEASE_S = 60.0
_RENEWALS = 4  # in that time
_LOOKS = 20


class LeaseObject(Protocol):
    """An object with versions; what comes too late raises FileExistsError, what is missing FileNotFoundError."""

    def create(self, content: bytes) -> str:
        """Make it if it is not there; return its version."""

    def update(self, content: bytes, version: str) -> str:
        """Replace exactly this version; return the new one."""

    def read(self) -> tuple[bytes, str]:
        """Return content and version."""

    def delete(self) -> None:
        """Remove it."""


class Lease:
    """A lease, held from construction to `release`, renewed by a thread of its own.

    Args:
        lock: the object.
        place: what it guards, for messages.
        holder: who this is, for the messages of others.
        lease_s: how long it lasts without a renewal.

    Raises:
        UnavailableError: another writer holds it and lives.
        OSError: the store does not answer.
    """

    def __init__(self, lock: LeaseObject, place: str, holder: str, lease_s: float) -> None:
        self._lock = lock
        self._holder = holder
        self._lease_s = lease_s
        self._version = self._acquire(place)
        self._renewed_at = time.monotonic()
        self._is_lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="mfdist-checkpoint-lease", daemon=True)
        self._thread.start()

    def is_held(self) -> bool:
        """Say whether nobody can have taken it over."""
        return not self._is_lost and time.monotonic() - self._renewed_at < self._lease_s

    def release(self) -> None:
        """Let the next writer in."""
        self._released.set()
        self._thread.join()
        if self.is_held():
            with contextlib.suppress(OSError):  # or it runs out
                self._lock.delete()

    def _acquire(self, place: str) -> str:
        with contextlib.suppress(FileExistsError):
            return self._lock.create(self._content())
        watched_since, seen = time.monotonic(), ""
        while True:
            try:
                content, version = self._lock.read()
                if seen and version != seen:
                    raise _refusal(place, content)
                seen = version
                if time.monotonic() - watched_since > self._lease_s:
                    return self._lock.update(self._content(), version)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # another one was quicker, and lives
                    return self._lock.create(self._content())
            except FileExistsError:
                raise _refusal(place, b"another process") from None
            time.sleep(self._lease_s / _LOOKS)

    def _renew(self) -> None:
        while not self._released.wait(self._lease_s / _RENEWALS):
            try:
                self._version = self._lock.update(self._content(), self._version)
                self._renewed_at = time.monotonic()
            except (FileExistsError, FileNotFoundError):
                self._is_lost = True
                return
            except OSError:
                continue  # the store may answer again before the lease runs out

    def _content(self) -> bytes:
        return f"{self._holder}\n{secrets.token_hex(8)}\n".encode()


def _refusal(place: str, content: bytes) -> UnavailableError:
    holder = content.decode(errors="replace").partition("\n")[0] or "an unnamed process"
    return UnavailableError(
        f"one writer at a time may use {place}; {holder} is writing to it; "
        "wait for it or stop it, or choose another directory."
    )
