"""A run's checkpoints: saved whole or not at all, by one process or many, and loaded under any other division.

Every rank makes a `CheckpointDirectory` of the same path, which all see; a process by itself needs nothing else.
Listing, verifying and pruning import neither torch nor zarr before they must. Readers take no lock.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mfdist.checkpoint.damage import Damage
from mfdist.checkpoint.folder import Folder, is_url
from mfdist.checkpoint.manifest import Manifest
from mfdist.checkpoint.ranks import OneRank, Ranks, together
from mfdist.checkpoint.retention import Retention
from mfdist.checkpoint.series import LocalSeries, StepSeries, locate
from mfdist.checkpoint.step_info import StepInfo
from mfdist.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from mfdist.checkpoint.state import CheckpointState
    from mfdist.spec import Region


class CheckpointDirectory:
    """The steps under `path`, which need not exist before the first save.

    One thread at a time may save or prune through one object; reading is safe from any thread and process.

    Args:
        path: the directory, with several ranks on a file system that all of them share; or an URL, s3://BUCKET/PREFIX.
        ranks: who saves together; by default this process alone.
    """

    def __init__(self, path: Path | str, *, ranks: Ranks | None = None) -> None:
        self.series = _series_at(path)
        self.path = self.series.path
        self.ranks = ranks or OneRank()

    def save(self, state: "CheckpointState", *, is_incremental: bool = True) -> StepInfo:
        """Write `state` beside the committed steps and commit it.

        A step that exists already is superseded: the new one is committed under a higher revision, then the old one is
        deleted, so that at every moment one of them is there, whole. What dead writers left is deleted first.

        Args:
            state: what this rank holds; it must not change until this returns.
            is_incremental: whether a file that holds what it held in the last step becomes a hard link to that one's,
                instead of being written again.

        Raises:
            ConfigError: a tensor or name cannot be stored, or the ranks' shards leave a hole.
            UnavailableError: another writer holds the directory, or a rank is late.
            CheckpointError: the disk is full, failing or read-only, or the directory was deleted meanwhile.

        After an error the committed steps are untouched on all ranks, what was half written is removed, and a retry is
        safe.

        Called on: every rank, at the same steps.
        Cost: every byte that changed is written and fsynced once; nothing is gathered. Of files that lie across the
            shards of several ranks, all pieces but the largest are written twice.
        """
        from mfdist.checkpoint.saving import Saving

        return Saving(state, self.series, self.ranks, is_incremental=is_incremental).run()

    def load(
        self,
        step: int | None = None,
        *,
        device: "torch.device | str" = "cpu",
        tables: Collection[str] | None = None,
        shards: "Mapping[str, Sequence[Region]] | None" = None,
    ) -> "CheckpointState":
        """Load a step, by default the latest, into new tensors.

        Args:
            step: a committed step.
            device: where the tensors are made.
            tables: names of the tables to load whole; by default all, or none where `shards` are given.
            shards: table → the regions of it that this rank holds, under whatever plan; they come back as `shards`.

        Raises:
            CheckpointError: there is no such step or table, or a file is damaged; the message names file, table and
                rows. A damaged latest step is not passed over silently: name an earlier one.

        Called on: any rank; on all of them where there are several and `step` is not given.
        Cost: each file with any of what is wanted is read once, and checked; a host copy of NUM_READERS files.
        """
        from mfdist.checkpoint.loading import load_step
        from mfdist.checkpoint.step_files import StepFiles

        with StepFiles(self._locate(step)) as files:
            return load_step(files, device, tables, shards or {})

    def load_into(
        self, target: "CheckpointState", step: int | None = None, *, allow_unused: bool = False
    ) -> "CheckpointState":
        """Fill the tensors of `target` from a step, by default the latest.

        Args:
            target: tables, shards and dense tensors to fill in place; its step and attributes are not looked at.
            step: a committed step.
            allow_unused: whether the step may hold more than is asked for.

        Returns:
            The same tensors with the step's number and attributes.

        Raises:
            CheckpointError: as `load`; or an array is missing, left over, or of another shape or dtype. Whatever can be
                known before reading is said before anything is filled.

        Called on: as `load`.
        """
        from mfdist.checkpoint.loading import load_step_into
        from mfdist.checkpoint.step_files import StepFiles

        with StepFiles(self._locate(step)) as files:
            return load_step_into(files, target, allow_unused=allow_unused)

    def steps(self) -> list[StepInfo]:
        """Return the committed steps, ascending; empty where the directory does not exist."""
        infos = []
        for step, revisions in sorted(self.series.revisions().items()):
            folder = revisions[max(revisions)]
            try:
                infos.append(StepInfo.of(step, folder.path, Manifest.read(folder)))
            except CheckpointError as error:
                if folder.is_there():  # otherwise it was pruned between the listing and here
                    infos.append(StepInfo(step=step, path=folder.path, damage=str(error)))
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

        step, folder = locate(self.series, step)
        return verify_step(folder, step, on_progress)

    def prune(self, keep_last: int, keep_every: int = 0) -> list[int]:
        """Delete all but the latest `keep_last` steps and those that `keep_every` divides; return those deleted.

        Files that a kept step shares with a deleted one stay, under the kept step's name. A step whose manifest or
        files are missing or cut short does not count, and stays where it is later than those that do; `verify` finds
        more.

        Raises:
            ConfigError: `keep_last` is below 1, or `keep_every` below 0.
            UnavailableError: another writer holds the directory.
            CheckpointError: the directory cannot be written.

        Called on: rank 0; it does nothing on others.
        """
        retention = Retention(keep_last=keep_last, keep_every=keep_every)
        if self.ranks.rank != 0 or not self.series.is_there():
            return []
        with self.writer_lock():
            self.series.clean()
            committed = self.series.revisions()
            outdated = _outdated(committed, retention)
            for step in outdated:
                for folder in committed[step].values():
                    self.series.remove(folder)
        return outdated

    def outdated(self, keep_last: int, keep_every: int = 0) -> list[int]:
        """Return the steps that `prune` would delete now.

        Raises:
            ConfigError: as `prune`.
        """
        return _outdated(self.series.revisions(), Retention(keep_last=keep_last, keep_every=keep_every))

    @contextlib.contextmanager
    def writer_lock(self) -> Iterator[None]:
        """Keep other writers out; a run holds this for as long as it may save. Saves inside take no other lock.

        Raises:
            UnavailableError: another writer holds the directory; the message names its process.
            CheckpointError: the directory cannot be made or written.

        Called on: rank 0; it does nothing on others.
        """
        with self.series.writer_lock() if self.ranks.rank == 0 else contextlib.nullcontext():
            yield

    def _locate(self, step: int | None) -> Folder:
        """Return the folder of a step; where none is named and there are several ranks, of the one that rank 0 sees."""
        if step is None and self.ranks.world_size > 1:
            self.ranks.begin()
            step = together(self.ranks, "latest", lambda: locate(self.series, None)[0])[0]
        return locate(self.series, step)[1]


def _outdated(committed: Mapping[int, Mapping[int, Folder]], retention: Retention) -> list[int]:
    def looks_whole(step: int) -> bool:
        folder = committed[step][max(committed[step])]
        try:
            listed, found = Manifest.read(folder).file_sizes, folder.files()
        except (CheckpointError, OSError):
            return False
        return all(found.get(name) == num_bytes for name, num_bytes in listed.items())

    return retention.outdated(committed, looks_whole)


def _series_at(path: Path | str) -> StepSeries:
    if isinstance(path, str) and is_url(path):
        from mfdist.checkpoint.object_store import ObjectSeries

        return ObjectSeries(path)
    return LocalSeries(Path(path))
