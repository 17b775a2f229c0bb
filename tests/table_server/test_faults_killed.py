"""Servers killed by SIGKILL at random moments while clients push: nothing acknowledged is lost or applied twice."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mfdist.sharding.kinds import column_wise, table_wise
from mfdist.sharding.table_plan import TablePlan
from mfdist.table_server.client import RemoteTable
from tests.table_server.processes import ServerProcess
from tests.table_server.training import OPTIMIZERS, STRIDE, Clients, check_undisturbed, spec_of


def plans() -> list[TablePlan]:
    """Return a table of one server, and one over both."""
    return [column_wise(spec_of("one"), [0]), table_wise(spec_of("both"), 2, STRIDE)]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[ServerProcess]]:
    processes = [ServerProcess(tmp_path / "0"), ServerProcess(tmp_path / "1")]
    for process in processes:
        process.start()
    yield processes
    for process in processes:
        if process.is_running:
            process.kill()


@pytest.mark.parametrize("num_kills", [8, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_training_ends_in_the_bits_of_a_run_that_nobody_disturbed(pair: list[ServerProcess], num_kills: int) -> None:
    draw = random.Random(num_kills)
    clients = Clients([process.address for process in pair], plans())
    for _ in range(num_kills):
        killed = draw.choice(pair)
        clients.go_on(draw.randrange(1, 5))  # it is under load again
        time.sleep(draw.random() * draw.choice((0.01, 0.1)))
        killed.kill()
        killed.start()
    check_undisturbed(clients, clients.finish())
    check_recovered(pair, clients)


def check_recovered(pair: list[ServerProcess], clients: Clients) -> None:
    """Kill both and see that they come back with the same bits, from checkpoint and log."""
    for process in pair:
        process.kill()
        process.start()
    with clients.connected(0) as servers:
        for number, plan in enumerate(plans()):
            table = RemoteTable(plan, servers, std=1.0, seed=7, fuse=OPTIMIZERS[number])
            assert table.num_updates == max(clients.steps)
            assert torch.equal(table.rows(), clients.rows[number])
            for name, state in table.states().items():
                assert torch.equal(state, clients.states[number][name])
