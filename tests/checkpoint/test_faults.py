"""A disk that fills up, fails or is read-only, and directories that vanish: one clear line, earlier steps intact."""

import datetime
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
import torch

import mfdist
from mfdist.checkpoint import saving
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.errors import CheckpointError, UnavailableError

State = Callable[..., CheckpointState]
Contents = Callable[[CheckpointState], dict[str, object]]


def large_state(step: int) -> CheckpointState:
    """Twice what the small disk holds."""
    table = TableState(weight=torch.ones(4096, 1024))
    return CheckpointState(step=step, tables={"big": table}, dense={}, attributes={})


def assert_refused(directory: CheckpointDirectory, state: CheckpointState) -> str:
    with pytest.raises(CheckpointError) as caught:
        directory.save(state)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_intact(directory: CheckpointDirectory, expected: dict[str, object], contents: Contents) -> None:
    assert {path.name for path in directory.path.iterdir()} == {".writer.lock", "step-000000001"}
    assert directory.verify() == []
    assert contents(directory.load()) == expected


def test_a_full_disk_loses_nothing(small_disk: Path, small_state: State, contents: Contents) -> None:
    directory = CheckpointDirectory(small_disk / "checkpoints")
    directory.save(small_state(1))
    message = assert_refused(directory, large_state(2))
    assert "step 2" in message
    assert "No space left on device" in message
    assert_intact(directory, contents(small_state(1)), contents)
    # Also where the step that does not fit would supersede a committed one.
    assert_refused(directory, large_state(1))
    assert_intact(directory, contents(small_state(1)), contents)
    directory.save(small_state(3))  # there is room again


def test_steps_can_be_pruned_on_a_disk_without_a_free_byte(small_disk: Path, small_state: State) -> None:
    directory = CheckpointDirectory(small_disk / "checkpoints")
    for step in (1, 2):
        directory.save(small_state(step))
    with pytest.raises(OSError, match="No space left"), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert directory.prune(1) == [1]


def test_a_read_only_disk_is_said(small_disk: Path, small_state: State, contents: Contents) -> None:
    directory = CheckpointDirectory(small_disk / "checkpoints")
    directory.save(small_state(1))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "Read-only file system" in assert_refused(directory, small_state(2))
    assert_intact(directory, contents(small_state(1)), contents)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        directory.prune(1)
    assert "Read-only" in assert_refused(CheckpointDirectory(small_disk / "other"), small_state(2))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the test above takes its place")
def test_a_read_only_directory_is_said(directory: CheckpointDirectory, small_state: State, contents: Contents) -> None:
    directory.save(small_state(1))
    directory.path.chmod(0o555)
    try:
        assert "Permission denied" in assert_refused(directory, small_state(2))
        assert_intact(directory, contents(small_state(1)), contents)
    finally:
        directory.path.chmod(0o755)


def test_a_file_where_the_directory_should_be_is_said(tmp_path: Path, small_state: State) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot make" in assert_refused(CheckpointDirectory(tmp_path / "file" / "checkpoints"), small_state(1))


