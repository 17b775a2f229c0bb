"""Jobs that go on with fewer trainers where a host is lost for good, and stop where nothing helps, on real clusters."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from mfdist.launch.job import JobFiles
from mfdist.testing.server_processes import ServerProcesses
from mfdist.training.metrics import read_metrics
from mfdist.training.run import SERVED_TABLES
from tests.distributed.loopback_hosts import LoopbackHosts
from tests.distributed.ray_nodes import RayNodes
from tests.launch import jobs

pytest.importorskip("ray")

#: So many that the end is seconds away when a host is killed on the way.
STEPS, EVERY = 240, 10


@dataclass
class Launched:
    """A job on a cluster of two hosts with a CPU each."""

    run: Path
    hosts: LoopbackHosts
    nodes: RayNodes
    process: "subprocess.Popen[Any]"

    @property
    def said(self) -> str:
        return self.run.with_suffix(".log").read_text("utf-8")

    def come_to(self, step: int, *, event: Literal["stepped", "saved"] = "stepped") -> None:
        def is_due() -> bool:
            return jobs.has_come_to(self.run, step, event) or self.process.poll() is not None

        jobs.until(is_due, f"step {step} is {event}")
        assert self.process.poll() is None, self.said

    def be_through(self) -> None:
        assert self.process.wait(jobs.DEADLINE_S) == 0, self.said


@contextlib.contextmanager
def launched(folder: Path, *arguments: str, steps: int = STEPS) -> Iterator[Launched]:
    config, run = jobs.config_file(folder, steps=steps, every=EVERY), folder / "run"
    command = ["-m", "mfdist", "launch", str(config), "--out", str(run), "--trainers=2", "--quiet", *arguments]
    settings = ("launch.cpus=1", "launch.elastic.min=1", "launch.replace_s=3", "checkpoint.keep_last=99")
    with LoopbackHosts(2) as hosts, RayNodes(hosts, cpus=1, environment={"OMP_NUM_THREADS": "1"}) as nodes:
        with run.with_suffix(".log").open("wb") as log:
            process = hosts[0].start(
                [sys.executable, *command, "--address", nodes.address, *(f"--set={each}" for each in settings)],
                env=nodes.environment,
                stdout=log,
                stderr=log,
            )
        yield Launched(run, hosts, nodes, process)


def begins(run: Path) -> list[int]:
    """Return the last step before each group of trainers began."""
    return [record["first_step"] for record in read_metrics(run / "metrics.jsonl", "started")]


def gone_on(run: Path, first: int, last: int, *, num_ranks: int, num_servers: int = 0) -> Path:
    """Return a run of `mfdist train` that goes on from a commit of a run, as if nothing else had ever happened."""
    other = run.with_name(f"from-{first}")
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("launch", "metrics.jsonl", "step-*"))
    for kept in ("checkpoints", SERVED_TABLES):
        if (run / kept).exists():
            shutil.copytree(run / kept / f"step-{first:09d}", other / kept / f"step-{first:09d}")
    with ServerProcesses(run.with_name(f"servers-{first}"), num_servers) as servers:
        listed = ", ".join(f'"{address}"' for address in servers.addresses)
        run_of_train(other, num_ranks, f"training.steps={last}", f"servers.addresses=[{listed}]")
    return other


def run_of_train(run: Path, num_ranks: int, *settings: str) -> None:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"] if num_ranks > 1 else []
    options = [f"--set={setting}" for setting in settings]
    command = [sys.executable, "-m", *launcher, "mfdist", "train", "--resume", str(run), "--quiet", *options]
    done = subprocess.run(command, env=jobs.environment(), capture_output=True, text=True, timeout=jobs.DEADLINE_S)
    assert done.returncode == 0, done.stderr


def assert_went_on_as(other: Path, run: Path) -> None:
    """Compare the losses of a run's steps with those of another one that has only some of them."""
    theirs = jobs.losses(other)
    assert theirs and {step: jobs.losses(run)[step] for step in theirs} == theirs


