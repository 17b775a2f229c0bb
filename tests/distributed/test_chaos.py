"""Trainings over three hosts that are struck at random end in the bits of one that nothing happened to."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfdist.launch.job import JobFiles
from mfdist.testing.server_processes import ServerProcesses
from mfdist.training.run import RunDirectory
from tests.distributed.chaos import KINDS, Chaos
from tests.distributed.hosts import Hosts, why_not
from tests.distributed.loopback_hosts import LoopbackHosts
from tests.distributed.ray_nodes import RayNodes
from tests.launch import jobs

pytest.importorskip("ray")

#: Steps long enough for a blow to land in one.
_SLOW_STEPS = (
    *("model.hidden_dim=128", "model.num_layers=2", "model.bits=8"),
    *("training.batch_size=16", "training.seq_len=64"),
)


def undisturbed(folder: Path, config: Path, *overrides: str) -> Path:
    """Return a run of two ranks and two servers on this machine alone, without Ray."""
    with ServerProcesses(folder / "servers", 2) as servers:
        listed = ", ".join(f'"{address}"' for address in servers.addresses)
        run = RunDirectory.create(
            folder / "undisturbed", jobs.config_of(config, f"servers.addresses=[{listed}]", *overrides)
        )
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "mfdist", "train", "--resume", str(run.path), "--quiet"),
        ]
        done = subprocess.run(command, env=jobs.environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    return run.path


@contextlib.contextmanager
def three_hosts(cpus: int = 1) -> Iterator[tuple[Hosts | LoopbackHosts, RayNodes]]:
    """Give three hosts with so many CPUs each, in namespaces where that is possible, and their cluster."""
    kind = Hosts if why_not() is None else LoopbackHosts
    with kind(3) as hosts, RayNodes(hosts, cpus=cpus, environment={"OMP_NUM_THREADS": "1"}) as nodes:
        yield hosts, nodes


def launched(chaos: Chaos, config: Path, run: Path, *overrides: str, num_blows: int, deadline_s: float) -> None:
    settings = [f"--set={override}" for override in ("launch.cpus=1", "launch.silence_s=15", *overrides)]
    chaos.train(config, run, "--trainers=2", "--servers=2", *settings, num_blows=num_blows, deadline_s=deadline_s)


@pytest.mark.timeout(600)
def test_a_host_dies_and_the_bits_are_the_same(tmp_path: Path) -> None:
    config = jobs.config_file(tmp_path, steps=40, every=10)
    with three_hosts() as (hosts, nodes):
        chaos = Chaos(hosts, nodes, seed=7, kinds=["host"])
        launched(chaos, config, tmp_path / "struck", num_blows=1, deadline_s=400)
    assert [blow.kind for blow in chaos.blows] == ["host"]
    jobs.assert_the_same(undisturbed(tmp_path, config), tmp_path / "struck")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pair_loses_a_host_for_good_and_is_whole_again_elsewhere(tmp_path: Path) -> None:
    """Its servers are on different hosts; the lost one comes back on the third, whose address trainers are told."""
    config = jobs.config_file(tmp_path, steps=400, every=10)
    run, log = tmp_path / "struck", tmp_path / "struck.log"
    settings = ("launch.cpus=1", "servers.replicas=2", "servers.failover_s=1.0", "launch.silence_s=120")
    options = [f"--set={setting}" for setting in settings]
    with three_hosts(cpus=2) as (hosts, nodes), log.open("wb") as file:
        command = ["launch", str(config), "--out", str(run), "--address", nodes.address, "--quiet"]
        process = hosts[0].start(
            [sys.executable, "-m", "mfdist", *command, "--trainers=2", "--servers=2", *options],
            env=nodes.environment,
            stdout=file,
            stderr=file,
        )
        files = JobFiles(run)
        jobs.until(lambda: jobs.has_come_to(run, 12) or process.poll() is not None, "step 12")
        assert process.poll() is None, log.read_text()
        before = jobs.hosts_of(files, "server")
        assert len(set(before.values())) == 2, before
        busy = jobs.hosts_of(files, "trainer").values()
        alone = [host for host in hosts[1:] if host.address in before.values() and host.address not in busy]
        lost = alone[0] if alone else next(host for host in hosts[1:] if host.address in before.values())
        lost.kill()
        step = max(jobs.losses(run))
        jobs.until(lambda: jobs.has_come_to(run, step + 3) or process.poll() is not None, "it goes on")
        jobs.hold_until_whole(files, process, lost.address)
        after = jobs.hosts_of(files, "server")
        assert len(set(after.values())) == 2 and lost.address not in after.values(), after
        assert process.wait(jobs.DEADLINE_S) == 0, log.read_text()
    assert files.read_state()["groups"] == 1 or not alone
    jobs.assert_the_same(undisturbed(tmp_path, config), run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.usefixtures("namespaces")
def test_blows_at_random_change_no_bit(tmp_path: Path, seed: int) -> None:
    config = jobs.config_file(tmp_path, steps=240, every=5)
    with three_hosts() as (hosts, nodes):
        chaos = Chaos(hosts, nodes, seed=seed)
        launched(chaos, config, tmp_path / "struck", *_SLOW_STEPS, num_blows=100, deadline_s=3000)
    print(chaos.report())
    assert {blow.kind for blow in chaos.blows} == set(KINDS)
    jobs.assert_the_same(undisturbed(tmp_path, config, *_SLOW_STEPS), tmp_path / "struck")
