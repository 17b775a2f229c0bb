"""How a command ends: exit codes, and one line on stderr for every failure.

0: done. 1: failed, or stopped before the end. 2: misuse; nothing that was there was changed, and the folder of a run
that was to be new gives way to the next. `mfdist.errors.OUTCOMES` says which error is which.
"""

import contextlib
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO, cast

import typer

import mfdist
from mfdist.errors import OUTCOMES, MfdistError

DONE, FAILED, MISUSE = 0, 1, 2
_INTERRUPTED = 130  # what newer versions of typer return for Ctrl-C, where older ones raise
_STOPPED = "stopped before the end"
#: What the extra `server` brings. Its modules import them as they are: who runs or asks servers has them.
_OF_TABLE_SERVERS = ("grpc", "grpc_health", "grpc_reflection", "google", "prometheus_client", "cryptography")

# Typer brings its own copy of click in newer versions and imports click in older ones; this is the same class in both.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])


class Terminated(SystemExit):
    """SIGTERM arrived outside of training, or SIGHUP in `hangup_terminates`; unwinds so that what is temporary goes."""


def run(command: Callable[[], object], *, wants_traceback: bool = False) -> int:
    """Run a command and return its exit code; failures become one line on stderr.

    Args:
        command: returns the exit code, or what is no integer and counts as done.
        wants_traceback: show the traceback of failures that a user can mend, too.
    """
    _stand_in_for_closed_streams()
    _survive_any_encoding()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = _traced(command) if wants_traceback else command()
        if result == _INTERRUPTED:
            return fail(_STOPPED)
        return result if isinstance(result, int) else DONE
    except _UsageError as error:
        return _misuse(error)
    except MfdistError as error:
        return _known(error)
    except (KeyboardInterrupt, Terminated, typer.Abort):
        return fail(_STOPPED)
    except BrokenPipeError:
        return FAILED  # the reader of our output has gone, as in `mfdist generate RUN ... | head`, and needs no message
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}")
    except MemoryError as error:
        return fail(_out_of_memory(error))
    except ModuleNotFoundError as error:
        if (package := (error.name or "").partition(".")[0]) not in _OF_TABLE_SERVERS:
            return _defect(error)
        message = f"table servers need the package {package}, which is not installed; pip install 'mfdist[server]'"
        return fail(f"{message}{_in_a_checkout(message)}", MISUSE)
    except Exception as error:  # noqa: BLE001 - the last resort of a process: it is reported with its traceback
        # torch's, known by its name and its words because importing torch takes seconds.
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            return fail(_out_of_memory(error))
        return _defect(error)
    finally:
        _let_go(sys.stdout)
        _let_go(sys.stderr)


@contextlib.contextmanager
def hangup_terminates() -> Iterator[None]:
    """Take SIGHUP, a closed terminal, as SIGTERM while the body runs; where it is ignored, as by nohup, it stays so."""
    before = signal.getsignal(signal.SIGHUP)
    if before != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGHUP, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _traced(command: Callable[[], object]) -> object:
    try:
        return command()
    except (MfdistError, OSError, MemoryError, _UsageError):
        traceback.print_exc()
        raise


def fail(message: str, code: int = FAILED) -> int:
    """Write `message` on stderr as one line and return the exit code."""
    try:
        sys.stderr.write(f"mfdist: {' '.join(message.split())}\n")
        sys.stderr.flush()
    except OSError:
        return code  # nobody reads stderr any more; the exit code is all that is left to say
    return code


def _defect(error: Exception) -> int:
    traceback.print_exc()
    return fail(f"{type(error).__name__}: {error}; this is a defect in mfdist, please report the lines above")


def _known(error: MfdistError) -> int:
    code, _ = OUTCOMES[error.kind]
    if error.kind == "internal":
        traceback.print_exc()
    return fail(f"{error}{_in_a_checkout(str(error))}", code)


def _in_a_checkout(message: str) -> str:
    """Return how an extra that a message asks for gets into a checkout's environment, which has no pip of its own."""
    asked = re.search(r"pip install ['\"]?mfdist\[(\w+)\]", message)
    root = Path(mfdist.__file__).absolute().parents[1]
    if asked is None or not (root / ".git").exists():
        return ""
    return f"; in this checkout: make -C {shlex.quote(str(root))} add EXTRA={asked[1]}"


def _misuse(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "mfdist"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return fail(f"{message.rstrip().rstrip('.')} (see {command} --help)", MISUSE)


def _out_of_memory(error: BaseException) -> str:
    return (
        f"there must be memory for the model and a batch; got: {str(error) or 'no more from the system'}; "
        "in training raise training.micro_batches or lower training.batch_size"
    )


def _terminate(signum: int, frame: FrameType | None) -> None:
    for each in (signal.SIGTERM, signal.SIGHUP):  # `timeout` sends two; a second one would break into the clean-up
        if signal.getsignal(each) is _terminate:
            signal.signal(each, signal.SIG_IGN)
    raise Terminated(FAILED)


def _let_go(stream: TextIO) -> None:
    """Drop what a stream will never take, or Python would try again at exit and change the exit code."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _stand_in_for_closed_streams() -> None:
    """Open what takes everything where the shell has closed stdout or stderr, as by `>&-`; Python has None there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - until the process ends


def _survive_any_encoding() -> None:
    """Replace what a stream's encoding cannot show, instead of failing after hours of training."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