@pytest.mark.timeout(400)
def test_fewer_go_on_from_the_last_commit_when_a_host_is_gone_for_good(tmp_path: Path) -> None:
    with launched(tmp_path) as job:
        job.come_to(20, event="saved")
        job.come_to(25)
        job.hosts[1].kill()
        job.be_through()
        assert "no place for 2 trainers within 3 s; going on with 1" in job.said
    first, second = begins(job.run)
    assert (first, second % EVERY) == (0, 0) and second >= 20
    alone = gone_on(job.run, second, STEPS, num_ranks=1)
    assert_went_on_as(alone, job.run)
    jobs.assert_same_models(alone, job.run)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_servers", [0, 1])
def test_a_job_that_shrank_grows_back_when_the_host_is_there_again(tmp_path: Path, num_servers: int) -> None:
    options = (f"--servers={num_servers}", "--set=launch.elastic.grow_s=1", "--set=launch.max_failures=2")
    with launched(tmp_path, *options, steps=100_000) as job:
        files = JobFiles(job.run)
        job.come_to(25)
        job.hosts[1].kill()
        jobs.until(lambda: len(begins(job.run)) >= 2 or job.process.poll() is not None, "fewer go on")
        job.come_to(begins(job.run)[-1] + 15)
        assert files.read_state()["trainers"] == {"wanted": 2, "running": 1}
        job.nodes.start(1)
        jobs.until(lambda: len(begins(job.run)) >= 3 or job.process.poll() is not None, "all go on")
        job.come_to(begins(job.run)[-1] + 15)
        assert files.read_state()["trainers"] == {"wanted": 2, "running": 2}
        job.process.terminate()
        assert job.process.wait(jobs.DEADLINE_S) == 1, job.said
        assert len(files.read_state()["failures"]) == 0
    _, fewer, again = begins(job.run)
    assert_went_on_as(gone_on(job.run, fewer, again, num_ranks=1, num_servers=num_servers), job.run)
    last = max(jobs.losses(job.run))
    assert_went_on_as(gone_on(job.run, again, last, num_ranks=2, num_servers=num_servers), job.run)


#: Run by Python itself when it starts: a trainer's process is killed when it comes to load its loop.
_DEADLY = """
import os
import signal
import sys


class Deadly:
    def find_spec(self, name, path=None, target=None):
        if name == "mfdist.training.loop" and "default_worker.py" in " ".join(sys.argv + sys.orig_argv):
            os.kill(os.getpid(), signal.SIGKILL)


sys.meta_path.insert(0, Deadly())
"""


@pytest.mark.timeout(400)
def test_trainers_that_die_at_every_start_back_off_and_stop_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "deadly").mkdir()
    (tmp_path / "deadly" / "sitecustomize.py").write_text(_DEADLY)
    config, run = jobs.config_file(tmp_path, steps=20, every=10), tmp_path / "run"
    command = [sys.executable, "-m", "mfdist", "launch", str(config), "--out", str(run), "--trainers=1", "--quiet"]
    environment = jobs.environment()
    environment["PYTHONPATH"] = f"{tmp_path / 'deadly'}{os.pathsep}{environment['PYTHONPATH']}"
    with jobs.ended_afterwards(run) as files:
        settings = ("--set=launch.max_failures=2", "--set=launch.backoff_s=0.5")
        done = subprocess.run(
            [*command, *settings], env=environment, cwd=jobs.ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("mfdist: 3 failures in a row without a new commit are more than launch.max_failures=2; ")
        assert re.search("trainer-0 died: while it started: its (process|connection broke)", line), line
        assert f"launch --resume {run}" in line
        warnings = [line for line in done.stdout.splitlines() if "going on from the last commit" in line]
        assert len(warnings) == 2 and warnings[0].endswith("commit") and warnings[1].endswith("in 0.5 s")
        assert jobs.outcome(files)["reason"] == "failed"
        jobs.assert_nothing_left(files)
