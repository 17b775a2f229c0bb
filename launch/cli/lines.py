"""The quiet display: plain lines for logs and pipes, without control codes, a few a minute."""

import time
from collections.abc import Callable
from typing import TextIO

from mfdist import quantities
from mfdist.launch.cli import wording
from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Evaluated, Event, Noted, Preparing, Sampled, Saved, Started, Stepped, Stopped, Warned

_SHORTEST_INTERVAL_S = 10.0
_LONGEST_INTERVAL_S = 60.0


class LineDisplay:
    """Writes a line for each thing that happens, and for steps one every ten seconds, later every minute.

    Args:
        stream: where the lines go; flushed after each.
        progress: folded from the same events, shared with whoever sums the run up.
        clock: seconds on a clock that never goes back.
    """

    def __init__(self, stream: TextIO, progress: RunProgress, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._progress = progress
        self._clock = clock
        self._began = clock()
        self._spoke_at: float | None = None
        self._activity: str | None = None

    def start(self) -> None:
        """Do nothing; a line display has nothing to set up."""

    def stop(self) -> None:
        """Do nothing; every line is written already."""

    def __call__(self, event: Event) -> None:
        """Write what is worth a line."""
        self._progress.update(event)
        match event:
            case Preparing():
                self._prepare(event)
            case Started():
                for label, value in [("name", event.name), *wording.header(event)]:
                    self._write(f"{label}: {value}")
            case Stepped():
                self._step(event)
            case Evaluated():
                self._write(wording.evaluated(event))
            case Saved():
                self._write(wording.saved(event))
            case Warned():
                self._write(f"warning: {event.message}")
            case Noted():
                self._write(event.message)
            case Sampled():
                self._write("sample:")
                for line in quantities.printable(event.prompt + event.text).rstrip().splitlines():
                    self._write(f"  {line}")
            case Stopped():
                self._close(event)

    def _prepare(self, event: Preparing) -> None:
        is_new = event.activity != self._activity
        is_done = event.total is not None and event.done >= event.total
        if is_new or is_done or self._is_due():
            self._activity = None if is_done else event.activity
            self._spoke_at = self._clock()
            self._write(f"{event.activity}: {wording.preparing(event)}")

    def _step(self, event: Stepped) -> None:
        started = self._progress.started
        is_first = started is not None and event.step == started.first_step + 1
        if not (is_first or event.step == self._progress.last_step or self._is_due()):
            return
        self._spoke_at = self._clock()
        left = self._progress.seconds_left
        fields = wording.status(self._progress) + ([f"eta {quantities.duration(left)}"] if left else [])
        self._write("  ".join([f"step {event.step}/{self._progress.last_step}", *fields]))

    def _is_due(self) -> bool:
        now = self._clock()
        interval = min(max((now - self._began) / 60.0, _SHORTEST_INTERVAL_S), _LONGEST_INTERVAL_S)
        return self._spoke_at is None or now - self._spoke_at >= interval

    def _close(self, event: Stopped) -> None:
        for who, score, speed in wording.comparison(self._progress):
            figures = [f"{score} bits per byte"] * bool(score) + [f"{speed} tok/s"] * bool(speed)
            if figures:
                self._write(f"{who}: {', '.join(figures)}")
        self._write(wording.outcome(event))
        for label, value in wording.written(event, self._progress):
            self._write(f"{label}: {value}")
        for purpose, command in wording.commands(event, self._progress.verb):
            self._write(f"{purpose}: {command}")

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()
