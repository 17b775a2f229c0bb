"""Training with tables on servers, as `mfdist train` does it: real processes, some of them killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from mfdist.config import RunConfig, parse_config
from mfdist.errors import ConsistencyError
from mfdist.sharding.plan import ShardingPlan
from mfdist.table_server.run_tables import ServedTables
from mfdist.testing.server_processes import ServerProcesses
from mfdist.training.checkpointed import load_run_model
from mfdist.training.loop import train
from mfdist.training.metrics import read_metrics
from mfdist.training.run import RunDirectory

TINY = """
[model]
num_layers = 1
hidden_dim = 32
num_heads = 2
bits = 4
max_seq_len = 64
[data]
source = "{source}"
tokenizer = "bytes"
validation_fraction = 0.2
cache_dir = "{cache}"
[optimizer.dense]
lr = 5e-3
schedule = "constant"
warmup_fraction = 0.0
[optimizer.tables]
rule = "{rule}"
schedule = "constant"
warmup_fraction = 0.0
[training]
steps = {steps}
batch_size = 4
seq_len = 16
device = "cpu"
eval_every = 100
eval_sequences = 4
sample_prompt = ""
[checkpoint]
every = {every}
[servers]
addresses = {addresses}
kind = "whole"
deadline_s = 120
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the processes do: the number decides the last bits of matrix products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(
    folder: Path, addresses: list[str] | tuple[()] = (), *, rule: str = "adam", steps: int = 8, every: int = 4
) -> RunConfig:
    """Return a configuration over a folder of text, which is written once."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for number in range(8):
            (text / f"{number}.txt").write_text(f"Rows are looked up, {number} of them, and summed. " * 20)
    filled = TINY.format(
        source=text, cache=folder / "cache", rule=rule, steps=steps, every=every, addresses=list(addresses)
    )
    return parse_config(filled.replace("'", '"'), origin="TINY")


def losses(run: RunDirectory) -> dict[int, float]:
    """Return the last told loss of each step."""
    return {record["step"]: record["loss"] for record in read_metrics(run.metrics_path, "stepped")}


def started(run: RunDirectory) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mfdist", "train", "--resume", str(run.path), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def until(holds: Callable[[], bool], deadline_s: float = 90.0) -> None:
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def _has_come_to(run: RunDirectory, step: int, process: "subprocess.Popen[bytes]") -> bool:
    return max(losses(run), default=0) >= step or process.poll() is not None


def assert_the_same(one: RunDirectory, other: RunDirectory) -> None:
    """Compare losses, how rows were used and how far they moved, and every bit of both models."""
    assert losses(one) == losses(other)
    used, theirs_used = (read_metrics(run.metrics_path, "diagnosed")[-1]["layers"] for run in (one, other))
    assert used == theirs_used and used[0]["movement"][2] > 0
    ours, theirs = (load_run_model(run)[0].state_dict() for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("rule", ["adam", "rowwise_adagrad"])
def test_two_servers_end_in_the_bits_of_training_in_process(tmp_path: Path, rule: str) -> None:
    """Also where training is resumed half way, by servers that were killed and started again in between."""
    local = RunDirectory.create(tmp_path / "local", config_of(tmp_path, rule=rule))
    train(local)
    with ServerProcesses(tmp_path / "servers", 2) as servers:
        config = config_of(tmp_path, servers.addresses, rule=rule)
        remote = RunDirectory.create(tmp_path / "remote", config)
        for steps in (5, 8):
            process_config = remote.config_with([f"training.steps={steps}"])
            remote.write_config(process_config)
            home = ServedTables(process_config)
            try:
                train(remote, table_home=home)
            finally:
                home.close()
            for index in range(2):
                servers.kill(index)
                servers.start(index)
    assert_the_same(local, remote)
    plan = ShardingPlan.from_json(remote.plan_path.read_text())
    assert plan.world_size == 2 and len(plan.tables) == 3 and not local.plan_path.exists()


@pytest.mark.timeout(400)
def test_servers_and_trainers_are_killed_and_the_losses_are_the_same(tmp_path: Path) -> None:
    """Servers die under a trainer that waits for them; trainers die and their successors go back to the last commit."""
    steps = 60
    whole = RunDirectory.create(tmp_path / "whole", config_of(tmp_path, steps=steps, every=20))
    train(whole)
    with ServerProcesses(tmp_path / "servers", 2) as servers:
        config = config_of(tmp_path, servers.addresses, steps=steps, every=10)
        killed = RunDirectory.create(tmp_path / "killed", config)
        trainer = started(killed)
        try:
            for round_number, at in enumerate((3, 15, 27, 41)):
                until(partial(_has_come_to, killed, at, trainer))
                assert trainer.poll() is None, "the trainer ended before it was killed"
                servers.kill(round_number % 2)
                if round_number in (1, 2):
                    trainer.send_signal(signal.SIGKILL)
                    trainer.wait(30)
                    trainer = started(killed)
                servers.start(round_number % 2)
            assert trainer.wait(180) == 0
        finally:
            trainer.kill()
            trainer.wait(30)
    assert_the_same(whole, killed)


def test_ranks_are_clients_that_share_the_tables(tmp_path: Path) -> None:
    """Two ranks under torchrun train like two ranks that hold the tables themselves, up to rounding."""
    both = {}
    with ServerProcesses(tmp_path / "servers", 2) as servers:
        for name, addresses in (("ranks", []), ("clients", servers.addresses)):
            run = RunDirectory.create(tmp_path / name, config_of(tmp_path, addresses))
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
                *("-m", "mfdist", "train", "--resume", str(run.path), "--quiet"),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr
            both[name] = losses(run)
    assert len(both["ranks"]) == 8
    for step, loss in both["ranks"].items():
        assert both["clients"][step] == pytest.approx(loss, rel=1e-4)


def test_a_new_run_does_not_go_on_with_rows_of_another(tmp_path: Path) -> None:
    with ServerProcesses(tmp_path / "servers", 1) as servers:
        for name in ("first", "second"):
            config = config_of(tmp_path, servers.addresses, steps=2)
            home = ServedTables(config)
            try:
                if name == "first":
                    train(RunDirectory.create(tmp_path / name, config), table_home=home)
                else:
                    with pytest.raises(ConsistencyError, match="tables of its own"):
                        train(RunDirectory.create(tmp_path / name, config), table_home=home)
            finally:
                home.close()
    assert threading.active_count() < 50
