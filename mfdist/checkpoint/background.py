"""Saving while training goes on: it waits for a copy in host memory, the disk is a thread's affair.

The thread's work is copies by numpy, checksums, and waiting for the disk, all of which leave Python free for training.
It takes the processor time that training leaves, and little more where that is none: a save takes longer there, so that
training need not. Ranks talk through the store given to the directory, never through training's own collectives.
"""

import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.holding import holdings_of
from mfdist.checkpoint.host_copy import HostCopy, num_bytes
from mfdist.checkpoint.retention import Retention
from mfdist.checkpoint.step_info import StepInfo
from mfdist.errors import ConfigError

if TYPE_CHECKING:
    from mfdist.checkpoint.state import CheckpointState

#: Leaves saving a tenth of a processor that training keeps busy; at 19, the least, saves hardly end on a full host.
_NICENESS = 10


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """A save that came to its end."""

    info: StepInfo
    stall_s: float  # how long `save` took, training waiting
    save_s: float  # from its beginning until the step was committed


class BackgroundSaver:
    """Saves into a directory, one step at a time; `save` returns once the state is copied.

    Call order: `save` now and then, `poll` after every training step, `wait` before the results are looked at. A failed
    save is raised by whichever of them comes next, once; earlier steps are untouched, and saving may go on. Leaving the
    `with` block waits for the save that is under way.

    Args:
        directory: where to.
        retention: what to keep once a step is committed; by default everything.
        is_incremental: as for `CheckpointDirectory.save`.
        max_copy_bytes: host memory a copy may take. There is never more than one: a save waits for the one before. A
            state that is larger is saved while training waits.

    Called on: every rank, one thread of each.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        *,
        retention: Retention | None = None,
        is_incremental: bool = True,
        max_copy_bytes: int = 4 << 30,
    ) -> None:
        self._directory = directory
        self._retention = retention
        self._is_incremental = is_incremental
        self._max_copy_bytes = max_copy_bytes
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, "mfdist-checkpoint-save", initializer=_let_others_run_first)
        self._under_way: Future[SavedStep] | None = None
        self._finished: list[SavedStep] = []

    def save(self, state: "CheckpointState") -> None:
        """Copy `state`, whose tensors may change afterwards, and have it written; wait for an earlier save first.

        Raises:
            MfdistError: as from `CheckpointDirectory.save`, for what goes wrong before the copy is made, and for an
                earlier save.
        """
        start = time.perf_counter()
        self._await()
        try:
            holdings_of(state)  # what cannot be saved is said now
        except ConfigError as error:
            self._directory.ranks.begin()
            self._directory.ranks.fail(error)
            raise
        is_copied = self.is_copied(state)
        if is_copied:
            state = self._copy.take(state)
        copied_s = time.perf_counter() - start

        def save() -> SavedStep:
            info = self._directory.save(state, is_incremental=self._is_incremental)
            save_s = time.perf_counter() - start
            if self._retention is not None:
                self._directory.prune(self._retention.keep_last, self._retention.keep_every)
            return SavedStep(info=info, stall_s=copied_s if is_copied else save_s, save_s=save_s)

        if is_copied:
            self._under_way = self._thread.submit(save)
        else:
            self._finished.append(save())

    def is_copied(self, state: "CheckpointState") -> bool:
        """Say whether `save` would copy a state and return, because it is not larger than a copy may be."""
        return num_bytes(state) <= self._max_copy_bytes

    def poll(self) -> list[SavedStep]:
        """Return the saves that were committed since this or `wait` was last called; never waits.

        Raises:
            CheckpointError, UnavailableError: a save failed.
        """
        if self._under_way is not None and self._under_way.done():
            self._await()
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> list[SavedStep]:
        """Do as `poll`, after the save under way has ended."""
        self._await()
        return self.poll()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._await()
        finally:
            self._thread.shutdown(wait=True)

    def _await(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._finished.append(under_way.result())


def _let_others_run_first() -> None:
    """Lower the priority of this thread and of those it starts."""
    if sys.platform == "linux":  # elsewhere only whole processes have one
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