def test_a_write_that_fails_half_way_leaves_nothing(
    directory: CheckpointDirectory, small_state: State, contents: Contents
) -> None:
    # The kernel refuses the file that outgrows the limit: a real error from write(2), without a disk to fill.
    directory.save(small_state(1))
    code = (
        "import resource, signal, sys, torch, zarr\n"
        "from pathlib import Path\n"
        "from mfdist.checkpoint.directory import CheckpointDirectory\n"
        "from mfdist.checkpoint.state import CheckpointState, TableState\n"
        "from mfdist.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "tables = {'t': TableState(weight=torch.ones(2048, 1024))}\n"
        "state = CheckpointState(step=2, tables=tables, dense={}, attributes={})\n"
        "try:\n"
        "    CheckpointDirectory(Path(sys.argv[1])).save(state)\n"
        "except CheckpointError as error:\n"
        "    sys.exit(str(error))\n"
    )
    root = str(Path(next(iter(mfdist.__path__))).parent)
    process = subprocess.run(
        [sys.executable, "-c", code, directory.path],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 1
    assert "File too large" in process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert_intact(directory, contents(small_state(1)), contents)


class Deleter(threading.Thread):
    """Deletes what matches a pattern as soon as a save has come to its second table."""

    def __init__(self, directory: Path, pattern: str) -> None:
        super().__init__(daemon=True)
        self.directory = directory
        self.pattern = pattern
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self.join()

    def run(self) -> None:
        while not any(self.directory.glob(".step-*/tables/t1/weight/c.*")):
            if self._is_over.is_set():
                return
        for path in self.directory.parent.glob(self.pattern):
            while path.exists():
                shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def slow_state() -> CheckpointState:
    """Large enough that a thread can act between its tables."""
    table = TableState(weight=torch.ones(8192, 1024))
    return CheckpointState(step=2, tables={f"t{i}": table for i in range(4)}, dense={}, attributes={})


def test_a_directory_deleted_during_a_save_is_said_and_made_anew(
    directory: CheckpointDirectory, small_state: State, slow_state: CheckpointState
) -> None:
    with directory.writer_lock():
        directory.save(small_state(1))
        with Deleter(directory.path, directory.path.name):
            assert_refused(directory, slow_state)
        assert directory.steps() == []
        info = directory.save(small_state(3))
        assert directory.steps() == [info]
        # The lock was taken anew with the directory.
        with pytest.raises(UnavailableError):
            CheckpointDirectory(directory.path).save(small_state(4))


def test_a_part_deleted_during_a_save_is_said(
    directory: CheckpointDirectory, small_state: State, contents: Contents, slow_state: CheckpointState
) -> None:
    directory.save(small_state(1))
    with Deleter(directory.path, "checkpoints/.step-*/tables/t0"):
        assert "tables/t0" in assert_refused(directory, slow_state)
    assert_intact(directory, contents(small_state(1)), contents)


@pytest.mark.filterwarnings("ignore:unclosed scandir iterator")  # where the signal comes within os.walk
def test_an_interrupted_save_keeps_a_whole_step(
    directory: CheckpointDirectory, small_state: State, contents: Contents
) -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    directory.save(small_state(1))
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            for step in range(1, 1000):  # the same step again and again, until the signal comes
                directory.save(small_state(1, seed=step % 2))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    directory.prune(1)
    [info] = directory.steps()
    assert directory.verify() == []
    assert contents(directory.load()) in (contents(small_state(1, seed=0)), contents(small_state(1, seed=1)))
    assert directory.save(small_state(2)).step > info.step


def failing(function: Callable[..., object], number: int) -> Callable[..., object]:
    """Return a system call whose call `number`, and all after it, fail as a broken disk does."""
    calls = itertools.count()

    def call(*args: object, **named: object) -> object:
        if next(calls) >= number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return function(*args, **named)

    return call


@pytest.mark.parametrize("number", [0, 1, 5, 20])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_failing_disk_is_said(
    directory: CheckpointDirectory, small_state: State, contents: Contents, call: str, number: int
) -> None:
    directory.save(small_state(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), number))
        message = assert_refused(directory, small_state(2, seed=9))
    assert "Input/output error" in message
    assert_intact(directory, contents(small_state(1)), contents)
    directory.save(small_state(2))


def test_a_disk_that_fails_while_it_is_read_is_said(
    directory: CheckpointDirectory, small_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.save(small_state(1))
    monkeypatch.setattr(os, "preadv", failing(os.preadv, 10))
    with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error\)"):
        directory.load()
    assert {damage.problem for damage in directory.verify()} == {"cannot be read (Input/output error)"}


def test_a_disk_that_fills_up_only_when_it_is_synced_is_said(
    small_disk: Path, small_state: State, contents: Contents, tmp_path: Path
) -> None:
    # A file system that believes to have 64 MiB, on a file that may not grow beyond 8: writing succeeds, fsync fails.
    image, mounted = small_disk / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    made = subprocess.run(["mkfs.ext2", "-q", "-m", "0", image], capture_output=True, check=False)
    looped = subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, check=False)
    if made.returncode or looped.returncode:
        pytest.skip("no file system can be made on a loop device here")
    try:
        directory = CheckpointDirectory(mounted / "checkpoints")
        directory.save(small_state(1))
        assert "failed" in assert_refused(directory, large_state(2))
        assert_intact(directory, contents(small_state(1)), contents)
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


def test_a_clock_set_back_changes_no_order(
    directory: CheckpointDirectory, small_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.save(small_state(1))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(saving.datetime, "datetime", Past)
    second = directory.save(small_state(2))
    assert second.created.startswith("1970")
    assert [info.step for info in directory.steps()] == [1, 2]
    assert directory.load().step == 2
    assert directory.prune(1) == [1]


class Past(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "Past":
        return cls(1970, 1, 1, tzinfo=tz)
