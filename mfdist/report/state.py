"""What became of a run: whether it trains, has finished, was stopped, or ended without a word."""

import time
from dataclasses import dataclass
from typing import Literal

from mfdist import quantities
from mfdist.report.records import RunRecords

State = Literal["new", "running", "finished", "stopped", "failed", "silent"]

#: A run that has not written for so long, and several times longer than ever before, has probably died.
_SILENT_S = 120.0
_SILENT_GAPS = 5.0


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run.

    Args:
        kind: new: nothing was told yet. silent: neither an end was told nor anything else for long.
        text: a few words for it.
        detail: a sentence where there is more to say, else empty.
        step, last_step: where it is, and where it ends; 0 where nobody has said.
    """

    kind: State
    text: str
    detail: str
    step: int
    last_step: int

    @property
    def is_over(self) -> bool:
        """Return whether nothing more is to come by itself."""
        return self.kind in ("finished", "stopped", "failed")


def state_of(records: RunRecords, now: float | None = None) -> RunState:
    """Return the state of a run at a time in seconds since 1970, by default now."""
    now = time.time() if now is None else now
    started, stepped, last = records.last_of("started"), records.last_of("stepped"), records.last
    step = int(stepped["step"]) if stepped else int(started.get("first_step", 0)) if started else 0
    last_step = int(started.get("last_step", 0)) if started else 0

    def state(kind: State, text: str, detail: str = "") -> RunState:
        return RunState(kind=kind, text=text, detail=detail, step=step, last_step=last_step)

    if last is None or started is None:
        return state("new", "not started", "No step has been made yet; its text may still be prepared.")
    if last["event"] == "failed":
        return state("failed", "failed", str(last.get("message", "")))
    if last["event"] == "stopped":
        if last.get("reason") == "finished":
            return state("finished", "finished")
        return state("stopped", "stopped early", f"Stopped by {last.get('reason')}; what it had learnt is saved.")
    quiet_s = now - float(last.get("time", now))
    if quiet_s > max(_SILENT_S, _SILENT_GAPS * records.longest_gap_s):
        return state(
            "silent",
            "ended without a word",
            f"Nothing was written for {quantities.duration(quiet_s)} and no end was told: "
            "its process was probably killed, or hangs.",
        )
    return state("running", "running")
