"""The quiet display: what lands in a log."""

import io

from mfdist.launch.cli.lines import LineDisplay
from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Preparing
from tests.launch.cli.test_progress import Clock
from tests.launch.recorded import RUN_DIR, evaluated, started, stepped, stopped, whole_run


def shown(events, seconds_each=0.5):
    """Return the lines for events that are so far apart."""
    clock, stream = Clock(), io.StringIO()
    display = LineDisplay(stream, RunProgress(clock), clock)
    for event in events:
        display(event)
        clock.now += seconds_each
    return stream.getvalue().splitlines()


def test_a_whole_run_is_plain_lines():
    text = "\n".join(shown(whole_run()))
    assert all(char == "\n" or char.isprintable() for char in text)
    for expected in (
        "tokenising: 10.5 MiB of 10.5 MiB",
        "warning: notes.txt is not text; skipped",
        "model: MemoryFormer, 17.3M parameters in tables, 1.1M dense",
        "to beat: byte unigram 4.612, order-2 n-gram 2.871 bits per byte",
        "step 100: validation: 2.104 bits per byte, loss 4.200",
        "step 400: saved step-000000400 (210 MiB in 0.4s)",
        "this MemoryFormer: 1.987 bits per byte, 8.2k tok/s",
        "its dense twin: 12.0k tok/s",
        "finished 400 of 400 steps in 3m35s",
        f"metrics: {RUN_DIR}/metrics.jsonl",
        f"write text: mfdist generate '{RUN_DIR}' --prompt \"def \" --tokens 50",
        f"train on: mfdist train --resume '{RUN_DIR}' --steps 800",
    ):
        assert expected in text


def test_steps_are_told_at_first_and_last_and_every_ten_seconds():
    lines = shown([started(), *(stepped(step) for step in range(1, 401))])
    told = [int(line.split("/")[0].removeprefix("step ")) for line in lines if line.startswith("step ")]
    assert told[:3] == [1, 21, 41]  # half a second a step
    assert told[-1] == 400


def test_a_long_run_is_told_every_minute():
    lines = shown([started(last_step=100_000), *(stepped(step) for step in range(1, 2001))], seconds_each=10.0)
    told = [int(line.split("/")[0].removeprefix("step ")) for line in lines if line.startswith("step ")]
    assert told[-1] - told[-2] == 6
    assert len(told) < 500


def test_a_step_line_has_everything():
    lines = shown([started(), evaluated(0), stepped(1)])
    assert lines[-1] == "step 1/400  loss 3.210  val 2.104 bpb  8.2k tok/s  lookup 41 %  memory 1.2 GiB  eta 3m20s"


def test_a_preparation_of_unknown_length_is_told_now_and_then():
    events = [Preparing(activity="reading", done=done, total=None, unit="documents") for done in range(1000)]
    lines = shown(events, seconds_each=0.1)
    assert lines[0] == "reading: 0 documents"
    assert 5 <= len(lines) <= 15


def test_a_stopped_run_says_how_to_go_on():
    lines = shown([started(), stepped(1), stopped(37, reason="SIGTERM")])
    assert "stopped by SIGTERM after step 37 of 400 (3m35s); all of it is saved" in lines
    assert lines[-1] == f"go on: mfdist train --resume '{RUN_DIR}'"
