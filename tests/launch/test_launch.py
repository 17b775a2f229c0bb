"""`mfdist launch` on Ray clusters of this machine: what is killed comes back, to the bits of `mfdist train`."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from mfdist.launch.job import JobFiles
from mfdist.launch.local_cluster import is_head_alive
from mfdist.testing.server_processes import ServerProcesses
from mfdist.training.run import RunDirectory
from tests.launch import jobs

STEPS, EVERY = 120, 10


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


@pytest.mark.timeout(600)
def test_a_primary_dies_and_its_replica_goes_on_to_the_same_bits(folder: Path, trained: Path) -> None:
    """No trainer is started anew; who was killed follows, and goes on in its turn when the other one is killed."""
    path = jobs.config_file(folder, steps=STEPS, every=EVERY)
    run = folder / "pair"
    settings = ("launch.cpus=1", "launch.silence_s=120", "servers.replicas=2", "servers.failover_s=0.5")
    with jobs.ended_afterwards(run) as files:
        command = ("launch", path, "--out", run, "--trainers", "2", "--servers", "2")
        process = jobs.begin(*command, *(f"--set={setting}" for setting in settings), log=folder / "pair.log")
        try:
            for step in (12, 30):
                jobs.until(partial(_is_due, run, step, process), f"step {step}")
                assert process.poll() is None, (folder / "pair.log").read_text()
                jobs.kill(files, jobs.hold_until_whole(files, process))
                jobs.until(partial(_is_due, run, step + 5, process), "it goes on")
                assert process.poll() is None, (folder / "pair.log").read_text()
            jobs.hold_until_whole(files, process)
            assert process.wait(jobs.DEADLINE_S) == 0, (folder / "pair.log").read_text()
        finally:
            process.kill()
            process.wait(30)
        state = files.read_state()
        assert (state["outcome"]["reason"], state["groups"]) == ("finished", 1)
    jobs.assert_the_same(trained, run)
    said = "".join(files.log(f"server-{index}").read_text() for index in range(2))
    assert said.count("took over as the primary") >= 2, said
    assert (folder / "pair.log").read_text().count("the other one of its pair goes on; starting it again") == 2


def begun(path: Path, run: Path, *more: str) -> JobFiles:
    """Launch a job that goes on by itself."""
    done = jobs.mfdist("launch", path, "--out", run, "--trainers", "2", "--set", "launch.cpus=1", "--detach", *more)
    assert done.returncode == 0, done.stderr
    assert "the job goes on by itself" in done.stdout
    return JobFiles(run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_whose_ray_was_killed_goes_on_to_the_same_bits(folder: Path, trained: Path) -> None:
    path, run = jobs.config_file(folder, steps=STEPS, every=EVERY), folder / "headless"
    with jobs.ended_afterwards(run) as files:
        begun(path, run, "--servers", "2")
        jobs.until(partial(jobs.has_come_to, run, 15), "step 15")
        head = files.read_job().cluster.head_pid
        os.kill(head, signal.SIGKILL)
        jobs.until(lambda: not is_head_alive(files.read_job().cluster), "its Ray has ended")
        gone = jobs.mfdist("status", run)
        assert gone.returncode == 1 and f"mfdist launch --resume {run}" in gone.stderr
        done = jobs.mfdist("launch", "--resume", run, "--json")
        assert done.returncode == 0, done.stderr
        assert files.read_job().cluster.head_pid != head
        summary = json.loads(done.stdout)
        assert summary["reason"] == "finished" and summary["job"]["committed"] == STEPS
    jobs.assert_the_same(trained, run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_terminal_is_closed_then_the_supervisor_killed_and_the_job_goes_on_to_the_same_bits(
    folder: Path, trained: Path
) -> None:
    path, run, log = (
        jobs.config_file(folder, steps=STEPS, every=EVERY),
        folder / "driverless",
        folder / "driverless.log",
    )
    with jobs.ended_afterwards(run) as files:
        command = ("launch", path, "--out", run, "--trainers", "2", "--servers", "2", "--set", "launch.cpus=1")
        process = jobs.begin(*command, log=log)
        jobs.until(partial(_is_due, run, 3, process), "step 3")
        process.send_signal(signal.SIGHUP)  # its terminal is closed
        assert process.wait(30) == -signal.SIGHUP, log.read_text()
        again = jobs.begin("launch", "--resume", run, log=log)
        try:
            jobs.until(
                lambda: "the job is running; watching it" in log.read_text() or again.poll() is not None, "it is"
            )
            jobs.until(partial(_is_due, run, 15, again), "step 15")
            assert again.poll() is None and files.read_state()["groups"] == 1, log.read_text()
            before = files.read_state()["actors"]
            supervisor = int((files.folder / ".supervisor.lock").read_text().split()[2])
            saved = files.read_state()["committed"]
            os.kill(supervisor, signal.SIGKILL)
            jobs.until(lambda: files.read_state()["groups"] == 0 or again.poll() is not None, "Ray starts it again")
            assert saved >= 10 and files.read_state()["committed"] >= saved, files.read_state()
            assert again.wait(jobs.DEADLINE_S) == 0, log.read_text()
        finally:
            again.kill()
            again.wait(30)
        assert jobs.outcome(files)["reason"] == "finished"
        assert {actor["pid"] for actor in before}.isdisjoint(actor["pid"] for actor in files.read_state()["actors"])
        jobs.assert_nothing_left(files)
        assert files.log("trainer-0").read_text().count("--- trainer-0, start") == 2
    jobs.assert_the_same(trained, run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_is_left_watched_scaled_stopped_and_resumed(folder: Path) -> None:
    path, run = jobs.config_file(folder, steps=100_000, every=10), folder / "left"
    with jobs.ended_afterwards(run) as files:
        begun(path, run)
        refused = jobs.mfdist("launch", path, "--out", run)
        assert refused.returncode == 1 and "belongs to a live job" in refused.stderr
        jobs.until(partial(jobs.has_come_to, run, 1), "step 1")
        watcher = jobs.begin("attach", run, "--quiet", log=folder / "attach.log")
        jobs.until(lambda: "step " in (folder / "attach.log").read_text() or watcher.poll() is not None, "it is shown")
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(60) == 0, (folder / "attach.log").read_text()
        scaled = jobs.mfdist("scale", run, "--trainers", "1")
        assert scaled.returncode == 0, scaled.stderr
        jobs.until(lambda: files.read_state()["trainers"] == {"wanted": 1, "running": 1}, "one trainer runs")
        step = files.read_state()["committed"]
        jobs.until(partial(jobs.has_come_to, run, step + 1), "it goes on")
        told = jobs.mfdist("status", run, "--json")
        assert told.returncode == 0 and json.loads(told.stdout)["is_alive"]
        wrong = jobs.mfdist("logs", run, "trainer-9")
        assert wrong.returncode == 2 and 'did you mean "trainer-' in wrong.stderr
        stopped = jobs.mfdist("stop", run)
        assert stopped.returncode == 0, stopped.stderr
        jobs.assert_nothing_left(files)
        last = jobs.outcome(files)["step"]
        assert jobs.mfdist("status", run).returncode == 1
        done = jobs.mfdist("launch", "--resume", run, "--set", f"training.steps={last + 3}")
        assert done.returncode == 0, done.stderr
        assert max(jobs.losses(run)) == last + 3 and len(jobs.losses(run)) == last + 3


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_nothing(folder: Path, times: int) -> None:
    path, run, log = jobs.config_file(folder, steps=100_000, every=10), folder / f"c{times}", folder / f"c{times}.log"
    with jobs.ended_afterwards(run) as files:
        process = jobs.begin("launch", path, "--out", run, "--trainers", "2", log=log)
        try:
            jobs.until(partial(_is_due, run, 2, process), "step 2")
            held = jobs.held_by(files)
            assert held.ports, "a Ray that listens nowhere"
            for _ in range(times):
                process.send_signal(signal.SIGINT)
                jobs.until(lambda: "saving and stopping" in log.read_text() or process.poll() is not None, "it hears")
            assert process.wait(120) == 1, log.read_text()
        finally:
            process.kill()
            process.wait(30)
        jobs.assert_nothing_left(files)
        held.assert_free()
    if times == 1:
        saved = RunDirectory.open(run).checkpoints.steps()[-1].step
        assert saved == max(jobs.losses(run)) >= 2
        assert f"go on: mfdist launch --resume {run}" in log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_terminated_saves_and_what_hangs_is_replaced(folder: Path, trained: Path) -> None:
    path, run = jobs.config_file(folder, steps=STEPS, every=EVERY), folder / "hangs"
    with jobs.ended_afterwards(run) as files:
        begun(path, run, "--servers", "2", "--set", "launch.silence_s=10")
        jobs.until(partial(jobs.has_come_to, run, 3), "step 3")
        jobs.kill(files, "trainer-1", signal.SIGTERM)
        jobs.until(lambda: files.read_state()["groups"] == 2, "another group")
        handed_over = files.read_state()["committed"]
        assert handed_over % EVERY and not files.read_state()["failures"]
        jobs.until(partial(jobs.has_come_to, run, handed_over + 12), "it goes on")
        jobs.kill(files, "trainer-0", signal.SIGSTOP)
        jobs.until(lambda: files.read_state()["groups"] == 3, "a third group")
        jobs.until(partial(jobs.has_come_to, run, handed_over + 25), "it goes on")
        jobs.kill(files, "server-1", signal.SIGSTOP)
        jobs.until(lambda: files.read_state()["outcome"], "it is over")
        assert jobs.outcome(files)["reason"] == "finished"
    jobs.assert_the_same(trained, run)
