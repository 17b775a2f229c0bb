"""`mfdist launch` on Ray clusters of this machine: what is killed comes back, to the bits of `mfdist train`."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from mfdist.testing.server_processes import ServerProcesses
from mfdist.training.run import RunDirectory
from tests.launch import jobs

STEPS, EVERY = 60, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run of `mfdist train` over two ranks and two servers that nothing happened to."""
    path = jobs.config_file(folder, steps=STEPS, every=EVERY)
    with ServerProcesses(folder / "servers", 2) as servers:
        listed = ", ".join(f'"{address}"' for address in servers.addresses)
        run = RunDirectory.create(folder / "trained", jobs.config_of(path, f"servers.addresses=[{listed}]"))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "mfdist", "train", "--resume", str(run.path), "--quiet"),
        ]
        done = subprocess.run(command, env=jobs.environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    return run.path


def _is_due(run: Path, step: int, process: "subprocess.Popen[bytes]") -> bool:
    return jobs.has_come_to(run, step) or process.poll() is not None


@pytest.mark.timeout(600)
def test_killed_trainers_and_servers_come_back_to_the_same_bits(folder: Path, trained: Path) -> None:
    path = jobs.config_file(folder, steps=STEPS, every=EVERY)
    run = folder / "killed"
    with jobs.ended_afterwards(run) as files:
        command = ("launch", path, "--out", run, "--trainers", "2", "--servers", "2", "--set", "launch.cpus=1")
        process = jobs.begin(*command, log=folder / "killed.log")
        try:
            for actor, step in (("trainer-1", 12), ("server-0", 25), ("trainer-0", 38)):
                jobs.until(partial(_is_due, run, step, process), f"step {step}")
                assert process.poll() is None, (folder / "killed.log").read_text()
                jobs.kill(files, actor)
            assert process.wait(jobs.DEADLINE_S) == 0, (folder / "killed.log").read_text()
        finally:
            process.kill()
            process.wait(30)
        assert jobs.outcome(files)["reason"] == "finished"
        state = files.read_state()
        assert state["groups"] >= 3 and len(state["recoveries_s"]) >= 2
        jobs.assert_nothing_left(files)  # by itself
    jobs.assert_the_same(trained, run)
    assert RunDirectory.open(run).config.servers.addresses == ()
    said = jobs.mfdist("logs", run, "trainer-1")
    assert said.returncode == 0 and said.stdout.count("--- trainer-1, start") >= 3
