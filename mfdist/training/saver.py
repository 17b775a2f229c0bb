"""Keeps a run's checkpoints while it trains, as its configuration says, and tells of each once it is committed."""

from types import TracebackType
from typing import Self

from mfdist.checkpoint.background import BackgroundSaver
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.host_copy import num_bytes
from mfdist.checkpoint.retention import Retention
from mfdist.checkpoint.state import CheckpointState
from mfdist.config_places import CheckpointConfig
from mfdist.training.events import Observer, Saved, Warned


class RunSaver:
    """Saves in the background, or at once where the configuration says so.

    Call order: `save` at the steps to keep, `report` after every step, `finish` after the last. Each may raise what a
    save came to, also an earlier one.
    """

    def __init__(self, checkpoints: CheckpointDirectory, config: CheckpointConfig, tell: Observer) -> None:
        self._tell = tell
        self._config = config
        self._is_first = True
        self._saver = BackgroundSaver(
            checkpoints,
            retention=Retention(keep_last=config.keep_last, keep_every=config.keep_every),
            is_incremental=config.incremental,
            max_copy_bytes=int(config.max_copy_gib * 2**30) if config.asynchronous else 0,
        )

    def save(self, state: CheckpointState) -> None:
        """Save a state whose tensors may change when this returns."""
        if self._is_first and self._config.asynchronous and not self._saver.is_copied(state):
            self._tell(
                Warned(
                    message=f"training waits for the disk at a checkpoint: {num_bytes(state) / 2**30:.2g} GiB to copy "
                    f"are more than checkpoint.max_copy_gib={self._config.max_copy_gib:g}; raise it if memory allows"
                )
            )
        self._is_first = False
        self._saver.save(state)

    def report(self) -> None:
        """Tell of the saves that were committed meanwhile."""
        self._tell_all(is_waiting=False)

    def finish(self) -> None:
        """Wait for the save under way, and tell of it."""
        self._tell_all(is_waiting=True)

    def _tell_all(self, *, is_waiting: bool) -> None:
        for saved in self._saver.wait() if is_waiting else self._saver.poll():
            info = saved.info
            self._tell(
                Saved(
                    step=info.step,
                    path=info.path,
                    num_bytes=info.num_bytes,
                    written_bytes=info.written_bytes,
                    save_s=saved.save_s,
                    stall_s=saved.stall_s,
                )
            )

    def __enter__(self) -> Self:
        self._saver.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._saver.__exit__(kind, error, traceback)
