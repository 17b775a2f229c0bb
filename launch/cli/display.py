"""Showing a run: chooses the display for a stream, and keeps training alive when the stream is gone."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

from rich.console import Console, RenderableType

from mfdist.launch.cli.lines import LineDisplay
from mfdist.launch.cli.live import LiveDisplay
from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Event, Observer


class Display(Protocol):
    """An observer of a run with a beginning and an end. Called in the training thread; `stop` may be called twice."""

    def start(self) -> None:
        """Get ready to show events."""

    def stop(self) -> None:
        """Leave the stream as it was found."""

    def __call__(self, event: Event) -> None:
        """Show one event."""


@contextlib.contextmanager
def showing(
    stream: TextIO,
    progress: RunProgress,
    *,
    is_quiet: bool = False,
    below: Callable[[], RenderableType | None] | None = None,
) -> Iterator[Observer]:
    """Show a run on `stream` while the context lasts: live on a terminal, else, or if quiet, as plain lines.

    What `below` gives stands below a live display's bar.

    A stream that fails (a closed pipe, a vanished terminal, a full disk under a log) silences the display; it does not
    stop the training, whose outcome is in the run's folder.
    """
    console = Console(file=stream, highlight=False)
    # isatty and not Console.is_terminal: FORCE_COLOR, set on many build machines, makes the latter true of a log file.
    is_live = stream.isatty() and not console.is_dumb_terminal and not is_quiet
    shown: Display = LiveDisplay(console, progress, below=below) if is_live else LineDisplay(stream, progress)
    display = _Unbreakable(shown, stream, progress)
    display.start()
    try:
        yield display
    finally:
        display.stop()


class _Unbreakable:
    """Passes events on to a display until its stream fails, then only keeps count.

    A signal handler may tell of an event while another is being written, in the same thread; a stream cannot be entered
    twice, so such an event waits for the first.
    """

    def __init__(self, display: Display, stream: TextIO, progress: RunProgress) -> None:
        self._display: Display | None = display
        self._stream = stream
        self._progress = progress
        self._waiting: deque[Event] = deque()
        self._is_showing = False

    def start(self) -> None:
        with self._silenced_by_failure():
            if self._display is not None:
                self._display.start()

    def stop(self) -> None:
        with self._silenced_by_failure():
            if self._display is not None:
                self._display.stop()

    def __call__(self, event: Event) -> None:
        self._waiting.append(event)
        if self._is_showing:
            return
        self._is_showing = True
        try:
            while self._waiting:
                self._show(self._waiting.popleft())
        finally:
            self._is_showing = False

    def _show(self, event: Event) -> None:
        if self._display is None:
            self._progress.update(event)
            return
        with self._silenced_by_failure():
            self._display(event)

    @contextlib.contextmanager
    def _silenced_by_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._display = None
        except ValueError:
            if not self._stream.closed:
                raise
            self._display = None
