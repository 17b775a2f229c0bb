"""The steps of a run, as folders: which are committed, who writes, how one appears and disappears.

On a file system:

    RUN/checkpoints/
      step-000000100/              committed: a zarr store, never changed again
      step-000000200-2/            step 200, saved again; supersedes step-000000200, which is then deleted
      .step-000000300.partial-71-c0de/  being written, or what a writer that died left; no reader looks at it
      .writer.lock                 held by the one writer

An object store has its own way, see `object_store.py`. Imports neither torch nor zarr.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from mfdist.checkpoint.durability import fsync
from mfdist.checkpoint.folder import Folder, LocalFolder
from mfdist.checkpoint.layout import is_leftover, parse_step_name, partial_name, removed_name, step_name
from mfdist.checkpoint.lock import WriterLock
from mfdist.checkpoint.manifest import MANIFEST, Manifest
from mfdist.errors import CheckpointError

_SYNCS_AT_ONCE = 8


class NotSavedError(CheckpointError):
    """No such step or table was saved. What there is, is whole; ask for that."""


class StepSeries(Protocol):
    """The steps at a place. One process writes at a time, in this order: `writer_lock`, `begin`, `commit`."""

    @property
    def path(self) -> Path | str:
        """Return the place, an URL as text."""

    def is_there(self) -> bool:
        """Say whether the place exists."""

    def writer_lock(self) -> AbstractContextManager[None]:
        """Keep other writers out; taken again inside, it is the same lock.

        Raises:
            UnavailableError: another writer holds it; the message names its process.
            CheckpointError: the place cannot be made or written.
        """

    def begin(self, step: int) -> Folder:
        """Return a new folder in which a step is written, and which readers do not see."""

    def folder(self, name: str) -> Folder:
        """Return a folder of the place by its name: one that another rank has begun, or a committed one."""

    def commit(self, step: int, folder: Folder, manifest: Manifest) -> Folder:
        """Make a written step visible by one act, with its manifest; return its folder.

        A step of the same number is superseded, and removed once the new one is there.

        Raises:
            CheckpointError: a file that was written is not there any more.
        """

    def clean(self) -> None:
        """Remove what dead writers left, and superseded steps; only under the lock."""

    def remove(self, folder: Folder) -> None:
        """Remove a committed step: no reader sees half of it; only under the lock."""

    def revisions(self) -> dict[int, dict[int, Folder]]:
        """Return step → revision → folder of what is committed."""


def locate(series: StepSeries, step: int | None) -> tuple[int, Folder]:
    """Return number and folder of a committed step, by default the latest.

    Raises:
        NotSavedError: there is none.
    """
    committed = series.revisions()
    if not committed:
        raise NotSavedError(
            f"a checkpoint must have been committed; {series.path} holds none; check the path, or train until one is."
        )
    step = max(committed) if step is None else step
    if step not in committed:
        raise NotSavedError(
            f"step {step} must have been committed; {series.path} holds {_enumerate(sorted(committed))}; take one of "
            "those."
        )
    revisions = committed[step]
    return step, revisions[max(revisions)]


class LocalSeries:
    """The step folders under `path`, which need not exist before the first is written; see `StepSeries`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: WriterLock | None = None

    @property
    def path(self) -> Path:
        """Return the folder of them all."""
        return self._path

    def is_there(self) -> bool:
        """Say whether it exists."""
        return self._path.is_dir()

    @contextlib.contextmanager
    def writer_lock(self) -> Iterator[None]:
        """Keep other writers out; see `StepSeries`."""
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

    def begin(self, step: int) -> LocalFolder:
        """Make and return the hidden folder in which a step is written."""
        partial = self.path / partial_name(step, os.getpid(), secrets.token_hex(4))
        partial.mkdir()
        return LocalFolder(partial)

    def folder(self, name: str) -> LocalFolder:
        """Return a folder by its name."""
        return LocalFolder(self.path / name)

    def commit(self, step: int, folder: Folder, manifest: Manifest) -> LocalFolder:
        """Write the manifest, sync the folders, and rename the step into place; see `StepSeries`."""
        folder.make([MANIFEST.rpartition("/")[0]])
        folder.write(MANIFEST, manifest.to_bytes())
        folder.sync()
        check_all_there(folder, {**manifest.file_sizes, MANIFEST: len(manifest.to_bytes())})
        partial = Path(folder.path)
        with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
            for _ in pool.map(lambda entry: fsync(Path(entry[0])), os.walk(partial)):
                pass  # a failed fsync is raised here
        superseded = self.revisions().get(step, {})
        final = self.path / step_name(step, max(superseded, default=0) + 1)
        partial.rename(final)
        fsync(self.path)
        # The step is committed; what cannot be deleted now, the next writer deletes.
        with contextlib.suppress(CheckpointError):
            self.clean()
        return LocalFolder(final)

    def remove(self, folder: Folder) -> None:
        """Delete a committed step: out of sight in one rename, so that no reader sees half of it."""
        path = Path(folder.path)
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

    def revisions(self) -> dict[int, dict[int, Folder]]:
        """Return step → revision → folder of what is committed."""
        found: dict[int, dict[int, Folder]] = {}
        for path in self._entries():
            if (parsed := parse_step_name(path.name)) is not None and path.is_dir():
                found.setdefault(parsed[0], {})[parsed[1]] = LocalFolder(path)
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


def check_all_there(folder: Folder, sizes: Mapping[str, int]) -> None:
    """Raise CheckpointError unless the folder has the files that were written, and no other.

    Somebody may have deleted it meanwhile; making it again would leave a part of the files.
    """
    if (found := folder.files()) != sizes:
        name = min(dict(found.items() ^ sizes.items()))
        raise CheckpointError(
            f"nobody else may touch a step being written; {folder.path}/{name} was changed or removed; save again."
        )


def _enumerate(steps: list[int]) -> str:
    listed = ", ".join(map(str, steps if len(steps) <= 8 else steps[-8:]))
    return f"step{'s' if len(steps) > 1 else ''} {'… ' if len(steps) > 8 else ''}{listed}"
