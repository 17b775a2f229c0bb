"""A Ray actor beside a table server, with a real Ray, which ends with the bench however that ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
START_S, END_S = 180.0, 60.0
#: Holds an actor until it is told to end.
HOLD = """
import signal
from mfdist.launch.cli import failures
from mfdist.launch.ray_contender import ray_contenders
from mfdist.table_server.contest import Batch

def hold():
    with ray_contenders() as contenders, contenders["Ray actor"](Batch.of_64_tokens()) as started:
        print(started.num_threads, flush=True)
        signal.pause()

raise SystemExit(failures.run(hold))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ray_ends_with_a_bench_that_is_stopped(number: signal.Signals) -> None:
    bench = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with bench:
        try:
            assert bench.stdout is not None
            assert bench.stdout.readline().strip().isdecimal()
            ray = psutil.Process(bench.pid).children(recursive=True)
            folder = next(
                Path(line[3]) for line in map(psutil.Process.cmdline, ray) if "mfdist.launch.local_head" in line
            )
            assert folder.is_dir()
            assert len(ray) > 3
            bench.send_signal(number)
            _, err = bench.communicate(timeout=END_S)
        finally:
            bench.kill()
    assert bench.returncode == 1
    assert err.splitlines()[-1] == "mfdist: stopped before the end"
    assert not folder.exists()
    until = time.monotonic() + END_S
    while any(process.is_running() for process in ray) and time.monotonic() < until:
        time.sleep(0.1)
    assert [process for process in ray if process.is_running()] == []
