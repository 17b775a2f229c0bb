"""Making a folder once: killed, started together, or without space, it is whole or not there."""

import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mfdist.errors import DataError
from mfdist.training.data.cache import default_cache_dir, make_once

MAKE = """
import os, signal, sys, time
from pathlib import Path
from mfdist.training.data.cache import make_once
target, log, action = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def make(folder):
    (folder / "one").write_text("1")
    with log.open("a") as file:
        file.write(f"made by {os.getpid()}\\n")
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "wait":
        time.sleep(0.3)
    (folder / "two").write_text("2")
make_once(target, make, on_wait=lambda activity: print(activity, flush=True))
assert sorted(path.name for path in target.iterdir()) == ["one", "two"]
"""


def start(target: Path, action: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", MAKE, str(target), str(target.parent / "log"), action]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def make(folder: Path) -> None:
    (folder / "one").write_text("1")


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    make_once(tmp_path / "deep/target", make, on_wait=pytest.fail)
    make_once(tmp_path / "deep/target", lambda folder: pytest.fail("made twice"), on_wait=pytest.fail)
    assert contents(tmp_path / "deep") == ["target"]


def test_of_processes_that_start_together_one_works(tmp_path: Path) -> None:
    started = [start(tmp_path / "target", "wait") for _ in range(4)]
    codes, printed = zip(*map(finish, started), strict=True)
    assert codes == (0, 0, 0, 0)
    (made,) = (tmp_path / "log").read_text().splitlines()
    assert contents(tmp_path) == ["log", "target"]
    worker = made.removeprefix("made by ")
    assert worker in [str(process.pid) for process in started]
    # Whoever looks between the lock and the number in it does not know whom it waits for.
    assert all(re.search(f"waiting for process ({worker}|unknown)", said) for said in printed if said)


def test_what_a_killed_process_left_is_not_taken_and_is_cleared_away(tmp_path: Path) -> None:
    assert finish(start(tmp_path / "target", "die"))[0] == -signal.SIGKILL
    assert contents(tmp_path) == [".target.partial", "log"]
    assert finish(start(tmp_path / "target", "go"))[0] == 0
    assert contents(tmp_path) == ["log", "target"]


@pytest.mark.parametrize("delay_s", [0.02 * number for number in range(5)])
def test_killed_at_any_moment_it_is_whole_or_not_there(tmp_path: Path, delay_s: float) -> None:
    target = tmp_path / "target"
    process = start(target, "wait")
    while not (tmp_path / "log").exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay_s * 4)
    process.kill()
    finish(process)
    if target.exists():
        assert contents(target) == ["one", "two"]
    assert finish(start(target, "go"))[0] == 0
    assert contents(tmp_path) == ["log", "target"]


def test_a_failure_leaves_nothing_and_is_passed_on(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise DataError("no usable text")

    with pytest.raises(DataError, match="no usable text"):
        make_once(tmp_path / "target", fail, on_wait=pytest.fail)
    assert contents(tmp_path) == []


def test_a_limit_on_file_size_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "big").write_bytes(b"x" * 10_000_000)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(
            DataError, match=r"File too large; free some space, or set data.cache_dir to another"
        ) as error:
            make_once(tmp_path / "target", fill, on_wait=pytest.fail)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(error.value)
    assert contents(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(DataError, match=r"No space left on device; free some space, or set data.cache_dir"):
            make_once(disk / "target", lambda folder: _fill(folder / "big"), on_wait=pytest.fail)
        assert contents(disk) == []
        make_once(disk / "target", make, on_wait=pytest.fail)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill(path: Path) -> None:
    path.write_bytes(b"x" * 4_000_000)


def test_a_cache_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match=r"cache does not allow it: .*set data.cache_dir to another folder"):
        make_once(tmp_path / "cache" / "target", make, on_wait=pytest.fail)


@pytest.mark.parametrize(
    ("xdg", "expected"), [("/some/cache", "/some/cache/mfdist"), ("", "~/.cache/mfdist"), ("x", "~/.cache/mfdist")]
)
def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, xdg: str, expected: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert default_cache_dir() == Path(expected).expanduser()
