"""The terminal display: a header, a bar that moves, and lines that scroll above it."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mfdist import quantities
from mfdist.launch.cli import wording
from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Evaluated, Event, Noted, Preparing, Sampled, Saved, Started, Stopped, Warned

_REFRESHES_PER_S = 4


class LiveDisplay:
    """Shows a run on a terminal of any width.

    Args:
        console: the terminal.
        progress: folded from the same events, shared with whoever sums the run up.
        clock: seconds on a clock that never goes back.
        below: what else stands below the bar.
    """

    def __init__(
        self,
        console: Console,
        progress: RunProgress,
        clock: Callable[[], float] = time.monotonic,
        below: Callable[[], RenderableType | None] | None = None,
    ) -> None:
        self._console = console
        self._progress = progress
        self._clock = clock
        self._below = below
        self._preparing: tuple[Preparing, float] | None = None
        self._live = Live(
            console=console,
            get_renderable=self._moving,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            # Stray prints scroll above the bar, but only where they would have gone to this terminal anyway.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def start(self) -> None:
        """Take the bottom of the terminal."""
        self._live.start()

    def stop(self) -> None:
        """Give the terminal back; calling it again does nothing."""
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._progress.update(event)
        if isinstance(event, Preparing):
            self._prepare(event)
            return
        self._finish_preparing()
        match event:
            case Started():
                self._console.print(_header(event))
            case Evaluated():
                self._say(wording.evaluated(event), "green" if event.is_final else "")
            case Saved():
                self._say(wording.saved(event), "dim")
            case Warned():
                self._say(f"warning: {event.message}", "yellow")
            case Noted():
                self._say(event.message, "dim")
            case Sampled():
                self._console.print(_sample(event))
            case Stopped():
                self.stop()
                self._close(event)

    def _moving(self) -> RenderableType:
        below = None if self._below is None or self._progress.stopped is not None else self._below()
        return self._bar() if below is None else Group(self._bar(), below)

    def _bar(self) -> RenderableType:
        if self._preparing is not None:
            event, since = self._preparing
            rate = wording.rate(event, self._clock() - since)
            return _Bar(event.activity, rate, event.done, event.total, [wording.preparing(event)])
        if self._progress.started is None or self._progress.stopped is not None:
            return Text()
        left = self._progress.seconds_left
        return _Bar(
            f"step {self._progress.step}/{self._progress.last_step}",
            "" if left is None else f"{quantities.duration(left)} left",
            self._progress.step,
            self._progress.last_step,
            wording.status(self._progress) or ["the first step compiles the kernels"],
        )

    def _prepare(self, event: Preparing) -> None:
        if self._preparing is not None and self._preparing[0].activity == event.activity:
            self._preparing = (event, self._preparing[1])
        else:
            self._finish_preparing()
            self._preparing = (event, self._clock())

    def _finish_preparing(self) -> None:
        if self._preparing is None:
            return
        event, since = self._preparing
        self._preparing = None
        took = quantities.duration(self._clock() - since)
        amount = wording.preparing(replace(event, total=None)) if event.done else "done"
        self._say(f"{event.activity}: {amount} in {took}", "dim")

    def _say(self, line: str, style: str) -> None:
        self._console.print(Text(line, style=style, overflow="fold"))

    def _close(self, event: Stopped) -> None:
        rows = wording.comparison(self._progress)
        if any(score or speed for _, score, speed in rows):
            self._console.print(_comparison(rows))
        self._say(wording.outcome(event), "bold green" if event.reason == "finished" else "bold yellow")
        self._console.print(_pairs(wording.written(event, self._progress)))
        # Commands are pasted back into a shell: they start their own line, and no table breaks them.
        for purpose, command in wording.commands(event, self._progress.verb):
            self._say(f"{purpose}:", "dim")
            self._console.print(Text(f"  {command}", style="bold"), soft_wrap=True)


class _Bar:
    """A bar with a label before and a note behind it, and below it as many of the fields as fit."""

    def __init__(self, label: str, note: str, done: float, total: float | None, fields: list[str]) -> None:
        self._label, self._note, self._done, self._total, self._fields = label, note, done, total, fields

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=self._total or 100.0, completed=self._done, pulse=self._total is None)
        row.add_row(Text(self._label, style="bold"), bar, Text(self._note, style="cyan"))
        line = ""
        for field in self._fields:
            longer = f"{line} · {field}" if line else field
            if len(longer) > options.max_width:
                break
            line = longer
        yield Group(row, Text(line, no_wrap=True, overflow="ellipsis"))


def _header(event: Started) -> Panel:
    return Panel(_pairs(wording.header(event)), title=Text(event.name, style="bold"), title_align="left", expand=False)


def _sample(event: Sampled) -> Panel:
    text = Text(quantities.printable(event.prompt), style="bold")
    text.append(Text(quantities.printable(event.text).rstrip(), style="not bold"))
    return Panel(text, title="a sample", title_align="left")


def _comparison(rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title="validation text, lower is better", title_justify="left", title_style="dim")
    table.add_column("", overflow="fold")
    table.add_column("bits per byte", justify="right")
    has_speed = any(speed for _, _, speed in rows)
    if has_speed:
        table.add_column("tokens/s", justify="right")
    for index, row in enumerate(rows):
        table.add_row(*row[: 3 if has_speed else 2], style="bold" if index == 0 else "")
    return table


def _pairs(lines: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines:
        table.add_row(label, Text(value, overflow="fold"))
    return table
