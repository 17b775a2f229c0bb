"""A job's actors as a table: where each is, what it does, what it holds and how long it has been silent."""

import time
from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from mfdist import quantities

_COLUMNS = ("actor", "state", "host", "memory", "host in", "host out", "silent")


class JobView:
    """The latest state of a job, for a display; figures of traffic need two states."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._traffic: dict[str, tuple[float, int, int]] = {}  # actor → when, received, sent
        self._rates: dict[str, tuple[float, float]] = {}

    def update(self, state: dict[str, Any]) -> None:
        """Take in a state, as `Supervisor.watch` gives it."""
        for actor in state.get("actors", ()):
            received, sent = actor["host_received_bytes"], actor["host_sent_bytes"]
            if received is None:
                continue
            before = self._traffic.get(actor["name"])
            now = float(state["time"])
            if before is None or received < before[1]:
                self._traffic[actor["name"]] = (now, received, sent)
            elif now - before[0] >= 1.0:
                seconds = now - before[0]
                self._rates[actor["name"]] = ((received - before[1]) / seconds, (sent - before[2]) / seconds)
                self._traffic[actor["name"]] = (now, received, sent)
        self._state = state

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a row of text for each actor."""
        for actor in self._state.get("actors", ()):
            rates = self._rates.get(actor["name"])
            yield (
                actor["name"],
                f"{actor['state']}, {actor['role']}" if actor["role"] else actor["state"],
                actor["host"] or "",
                quantities.num_bytes(actor["memory_bytes"]) if actor["memory_bytes"] else "",
                f"{quantities.num_bytes(rates[0])}/s" if rates else "",
                f"{quantities.num_bytes(rates[1])}/s" if rates else "",
                f"{actor['silent_s']:.0f} s" if actor["silent_s"] and actor["silent_s"] >= 2 else "",
            )

    def __call__(self) -> RenderableType | None:
        """Return what is shown below the bar."""
        if not self._state:
            return None
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in _COLUMNS:
            table.add_column(column, no_wrap=True)
        for row in self.rows():
            table.add_row(*row)
        return table


def described(state: dict[str, Any]) -> Iterator[str]:
    """Yield lines that tell a state to people."""
    loss = "" if state["loss"] is None else f", loss {state['loss']:.3f}"
    speed = "" if state["tokens_per_s"] is None else f", {quantities.count(state['tokens_per_s'])} tok/s"
    yield f"{state['run']}: {state['phase']}, step {state['step']:,}{loss}{speed}, saved step {state['committed']:,}"
    trainers = state["trainers"]
    yield f"trainers {trainers['running']} of {trainers['wanted']}, groups {state['groups']}, Ray {state['address']}"
    if state["recoveries_s"]:
        times = sorted(state["recoveries_s"])
        median, worst = times[len(times) // 2], times[-1]
        yield f"between groups: {len(times)} times without steps, {median:.1f} s (median), {worst:.1f} s at worst"
    for cause in state["failures"]:
        yield f"failed: {cause}"
    view = JobView()
    view.update(state)
    rows = [_COLUMNS, *view.rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows if len(rows) > 1 else []:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if outcome := state["outcome"]:
        yield f"over: {outcome['reason']}" + (f": {outcome['cause']}" if outcome["cause"] else "")
    elif time.time() - state["time"] > 10:
        yield f"this was {quantities.duration(time.time() - state['time'])} ago"
