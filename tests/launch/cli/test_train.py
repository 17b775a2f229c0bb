"""`mfdist train` in real processes: a whole run, resuming, signals, a real terminal."""

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


def start(workplace, arguments, **kwargs):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=workplace, env=environment(workplace / "cache"), **kwargs
    )


@contextlib.contextmanager
def reaped(process):
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_json_summary_is_all_of_stdout(finished):
    run_dir, summary, progress = finished
    assert summary["run_dir"] == "finished run"
    assert (summary["step"], summary["reason"]) == (12, "finished")
    assert summary["validation"]["is_final"] is True
    assert summary["validation"]["bits_per_byte"] > 0
    assert set(summary["baselines_bits_per_byte"]) == {"byte unigram", "order-2 n-gram"}
    assert summary["tokens_per_s"] > 0
    assert (run_dir / "checkpoints" / "step-000000012").is_dir()
    assert "step 12/12" in progress
    assert "step 5: validation: " in progress


def test_plain_lines_without_a_terminal(mfdist, new_run):
    done = mfdist(*new_run("plain", "--steps", 2, "--seed", 3))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "step 2/2  loss " in done.stdout
    assert "go on" not in done.stdout
    assert "train on: mfdist train --resume plain --steps 4" in done.stdout


def test_a_run_is_not_overwritten(mfdist, new_run, finished):
    done = mfdist(*new_run(finished[0]))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "--resume" in done.stderr


def test_resume_goes_on_to_more_steps(mfdist, new_run, workplace):
    assert mfdist(*new_run("resumed", "--steps", 3)).returncode == 0
    done = mfdist("train", "--resume", "resumed", "--steps", 6, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 6
    assert "continued from step 3" in done.stderr
    assert "steps = 6" in (workplace / "resumed" / "config.toml").read_text()


def test_resume_refuses_what_would_make_another_run(mfdist, finished):
    done = mfdist("train", "--resume", finished[0], "--seed", 1)
    assert (done.returncode, done.stdout) == (2, "")
    assert "training.seed" in done.stderr


def test_resume_of_nothing_is_misuse(mfdist):
    done = mfdist("train", "--resume", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(workplace, mfdist, new_run, number):
    out = f"stopped by {number.name}"
    with reaped(start(workplace, new_run(out, *ENDLESS, "--json"), stdout=-1, stderr=-1, text=True)) as process:
        told = []
        for line in process.stderr:
            told.append(line)
            if line.startswith("step 1/"):
                process.send_signal(number)
        summary = json.loads(process.stdout.read())
        code = process.wait(DEADLINE_S)
    assert code == 1
    assert summary["reason"] == number.name
    assert summary["step"] >= 1
    assert any(line.startswith(f"warning: {number.name}: stopping after this step") for line in told)
    assert told[-1] == f"go on: mfdist train --resume '{out}'\n"

    on = mfdist("train", "--resume", out, "--steps", summary["step"] + 2, "--json")
    assert on.returncode == 0, on.stderr
    assert f"continued from step {summary['step']:,}" in on.stderr


def test_training_outlives_the_reader_of_its_lines(workplace, new_run):
    with reaped(start(workplace, new_run("unread"), stdout=-1, stderr=-1, text=True)) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(DEADLINE_S) == 0
    assert (workplace / "unread" / "checkpoints" / "step-000000012").is_dir()


@pytest.mark.parametrize("width", [80, 40])
def test_a_real_terminal_shows_a_bar_and_is_given_back(workplace, new_run, width):
    shown, code = on_a_terminal(workplace, new_run(f"terminal {width}", "--steps", 3), width)
    assert code == 0
    assert "\x1b[?25l" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "a sample" in text or "bits per" in text
    assert f"mfdist train --resume 'terminal {width}' --steps 6" in text


def on_a_terminal(workplace, arguments, width):
    """Run the command on a terminal of some width; return all that it wrote there, and its exit code."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    with reaped(start(workplace, arguments, stdin=terminal, stdout=terminal, stderr=terminal)) as process:
        os.close(terminal)
        written = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side has closed
            while piece := os.read(controller, 65536):
                written += piece
        os.close(controller)
        return written.decode(), process.wait(DEADLINE_S)
