"""`mfdist train`: a whole run, resuming, signals, a real terminal."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios

import pytest

from tests.launch.cli.conftest import COMMAND, DEADLINE_S, environment

ENDLESS = ("--steps", 100_000, "--set", "training.eval_every=100000", "--set", "checkpoint.every=100000")


@contextlib.contextmanager
def started(workplace, arguments, **streams):
    """A process of the command line, killed if it is still there at the end."""
    settings = {"cwd": workplace, "env": environment(workplace / "cache"), "text": True}
    with subprocess.Popen([*COMMAND, *map(str, arguments)], **settings, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_json_summary_is_all_of_stdout(finished):
    run_dir, summary, progress = finished
    assert summary["run_dir"] == "finished run"
    assert (summary["step"], summary["reason"]) == (12, "finished")
    assert summary["validation"]["is_final"] is True
    assert summary["validation"]["bits_per_byte"] > 0
    assert set(summary["baselines_bits_per_byte"]) == {"byte unigram", "order-2 n-gram"}
    assert summary["tokens_per_s"] > 0
    assert summary["lookup_share"] >= 0
    assert (run_dir / "checkpoints" / "step-000000012").is_dir()
    assert "step 12/12" in progress
    assert "step 5: validation: " in progress
    assert "\x1b" not in progress
    assert "profiler" not in progress


def test_plain_lines_without_a_terminal_then_more_steps(mfdist, new_run, workplace):
    code, out, err = mfdist(*new_run("plain", "--steps", 3, "--seed", 3))
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "step 3/3  loss " in out
    assert "train on: mfdist train --resume plain --steps 6\n" in out

    code, out, err = mfdist("train", "--resume", "plain", "--steps", 5, "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 5
    assert "continued from step 3" in err
    assert "steps = 5" in (workplace / "plain" / "config.toml").read_text()


def test_a_run_is_not_overwritten(mfdist, new_run, finished):
    code, out, err = mfdist(*new_run(finished[0]))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--resume" in err


def test_resume_refuses_what_would_make_another_run(mfdist, finished):
    code, out, err = mfdist("train", "--resume", finished[0], "--seed", 1)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "training.seed" in err


def test_resume_of_nothing_is_misuse(mfdist):
    code, out, err = mfdist("train", "--resume", "nowhere")
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(workplace, mfdist, new_run, number):
    out = f"stopped by {number.name}"
    with started(workplace, new_run(out, *ENDLESS, "--json"), stdout=-1, stderr=-1) as process:
        told = []
        for line in process.stderr:
            told.append(line)
            if line.startswith("step 1/"):
                process.send_signal(number)
        summary = json.loads(process.stdout.read())
        assert process.wait(DEADLINE_S) == 1
    assert summary["reason"] == number.name
    assert summary["step"] >= 1
    assert any(line.startswith(f"warning: {number.name}: stopping after this step") for line in told)
    assert told[-1] == f"go on: mfdist train --resume '{out}'\n"

    code, _, err = mfdist("train", "--resume", out, "--steps", summary["step"] + 1, "--json")
    assert code == 0, err
    assert f"continued from step {summary['step']:,}" in err


def test_training_outlives_the_reader_of_its_lines(workplace, new_run):
    with started(workplace, new_run("unread"), stdout=-1, stderr=-1) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(DEADLINE_S) == 0
    assert (workplace / "unread" / "checkpoints" / "step-000000012").is_dir()


def test_a_real_terminal_shows_a_bar_and_is_given_back(workplace, new_run):
    shown, code = on_a_terminal(workplace, new_run("on a terminal", "--steps", 3), width=40)
    assert code == 0
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"step \d/3 ━", text)
    assert "mfdist train --resume 'on a terminal' --steps 6" in text


def on_a_terminal(workplace, arguments, width):
    """Run the command on a terminal of some width; return all that it wrote there, and its exit code."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    with started(workplace, arguments, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        written = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side has closed
            while piece := os.read(controller, 65536):
                written += piece
        os.close(controller)
        return written.decode(), process.wait(DEADLINE_S)
