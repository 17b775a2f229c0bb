"""What an actor tells its supervisor arrives once and in its order, whatever is lost on the way."""

import threading

from mfdist.errors import UnavailableError
from mfdist.launch.pulse import Answer, Post, Pulse, Report
from tests.launch.recorded import saved, stepped, stopped

POST = Post(kind="trainer", index=0, incarnation=1, log="", threads=1, silence_s=60.0)


def test_events_whose_answer_was_lost_come_again_with_their_number() -> None:
    reports: list[Report] = []

    def call(timeout_s: float, report: Report) -> Answer:
        reports.append(report)
        if sum(bool(report.events) for report in reports) % 2:
            raise UnavailableError("no answer")
        return Answer(order="go on")

    pulse = Pulse(POST, "a", call)
    told = [stepped(1), stepped(2), saved(2), stopped(2)]
    for event in told:
        pulse.observe(event)
    pulse.finish()
    heard: list[object] = []
    for report in reports:
        heard += report.events[max(0, len(heard) - report.first) :]
    assert heard == told
    assert sum(len(report.events) for report in reports) > len(told), "nothing was told twice"
    assert reports[-1].committed == 2


def test_addresses_are_passed_on_when_they_change() -> None:
    answers = [("a:1", "b:1")] * 3 + [("c:1", "b:1")] * 100
    seen: list[tuple[str, ...]] = []
    both = threading.Event()

    def call(timeout_s: float, report: Report) -> Answer:
        return Answer(order="go on", addresses=answers.pop(0))

    def moved(addresses: tuple[str, ...]) -> None:
        seen.append(addresses)
        if len(seen) == 2:
            both.set()

    pulse = Pulse(POST, "a", call)
    pulse.follow(moved)
    assert both.wait(60)
    pulse.finish()
    assert seen == [("a:1", "b:1"), ("c:1", "b:1")]
