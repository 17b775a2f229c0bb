"""Every way a command ends has its exit code and one line on stderr."""

import contextlib
import errno
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mfdist import errors
from mfdist.launch.cli import failures

ROOT = Path(__file__).resolve().parents[3]


def ended(capsys, error):
    """Return the exit code and stderr of a command that raises."""

    def command():
        raise error

    code = failures.run(command)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.fixture(autouse=True)
def _signals_as_before():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_what_a_command_returns_is_its_exit_code():
    assert failures.run(lambda: 1) == 1
    assert failures.run(lambda: None) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("bits must divide hidden_dim"), 2),
        (errors.RowIdError("row id 9 is outside"), 2),
        (errors.DataError("no text in /data"), 2),
        (errors.UnavailableError("another process trains"), 1),
        (errors.NonFiniteError("loss is NaN at step 3"), 1),
        (errors.ConsistencyError("the text changed"), 1),
        (errors.CheckpointError("disk full"), 1),
    ],
)
def test_each_kind_of_error_has_its_code_and_one_line(capsys, error, code):
    assert ended(capsys, error) == (code, f"mfdist: {error}\n")


def test_in_a_checkout_a_missing_extra_is_told_as_a_target(capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    _, told = ended(capsys, errors.ConfigError("mfdist launch needs Ray; pip install 'mfdist[ray]'"))
    assert told.endswith(f"; in this checkout: make -C {ROOT} add EXTRA=ray\n")
    _, told = ended(capsys, errors.ConfigError("an old package; pip install numpy"))
    assert "make" not in told


def test_a_message_of_several_lines_becomes_one(capsys):
    assert ended(capsys, errors.ConfigError("one\n  two")) == (2, "mfdist: one two\n")


@pytest.mark.parametrize("error", [errors.InternalError("rows overlap"), ZeroDivisionError("by zero")])
def test_a_defect_shows_its_traceback_and_ends_in_one_line(capsys, error):
    code, text = ended(capsys, error)
    assert code == 1
    assert text.startswith("Traceback")
    assert str(error) in text.splitlines()[-1]
    assert text.splitlines()[-1].startswith("mfdist: ")


def test_an_error_of_the_system_names_the_file(capsys):
    error = OSError(errno.ENOSPC, "No space left on device", "/runs/demo/metrics.jsonl")
    assert ended(capsys, error) == (1, "mfdist: /runs/demo/metrics.jsonl: No space left on device\n")


def test_too_little_memory_says_what_to_lower(capsys):
    class OutOfMemoryError(RuntimeError):
        """As torch names its own."""

    for error in (MemoryError(), OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")):
        code, text = ended(capsys, error)
        assert code == 1
        assert text.count("\n") == 1
        assert "micro_batches" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), failures.Terminated(1)])
def test_an_interrupt_is_no_success(capsys, error):
    assert ended(capsys, error) == (1, "mfdist: stopped before the end\n")


def test_every_error_of_the_library_is_known():
    for error in (value for value in vars(errors).values() if isinstance(value, type)):
        assert errors.OUTCOMES[error.kind][0] in (failures.FAILED, failures.MISUSE)
        assert pickle.loads(pickle.dumps(error("x"))).args == ("x",)


def python(body):
    """Return a Python command that runs `body` as a command of the command line."""
    lines = ["import os, signal, sys", "from mfdist.launch.cli import failures", "def command():", f"    {body}"]
    return [sys.executable, "-c", "\n".join([*lines, "sys.exit(failures.run(command))"])]


def buffered(**more):
    """Return an environment in which Python buffers, as it does by default."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}, **more}


def run_python(body, **more):
    return subprocess.run(python(body), capture_output=True, timeout=60, check=False, env=buffered(**more))


@pytest.mark.parametrize("by", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_closed_terminal_unwinds_unless_it_is_ignored(by):
    before = signal.signal(signal.SIGHUP, by)
    try:
        with (
            pytest.raises(failures.Terminated) if by == signal.SIG_DFL else contextlib.nullcontext(),
            failures.hangup_terminates(),
        ):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == by
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_outside_of_training_unwinds():
    body = "try: os.kill(os.getpid(), signal.SIGTERM); signal.pause()\n    finally: print('tidied')"
    done = run_python(body)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"tidied\n", b"mfdist: stopped before the end\n")


def test_a_second_sigterm_does_not_break_into_the_clean_up():
    clean_up = "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGTERM), print('tidied')))"
    body = f"import atexit; {clean_up}; os.kill(os.getpid(), signal.SIGTERM); signal.pause()"
    done = run_python(body)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"tidied\n", b"mfdist: stopped before the end\n")


def test_a_reader_that_goes_away_is_no_traceback():
    body = "[(sys.stdout.write('x' * 100_000), sys.stdout.flush()) for _ in range(100)]"
    with subprocess.Popen(python(body), env=buffered(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_output_that_a_full_disk_refuses_is_a_failure():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(python("print('x', flush=True)"), stdout=full, stderr=-1, env=buffered(), timeout=60)
    assert (done.returncode, done.stderr) == (1, b"mfdist: No space left on device\n")


def test_what_is_left_in_the_buffer_of_a_gone_reader_does_not_change_the_exit_code():
    body = "import contextlib; sys.stdin.read()\n    with contextlib.suppress(OSError): print('x', flush=True)"
    command = python(body)
    with subprocess.Popen(command, env=buffered(), stdin=-1, stdout=-1, stderr=-1) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_a_stream_that_cannot_encode_replaces():
    done = run_python("print('漢'); raise OSError('漢')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"?\n", b"mfdist: ?\n")


@pytest.mark.parametrize(("closing", "shown"), [(">&-", b"mfdist: no\n"), ("2>&-", b"yes\n"), (">&- 2>&-", b"")])
def test_a_stream_that_the_shell_has_closed_takes_everything(closing, shown):
    command = ["sh", "-c", f'exec "$@" {closing}', "sh", *python("print('yes'); raise OSError('no')")]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=buffered())
    assert (done.returncode, done.stdout + done.stderr) == (1, shown)
