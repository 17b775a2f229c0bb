"""The steps in a directory, as folders: which are committed, who writes, how one appears and disappears.

    RUN/checkpoints/
      step-000000100/              committed: a zarr store, never changed again
      step-000000200-2/            step 200, saved again; supersedes step-000000200, which is then deleted
      .step-000000300.partial-71-c0de/  being written, or what a writer that died left; no reader looks at it
      .writer.lock                 held by the one writer

Imports neither torch nor zarr.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from mfdist.checkpoint.durability import fsync
from mfdist.checkpoint.layout import is_leftover, parse_step_name, partial_name, removed_name, step_name
from mfdist.checkpoint.lock import WriterLock
from mfdist.errors import CheckpointError


class StepSeries:
    """The step folders under `path`, which need not exist before the first is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: WriterLock | None = None

    @contextlib.contextmanager
    def writer_lock(self) -> Iterator[None]:
        """Keep other writers out; taken again inside, it is the same lock.

        Raises:
            UnavailableError: another writer holds the directory; the message names its process.
            CheckpointError: the directory cannot be made or written.
        """
        if self._lock is not None:
            if not self._lock.is_in_place():  # the directory was deleted since; the lock went with it
                self._lock.release()
                self._lock = self._acquire()
            yield
            return
        self._lock = self._acquire()
        try:
            yield
        finally:
            self._lock.release()
            self._lock = None

    def begin(self, step: int) -> Path:
        """Make and return the hidden folder in which a step is written; the lock is held."""
        partial = self.path / partial_name(step, os.getpid(), secrets.token_hex(4))
        partial.mkdir()
        return partial

    def commit(self, step: int, partial: Path) -> Path:
        """Make a written step visible: the one act that readers can see. Return its path.

        A step of the same number is superseded, and deleted once the new one is there.
        """
        superseded = self.revisions().get(step, {})
        final = self.path / step_name(step, max(superseded, default=0) + 1)
        partial.rename(final)
        fsync(self.path)
        # The step is committed; what cannot be deleted now, the next writer deletes.
        with contextlib.suppress(CheckpointError):
            self.clean()
        return final

    def remove(self, path: Path) -> None:
        """Delete a committed step: out of sight in one rename, so that no reader sees half of it."""
        hidden = self.path / removed_name(path.name, os.getpid())
        try:
            path.rename(hidden)
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint directory must be writable; cannot remove {path} ({error.strerror}); "
                "check its permissions and its disk."
            ) from error
        shutil.rmtree(hidden, ignore_errors=True)  # what stays is deleted by the next writer

    def clean(self) -> None:
        """Delete what dead writers left, and superseded steps."""
        for path in self._entries():
            if is_leftover(path.name):
                shutil.rmtree(path, ignore_errors=True)
        for revisions in self.revisions().values():
            for revision in sorted(revisions)[:-1]:
                self.remove(revisions[revision])

    def locate(self, step: int | None) -> tuple[int, Path]:
        """Return number and path of a committed step, by default the latest.

        Raises:
            CheckpointError: there is none.
        """
        committed = self.revisions()
        if not committed:
            raise CheckpointError(
                f"a checkpoint must have been committed; {self.path} holds none; check the path, or train until one is."
            )
        step = max(committed) if step is None else step
        if step not in committed:
            raise CheckpointError(
                f"step {step} must have been committed; {self.path} holds {_enumerate(sorted(committed))}; take one of "
                "those."
            )
        revisions = committed[step]
        return step, revisions[max(revisions)]

    def revisions(self) -> dict[int, dict[int, Path]]:
        """Return step → revision → path of what is committed."""
        found: dict[int, dict[int, Path]] = {}
        for path in self._entries():
            if (parsed := parse_step_name(path.name)) is not None and path.is_dir():
                found.setdefault(parsed[0], {})[parsed[1]] = path
        return found

    def _acquire(self) -> WriterLock:
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True, exist_ok=True)
                fsync(self.path.parent)
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint directory must be writable; cannot make {self.path} ({error.strerror}); "
                "choose another place."
            ) from error
        return WriterLock(self.path)

    def _entries(self) -> list[Path]:
        try:
            return list(self.path.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint directory must be readable; cannot list {self.path} ({error.strerror}); "
                "check the path and its permissions."
            ) from error


def _enumerate(steps: list[int]) -> str:
    listed = ", ".join(map(str, steps if len(steps) <= 8 else steps[-8:]))
    return f"step{'s' if len(steps) > 1 else ''} {'… ' if len(steps) > 8 else ''}{listed}"
