"""What is known about a run so far, folded from its events; both displays and the JSON summary read it."""

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from mfdist.training.events import Evaluated, Event, Saved, Started, Stepped, Stopped, TwinTimed

_RECENT_STEPS = 50
_TIMED_STEPS = 1000


class RunProgress:
    """The latest of everything a run has told.

    Args:
        clock: seconds on a clock that never goes back. The time left is measured on it, between steps, so that
            validations and checkpoints count as well.
        verb: the command that goes on with the run.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, verb: str = "train") -> None:
        self.verb = verb
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT_STEPS)
        self._steps_s: deque[float] = deque(maxlen=_TIMED_STEPS)
        self.started: Started | None = None
        self.stepped: Stepped | None = None
        self.lookup_share: float | None = None  # the last measured one; it is measured now and then
        self.evaluated: Evaluated | None = None
        self.saved: Saved | None = None
        self.twin: TwinTimed | None = None
        self.stopped: Stopped | None = None

    def update(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case Started():
                self.started = event
            case Stepped():
                self._recent.append((self._clock(), event.step))
                self._steps_s.append(event.step_s)
                self.stepped = event
                self.lookup_share = self.lookup_share if event.lookup_share is None else event.lookup_share
            case Evaluated():
                self.evaluated = event
            case Saved():
                self.saved = event
            case TwinTimed():
                self.twin = event
            case Stopped():
                self.stopped = event

    @property
    def step(self) -> int:
        """Finished steps, those of an earlier process included."""
        if self.stepped is not None:
            return self.stepped.step
        return self.started.first_step if self.started is not None else 0

    @property
    def last_step(self) -> int:
        """The step this run ends at."""
        return self.started.last_step if self.started is not None else 0

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds to the last step, or None before the first."""
        if self.stepped is None:
            return None
        remaining = self.last_step - self.step
        (then, first), (now, last) = self._recent[0], self._recent[-1]
        per_step = (now - then) / (last - first) if last > first else self.stepped.step_s
        return max(per_step * remaining - (self._clock() - now), 0.0)

    @property
    def tokens_per_s(self) -> float | None:
        """Median training speed of the last steps, which a step that compiles or is profiled does not move."""
        if self.started is None or not self._steps_s:
            return None
        return self.started.tokens_per_step / max(median(self._steps_s), 1e-9)

    def summary(self) -> dict[str, Any]:
        """Return the run's outcome as plain JSON values; what is not known is None."""
        stopped, started, scored, saved = self.stopped, self.started, self.evaluated, self.saved
        return {
            "run_dir": str(stopped.run_dir) if stopped else None,
            "reason": stopped.reason if stopped else None,
            "step": self.step if stopped is None else stopped.step,
            "last_step": self.last_step if stopped is None else stopped.last_step,
            "elapsed_s": stopped.elapsed_s if stopped else None,
            "device": started.device if started else None,
            "loss": self.stepped.loss if self.stepped else None,
            "validation": {
                "step": scored.step,
                "loss": scored.loss,
                "bits_per_byte": scored.bits_per_byte,
                "num_tokens": scored.num_tokens,
                "is_final": scored.is_final,
            }
            if scored
            else None,
            "baselines_bits_per_byte": dict(started.baselines_bits_per_byte) if started else {},
            "tokens_per_s": self.tokens_per_s,
            "dense_twin_tokens_per_s": self.twin.tokens_per_s if self.twin else None,
            "lookup_share": self.lookup_share,
            "peak_memory_bytes": self.stepped.peak_memory_bytes if self.stepped else None,
            "num_table_parameters": started.num_table_parameters if started else None,
            "num_dense_parameters": started.num_dense_parameters if started else None,
            "checkpoint": str(saved.path) if saved else None,
        }
