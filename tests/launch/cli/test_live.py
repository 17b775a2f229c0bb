"""The terminal display on terminals of several widths, drawn into memory."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from mfdist.launch.cli.live import LiveDisplay
from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Preparing, Stopped
from tests.launch.cli.test_progress import Clock
from tests.launch.recorded import RUN_DIR, evaluated, started, stepped, stopped, whole_run

WIDTHS = (20, 40, 80, 200)


def terminal(width):
    return Console(file=io.StringIO(), width=width, height=50, force_terminal=True, color_system=None)


def scrolled(events, width):
    """Return what the display printed above its bar, without a live terminal in between."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    display = LiveDisplay(console, RunProgress(), Clock())
    for event in events:
        display(event)
    return console.file.getvalue()


def bar(events, width):
    """Return the moving part after the events."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    clock = Clock()
    progress = RunProgress(clock)
    display = LiveDisplay(console, progress, clock)
    for event in events:
        display(event)
    console.file.truncate(0)
    console.file.seek(0)
    console.print(display._moving())
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_terminal_but_commands(width):
    for line in scrolled(whole_run(), width).splitlines():
        assert cell_len(line) <= width or line.startswith("  mfdist ")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_bar_takes_two_lines_at_any_width(width):
    lines = bar([started(), evaluated(0), *(stepped(step) for step in range(1, 101))], width)
    assert len(lines) == 2
    assert all(cell_len(line) <= width for line in lines)
    assert "loss 3.210" in lines[1]


def test_a_wide_bar_tells_everything():
    lines = bar([started(), evaluated(0), *(stepped(step) for step in range(1, 101))], 120)
    assert lines[0].startswith("step 100/400 ")
    assert lines[0].endswith(" left")
    assert lines[1].rstrip() == "loss 3.210 · val 2.104 bpb · 8.2k tok/s · lookup 41 % · memory 1.2 GiB"


def test_a_narrow_bar_drops_the_last_fields_whole():
    lines = bar([started(), evaluated(0), stepped(1)], 40)
    assert lines[1].rstrip() == "loss 3.210 · val 2.104 bpb · 8.2k tok/s"


def test_the_bar_says_why_the_first_step_takes_long():
    lines = bar([started()], 80)
    assert lines[0].startswith("step 0/400 ")
    assert lines[1].rstrip() == "the first step compiles the kernels"


def test_a_preparation_that_counted_nothing_is_just_done():
    event = Preparing(activity="training the tokenizer", done=0, total=None, unit="merges")
    assert "training the tokenizer: done in 0.0s" in scrolled([event, started()], 80)


def test_a_preparation_has_a_bar_and_leaves_a_line():
    half = Preparing(activity="tokenising", done=5 << 20, total=10 << 20, unit="bytes")
    lines = bar([half], 80)
    assert lines[0].startswith("tokenising ")
    assert lines[1].rstrip() == "5.0 MiB of 10.0 MiB"
    assert "tokenising: 5.0 MiB in 0.0s" in scrolled([half, started()], 80)


def test_two_preparations_leave_two_lines():
    events = [Preparing(activity=name, done=3, total=None, unit="documents") for name in ("reading", "tokenising")]
    text = scrolled([*events, started()], 80)
    assert "reading: 3 documents" in text
    assert "tokenising: 3 documents" in text


def test_commands_can_be_pasted_whole():
    text = scrolled(whole_run(), 40)
    assert f"  mfdist generate '{RUN_DIR}' --prompt \"def \" --tokens 50\n" in text
    assert f"  mfdist evaluate '{RUN_DIR}' --json\n" in text


def test_paths_are_shown_whole_on_a_narrow_terminal():
    text = "".join(scrolled(whole_run(), 40).split())
    assert f"{RUN_DIR}/checkpoints/step-000000400".replace(" ", "") in text
    assert f"{RUN_DIR}/metrics.jsonl".replace(" ", "") in text


def test_what_the_model_writes_cannot_steer_the_terminal():
    assert "\x1b" not in scrolled(whole_run(), 80)


def test_brackets_in_text_are_no_markup():
    odd = Stopped(**{**vars(stopped()), "reason": "[bold]SIGINT[/bold]"})
    assert "[bold]SIGINT[/bold]" in scrolled([started(), odd], 80)


def test_a_terminal_gets_its_cursor_back():
    console = terminal(80)
    display = LiveDisplay(console, RunProgress())
    display.start()
    for event in whole_run():
        display(event)
    display.stop()
    display.stop()
    written = console.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert "1.987" in written
