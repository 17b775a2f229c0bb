"""Where a run's time went: between its parts, and within a step."""

from typing import Any

import numpy as np

from mfdist.report.records import RunRecords

Share = dict[str, Any]  # name, seconds or share


def parts_of_run(records: RunRecords) -> list[Share]:
    """Return the seconds of training and of what happened beside it, as far as they were told; none before a step."""
    steps_s = sum(float(record["step_s"]) for record in records.of("stepped"))
    if not steps_s:
        return []
    parts = {
        "training steps": steps_s,
        "validation": sum(float(record.get("elapsed_s") or 0.0) for record in records.of("evaluated")),
        "diagnosis of tables": sum(float(record["elapsed_s"]) for record in records.of("diagnosed")),
        "waiting for checkpoints": sum(float(record.get("stall_s") or 0.0) for record in records.of("saved")),
    }
    parts["everything else"] = max(0.0, total_s(records) - sum(parts.values()))
    return [{"name": name, "seconds": seconds} for name, seconds in parts.items() if seconds > 0]


def parts_of_step(records: RunRecords) -> list[Share]:
    """Return the shares of a step's time by what is computed, the mean over the steps that were measured."""
    measured = [record["time_shares"] for record in records.of("stepped") if record.get("time_shares")]
    names = sorted({name for shares in measured for name in shares})
    means = {name: float(np.mean([shares.get(name, 0.0) for shares in measured])) for name in names}
    return [{"name": name, "share": share} for name, share in sorted(means.items(), key=lambda item: -item[1])]


def trained_s(records: RunRecords) -> list[float]:
    """Return the seconds that the run had trained after each step; time between its stretches does not count."""
    starts = np.array([float(record.get("time", 0.0)) for record in records.of("started")])
    if not len(starts):
        return []
    every = (record.get("time", 0.0) for of_event in records.by_event.values() for record in of_event)
    times = np.sort(np.fromiter(every, dtype=np.float64))
    # Each stretch ends with the last record before the next begins.
    ends = times[np.append(np.searchsorted(times, starts[1:]), len(times)) - 1]
    before = np.concatenate([[0.0], np.cumsum(np.maximum(0.0, ends - starts))])
    stepped = np.array([float(record.get("time", 0.0)) for record in records.of("stepped")])
    stretch = np.clip(np.searchsorted(starts, stepped, side="right") - 1, 0, len(starts) - 1)
    return list((before[stretch] + np.maximum(0.0, stepped - starts[stretch])).tolist())


def total_s(records: RunRecords) -> float:
    """Return how long the run has trained in all its stretches, in seconds."""
    after_steps = trained_s(records)
    last = records.last
    if not after_steps or last is None:
        return 0.0
    return after_steps[-1] + max(0.0, float(last.get("time", 0.0)) - float(records.of("stepped")[-1].get("time", 0.0)))
