"""Which display a stream gets, and that no stream can stop a training."""

import io

import pytest

from mfdist.launch.cli.display import showing
from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Warned
from tests.launch.recorded import started, stepped, whole_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(stream, *, is_quiet=False):
    with showing(stream, RunProgress(), is_quiet=is_quiet) as observer:
        for event in whole_run():
            observer(event)
    return stream.getvalue()


def test_a_terminal_gets_the_live_display(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" in written(Terminal())


def test_no_color_means_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    yellow = "\x1b[33m"
    assert yellow in written(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert yellow not in written(Terminal())


@pytest.mark.parametrize(
    ("stream", "term", "is_quiet"),
    [(io.StringIO, "xterm", False), (Terminal, "dumb", False), (Terminal, "xterm", True)],
)
def test_everything_else_gets_plain_lines(monkeypatch, stream, term, is_quiet):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = written(stream(), is_quiet=is_quiet)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "step 1/400" in text


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_stream_that_fails_silences_the_display_and_keeps_the_count():
    progress = RunProgress()
    with showing(Broken(), progress) as observer:
        for event in whole_run():
            observer(event)
    assert progress.summary()["step"] == 400
    assert progress.tokens_per_s == 8192.0


def test_a_closed_stream_silences_the_display():
    stream, progress = io.StringIO(), RunProgress()
    with showing(stream, progress) as observer:
        observer(started())
        stream.close()
        observer(stepped(1))
        observer(stepped(2))
    assert progress.step == 2


class Interrupted(io.StringIO):
    """A stream in the middle of whose first write a signal handler tells of an event."""

    observer = None

    def write(self, text: str) -> int:
        observer, self.observer = self.observer, None
        written = super().write(text[:4])
        if observer is not None:
            observer(Warned(message="stopping after this step"))
        return written + super().write(text[4:])


def test_an_event_from_a_signal_handler_waits_until_the_line_is_whole():
    stream = Interrupted()
    with showing(stream, RunProgress()) as observer:
        stream.observer = observer
        observer(started())
    lines = stream.getvalue().splitlines()
    assert lines[0] == "name: demo"
    assert lines[-1] == "warning: stopping after this step"
