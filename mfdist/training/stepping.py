"""Steps one after the other, each timed: on a GPU, the next is queued before the figures of the last are read."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mfdist.config import RunConfig
from mfdist.training.device import peak_memory_bytes, synchronize
from mfdist.training.events import Stepped
from mfdist.training.profile import LOOKUPS, time_shares
from mfdist.training.step import QueuedStep, StepResult, TrainStep

#: Between measurements of what a step's time goes to, which take a few times as long as a quick step, at least so many
#: steps and so many seconds pass.
PROFILE_EVERY = 50
PROFILE_EVERY_S = 20.0


class _Waiting(NamedTuple):
    step: int
    queued: QueuedStep
    start: float
    #: When it ended, where it was waited for without being read, and what its time went to, where that was measured.
    end: float | None = None
    shares: dict[str, float] | None = None


class Stepping:
    """Makes steps and tells of them, a GPU's one step late unless they are asked for.

    Call order: `step` for rising steps; `rest` before anything looks at the model, if the last step was not read.

    Args:
        train_step: makes one step.
        batch_at: step → its inputs and targets.
        config: of the run.
        device: of the model.
        first_profiled: the first step whose time may be taken apart, before its passes are one call; None for none.
        is_ahead: whether a step is queued before the last one's figures are read; by default on a GPU, which then has
            no time to wait for the host.
    """

    def __init__(
        self,
        train_step: TrainStep,
        batch_at: Callable[[int], tuple[Tensor, Tensor]],
        config: RunConfig,
        device: torch.device,
        *,
        first_profiled: int | None = None,
        is_ahead: bool | None = None,
    ) -> None:
        self._train_step = train_step
        self._batch_at = batch_at
        self._config = config
        self._device = device
        self._is_ahead = device.type == "cuda" if is_ahead is None else is_ahead
        self._waiting: _Waiting | None = None
        #: The last step that was read, and when.
        self._last: QueuedStep | None = None
        self._last_end = 0.0
        #: The first step and the first time at which a step may be profiled.
        self._next_profile = (float("inf") if first_profiled is None else first_profiled, 0.0)
        #: Seconds of each finished step that was not profiled.
        self.seconds: list[float] = []

    def step(self, step: int, *, is_read: bool = False) -> Iterator[Stepped]:
        """Make a step, or queue it; yield what is told of the last one, if it was not read, and of this one, if it is.

        Args:
            step: finished and queued steps so far.
            is_read: wait for this step too.

        Raises:
            NonFiniteError: one of them was not finite; see `TrainStep`.
            Exception: what reading the batch or making the step raises, after the last step was told of.
        """
        start = time.perf_counter()
        is_profiled = step >= self._next_profile[0] and start >= self._next_profile[1]
        is_profiled &= not self._train_step.is_one_call  # whose time is not taken apart
        # Either way a step is queued before the last one is read: ranks choose by clocks of their own, and after a step
        # that was not finite all of them must find that out at the same place.
        try:
            queued = self._profiled(step) if is_profiled else self._queued(step, start)
        except Exception:
            with contextlib.suppress(Exception):  # the step before is told of; what failed now is the error
                yield from self.rest()
            raise
        yield from self.rest()
        self._waiting = queued
        if is_read or not self._is_ahead:
            yield from self.rest()

    def rest(self) -> Iterator[Stepped]:
        """Wait for the step that was not read, and yield what is told of it."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            result = waiting.queued.result()
            end = time.perf_counter() if waiting.end is None else waiting.end
            step_s = self._step_s(waiting, end)
            self._last, self._last_end = waiting.queued, end
            if waiting.shares is None:
                self.seconds.append(step_s)
            yield self._told(waiting.step, result, step_s, waiting.shares)

    def _step_s(self, waiting: _Waiting, end: float) -> float:
        """Return the time of a step, by the device's clock where it has one: what is read late ended before.

        If it was queued while another ran, from that one's end.
        """
        is_behind = waiting.start < self._last_end
        by_device = waiting.queued.seconds_since(self._last if is_behind else None)
        return end - max(waiting.start, self._last_end) if by_device is None else by_device

    def _queued(self, step: int, start: float) -> _Waiting:
        return _Waiting(step, self._train_step.queue(step, *self._batch_at(step)), start)

    def _profiled(self, step: int) -> _Waiting:
        """Make a step by itself, with the device idle before and after, and measure what its time goes to."""
        synchronize(self._device)
        start = time.perf_counter()
        if self._waiting is not None:
            self._waiting = self._waiting._replace(end=start)
        inputs, targets = self._batch_at(step)
        queued, shares = time_shares(lambda: self._train_step.queue(step, inputs, targets), self._device)
        synchronize(self._device)
        self._next_profile = (step + PROFILE_EVERY, start + PROFILE_EVERY_S)
        return _Waiting(step, queued, start, time.perf_counter(), shares)

    def _told(self, step: int, result: StepResult, step_s: float, shares: dict[str, float] | None) -> Stepped:
        training = self._config.training
        return Stepped(
            step=step + 1,
            loss=result.loss,
            dense_lr=result.rates["dense"],
            table_lr=result.rates["tables"],
            dense_grad_norm=result.dense_grad_norm,
            table_grad_norm=result.table_grad_norm,
            tokens_per_s=training.batch_size * training.seq_len / step_s,
            step_s=step_s,
            peak_memory_bytes=peak_memory_bytes(self._device),
            lookup_share=shares.get(LOOKUPS, 0.0) if shares and self._config.model.kind == "memory" else None,
            time_shares=shares,
        )
