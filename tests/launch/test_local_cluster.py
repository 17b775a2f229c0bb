"""A local Ray ends with the command that starts it, where that dies before a supervisor has taken over."""

import signal
from pathlib import Path

import psutil
import pytest

from tests.launch import jobs


def members_of(head: psutil.Process) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if jobs.is_of(process, head.pid)]


def heads_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "mfdist.launch.local_head" in child.cmdline()]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("number", "phase"),
    [(signal.SIGKILL, "starting a local Ray"), (signal.SIGKILL, "joining it"), (signal.SIGHUP, "joining it")],
)
def test_a_launcher_that_dies_while_it_starts_leaves_no_ray(tmp_path: Path, number: signal.Signals, phase: str) -> None:
    config, log = jobs.config_file(tmp_path, steps=20, every=10), tmp_path / "log"
    process = jobs.begin("launch", config, "--out", tmp_path / "run", "--set=launch.cpus=1", log=log)
    try:
        jobs.until(lambda: phase in log.read_text() or process.poll() is not None, phase)
        jobs.until(lambda: process.poll() is not None or heads_of(process.pid), "Ray begins")
        assert process.poll() is None, log.read_text()
        (head,) = heads_of(process.pid)
        temp_dir = Path(head.cmdline()[-2])
        assert temp_dir.is_dir() and members_of(head)
        process.send_signal(number)
        assert process.wait(60) == (1 if number == signal.SIGHUP else -number), log.read_text()
    finally:
        process.kill()
        process.wait(30)
    jobs.until(lambda: not members_of(head), "its Ray has ended", 60.0)
    jobs.until(lambda: not temp_dir.exists(), "its folder is gone", 10.0)
    assert not (tmp_path / "run").exists()
