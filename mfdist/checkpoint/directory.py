"""A run's checkpoint directory: an append-only series of steps, each committed by one rename.

    RUN/checkpoints/
      step-000000100/              committed: a zarr store, never changed again
      step-000000200-2/            step 200, saved again; supersedes step-000000200, which is then deleted
      .step-000000300.partial-71-c0de/  being written, or what a writer that died left; no reader looks at it
      .writer.lock                 held by the one writer

Readers take no lock. Listing and pruning import neither torch nor zarr.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mfdist.checkpoint.damage import Damage
from mfdist.checkpoint.durability import fsync
from mfdist.checkpoint.layout import is_leftover, parse_step_name, partial_name, removed_name, step_name
from mfdist.checkpoint.lock import WriterLock
from mfdist.checkpoint.manifest import Manifest
from mfdist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from mfdist.checkpoint.state import CheckpointState


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """A committed step, as its manifest describes it."""

    step: int
    path: Path
    num_bytes: int = 0
    num_files: int = 0
    num_tables: int = 0
    created: str = ""  # ISO 8601, UTC
    damage: str | None = None  # why the manifest cannot be read; then the fields above but `path` and `step` are empty


class CheckpointDirectory:
    """The steps under `path`, which need not exist before the first save.

    One thread at a time may save or prune through one object; reading is safe from any thread and process.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: WriterLock | None = None

    def save(self, state: "CheckpointState") -> StepInfo:
        """Write `state` beside the committed steps and commit it.

        A step that exists already is superseded: the new one is committed under a higher revision, then the old one is
        deleted, so that at every moment one of them is there, whole. What dead writers left is deleted first.

        Raises:
            ConfigError: a tensor or name cannot be stored.
            UnavailableError: another writer holds the directory.
            CheckpointError: the disk is full, failing or read-only, or the directory was deleted meanwhile.
            In each case the committed steps are untouched, what was half written is removed, and a retry is safe.

        Cost: every byte is written and fsynced once; see `write_step`.
        """
        from mfdist.checkpoint.writer import arrays_of, write_step

        arrays = arrays_of(state)
        with self.writer_lock():
            self._remove_leftovers()
            partial = self.path / partial_name(state.step, os.getpid(), secrets.token_hex(4))
            superseded = self._revisions().get(state.step, {})
            final = self.path / step_name(state.step, max(superseded, default=0) + 1)
            try:
                manifest = write_step(partial, state, arrays)
                partial.rename(final)  # the commit: the one act that readers can see
                fsync(self.path)
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(
                    f"step {state.step} must be written whole to be saved; writing under {self.path} failed "
                    f"({_reason(error)}); earlier steps are intact, make room or mend the disk and save again."
                ) from error
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            # The step is committed; what cannot be deleted now, the next writer deletes.
            with contextlib.suppress(CheckpointError):
                self._remove_leftovers()
        return _step_info(state.step, final, manifest)

    def load(self, step: int | None = None, *, device: "torch.device | str" = "cpu") -> "CheckpointState":
        """Load a step, by default the latest.

        Raises:
            CheckpointError: there is no such step, or it is damaged; the message names file, table and rows. A damaged
                latest step is not passed over silently: name an earlier one.

        Cost: see `load_step`.
        """
        from mfdist.checkpoint.reader import load_step

        return load_step(self._locate(step)[1], device)

    def steps(self) -> list[StepInfo]:
        """Return the committed steps, ascending; empty where the directory does not exist."""
        infos = []
        for step, revisions in sorted(self._revisions().items()):
            path = revisions[max(revisions)]
            try:
                infos.append(_step_info(step, path, Manifest.read(path)))
            except CheckpointError as error:
                if path.exists():  # otherwise it was pruned between the listing and here
                    infos.append(StepInfo(step=step, path=path, damage=str(error)))
        return infos

    def verify(
        self, step: int | None = None, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Damage]:
        """Return what is wrong with a step, by default the latest; empty if it is whole.

        Args:
            step: a committed step.
            on_progress: called with (bytes checked, bytes in all) after each file.

        Raises:
            CheckpointError: there is no such step.
        """
        from mfdist.checkpoint.reader import verify_step

        step, path = self._locate(step)
        return verify_step(path, step, on_progress)

    def prune(self, keep_last: int) -> list[int]:
        """Delete all but the latest `keep_last` steps; return those deleted, ascending.

        Raises:
            ConfigError: `keep_last` is below 1.
            UnavailableError: another writer holds the directory.
            CheckpointError: the directory cannot be written.
        """
        if keep_last < 1:
            raise ConfigError(f"keep_last must be at least 1; got {keep_last}; delete the directory to keep none.")
        if not self.path.is_dir():
            return []
        with self.writer_lock():
            self._remove_leftovers()
            outdated = sorted(self._revisions().items())[:-keep_last]
            for _, revisions in outdated:
                for path in revisions.values():
                    self._remove(path)
        return [step for step, _ in outdated]

    @contextlib.contextmanager
    def writer_lock(self) -> Iterator[None]:
        """Keep other writers out; a run holds this for as long as it may save. Saves inside take no other lock.

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

    def _remove(self, path: Path) -> None:
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

    def _remove_leftovers(self) -> None:
        for path in self._entries():
            if is_leftover(path.name):
                shutil.rmtree(path, ignore_errors=True)
        for revisions in self._revisions().values():
            for revision in sorted(revisions)[:-1]:
                self._remove(revisions[revision])

    def _locate(self, step: int | None) -> tuple[int, Path]:
        committed = self._revisions()
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

    def _revisions(self) -> dict[int, dict[int, Path]]:
        """Return step → revision → path of what is committed."""
        found: dict[int, dict[int, Path]] = {}
        for path in self._entries():
            if (parsed := parse_step_name(path.name)) is not None and path.is_dir():
                found.setdefault(parsed[0], {})[parsed[1]] = path
        return found

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


def _step_info(step: int, path: Path, manifest: Manifest) -> StepInfo:
    return StepInfo(
        step=step,
        path=path,
        num_bytes=manifest.num_bytes,
        num_files=len(manifest.files),
        num_tables=len({array.split("/")[1] for array in manifest.arrays if array.startswith("tables/")}),
        created=manifest.created,
    )


def _reason(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error)


def _enumerate(steps: list[int]) -> str:
    listed = ", ".join(map(str, steps if len(steps) <= 8 else steps[-8:]))
    return f"step{'s' if len(steps) > 1 else ''} {'… ' if len(steps) > 8 else ''}{listed}"
