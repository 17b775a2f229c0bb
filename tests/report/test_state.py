"""What became of a run, and where its time went, told from its metrics alone."""

import json

import pytest

from mfdist.report.records import RunRecords
from mfdist.report.state import state_of
from mfdist.report.time_spent import parts_of_run, parts_of_step, total_s, trained_s


def records_of(tmp_path, *records):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = RunRecords(path)
    found.refresh()
    return found


def started(time, first_step=0):
    return {"event": "started", "time": time, "first_step": first_step, "last_step": 9}


def stepped(time, step, **more):
    return {"event": "stepped", "time": time, "step": step, "step_s": 1.0, **more}


@pytest.mark.parametrize(
    ("ending", "now", "kind", "words"),
    [
        ([], 103.0, "running", ""),
        ([], 90_000.0, "silent", "probably killed"),
        ([{"event": "stopped", "time": 103.0, "reason": "finished"}], 90_000.0, "finished", ""),
        ([{"event": "stopped", "time": 103.0, "reason": "SIGTERM"}], 90_000.0, "stopped", "Stopped by SIGTERM"),
        ([{"event": "failed", "time": 103.0, "message": "the loss must stay finite"}], 103.0, "failed", "finite"),
        ([{"event": "stopped", "time": 103.0, "reason": "SIGTERM"}, started(104.0, 2)], 105.0, "running", ""),
    ],
)
def test_the_state_is_what_the_last_line_says_or_its_silence(tmp_path, ending, now, kind, words):
    records = records_of(tmp_path, started(100.0), stepped(101.0, 1), stepped(102.0, 2), *ending)
    state = state_of(records, now)
    assert (state.kind, state.step, state.last_step) == (kind, 2, 9)
    assert words in state.detail
    assert state.is_over == (kind in ("finished", "stopped", "failed"))


def test_a_slow_run_is_not_taken_for_dead(tmp_path):
    records = records_of(tmp_path, started(0.0), stepped(1000.0, 1), stepped(2000.0, 2))
    assert state_of(records, 5000.0).kind == "running"
    assert state_of(records, 8000.0).kind == "silent"


def test_a_run_that_told_nothing_is_new(tmp_path):
    assert state_of(RunRecords(tmp_path / "none"), 0.0).kind == "new"


def test_time_between_stretches_of_training_does_not_count(tmp_path):
    records = records_of(
        tmp_path,
        started(100.0),
        stepped(101.0, 1),
        stepped(102.0, 2),
        {"event": "evaluated", "time": 104.0, "step": 2, "elapsed_s": 2.0},
        started(1000.0, 2),
        stepped(1003.0, 3, time_shares={"lookups": 0.25, "loss": 0.75}),
        {"event": "saved", "time": 1003.5, "step": 3, "stall_s": 0.5},
        stepped(1004.0, 4, time_shares={"lookups": 0.75, "attention": 0.25}),
        {"event": "stopped", "time": 1010.0, "step": 4, "reason": "finished"},
    )
    assert trained_s(records) == [1.0, 2.0, 7.0, 8.0]
    assert total_s(records) == 14.0
    parts = {part["name"]: part["seconds"] for part in parts_of_run(records)}
    assert parts == {"training steps": 4.0, "validation": 2.0, "waiting for checkpoints": 0.5, "everything else": 7.5}
    assert {part["name"]: part["share"] for part in parts_of_step(records)} == {
        "lookups": 0.5,
        "loss": 0.375,
        "attention": 0.125,
    }


def test_nothing_was_spent_before_the_first_step(tmp_path):
    for records in (RunRecords(tmp_path / "none"), records_of(tmp_path, started(1.0))):
        assert (parts_of_run(records), parts_of_step(records), total_s(records)) == ([], [], 0.0)
