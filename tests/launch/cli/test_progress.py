"""What is folded from events: time left, speed, and the summary."""

import json

from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Stepped
from tests.launch.recorded import evaluated, saved, started, stepped, stopped, whole_run


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_known_before_the_first_event():
    progress = RunProgress()
    assert progress.step == progress.last_step == 0
    assert progress.seconds_left is None
    assert progress.tokens_per_s is None
    assert progress.summary()["validation"] is None


def test_time_left_counts_what_happens_between_steps():
    clock = Clock()
    progress = RunProgress(clock)
    progress.update(started(last_step=100))
    for step in range(1, 11):
        progress.update(stepped(step))  # half a second of computing …
        clock.now += 2.0  # … and two seconds from step to step
    assert progress.seconds_left == 2.0 * 90 - 2.0


def test_time_left_after_one_step_is_that_steps_time_and_runs_down():
    clock = Clock()
    progress = RunProgress(clock)
    progress.update(started(last_step=11))
    progress.update(stepped(1))
    assert progress.seconds_left == 5.0
    clock.now += 3.0
    assert progress.seconds_left == 2.0
    clock.now += 30.0
    assert progress.seconds_left == 0.0


def test_a_slow_step_among_many_does_not_move_the_speed():
    progress = RunProgress()
    progress.update(started())
    for step in range(1, 6):
        slow = {"step_s": 60.0} if step in (1, 3) else {}
        progress.update(Stepped(**{**vars(stepped(step)), **slow}))
    assert progress.tokens_per_s == 4096 / 0.5


def test_the_share_in_lookup_stays_until_it_is_measured_again():
    progress = RunProgress()
    progress.update(started())
    progress.update(stepped(1, lookup_share=0.25))
    progress.update(stepped(2, lookup_share=None))
    assert progress.lookup_share == 0.25


def test_a_continued_run_begins_at_its_first_step():
    progress = RunProgress()
    progress.update(started(first_step=200))
    assert progress.step == 200


def test_summary_tells_the_outcome_in_json():
    progress = RunProgress()
    for event in whole_run():
        progress.update(event)
    summary = json.loads(json.dumps(progress.summary()))
    assert summary["run_dir"] == str(stopped().run_dir)
    assert summary["checkpoint"] == str(saved(400).path)
    assert (summary["step"], summary["last_step"], summary["reason"]) == (400, 400, "finished")
    final = evaluated(400, bits_per_byte=1.987, is_final=True)
    assert summary["validation"] == {key: value for key, value in vars(final).items() if key != "elapsed_s"}
    assert summary["baselines_bits_per_byte"] == started().baselines_bits_per_byte
    assert summary["tokens_per_s"] == 8192.0
    assert summary["dense_twin_tokens_per_s"] == 12_000.0
    assert summary["lookup_share"] == 0.41
