"""Connections cut in the middle of requests and replies, and an owner that is slow: a client behind a proxy."""

import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfdist.errors import UnavailableError
from mfdist.optim import RowAdam
from mfdist.sharding.kinds import table_wise
from mfdist.sharding.table_plan import TablePlan
from mfdist.spec import TableSpec
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from mfdist.tables.local import LocalTable
from tests.table_server.processes import ServerProcess
from tests.table_server.proxy import Proxy

SPEC = TableSpec(name="a", num_rows=64, row_dim=12, dtype=torch.float32)
OPTIMIZER = RowAdam(lr=0.05)
ANY = float("inf")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[ServerProcess]]:
    processes = [ServerProcess(tmp_path / str(number)).start() for number in range(2)]
    yield processes
    for process in processes:
        process.kill()


def plan() -> TablePlan:
    return table_wise(SPEC, 2, 16)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    codes = torch.randint(0, 16, (24, 4), generator=generator).to(torch.uint8)
    scores = torch.randn(24, 4, generator=generator)
    return codes, scores.requires_grad_(), torch.randn(24, SPEC.row_dim, generator=generator)


def train(remote: RemoteTable, local: LocalTable, until: Callable[[], bool]) -> int:
    """Train both on the same steps until something holds; what every step gives must be equal up to order of sums."""
    step, end = 0, time.monotonic() + 60.0
    while not until():
        assert time.monotonic() < end, "training does not go on"
        step += 1
        (codes, scores, grad), (_, same_scores, _) = batch(step), batch(step)
        remote(codes, scores, code_stride=16).backward(grad)
        local(codes, same_scores, code_stride=16).backward(grad)
        assert scores.grad is not None
        assert same_scores.grad is not None
        assert torch.equal(scores.grad, same_scores.grad)  # of slots, each of which one server has
    return step


def twins(servers: TableServers) -> tuple[RemoteTable, LocalTable]:
    remote, local = RemoteTable(plan(), servers, std=1.0, seed=5, fuse=OPTIMIZER), LocalTable(SPEC)
    with torch.no_grad():
        local.weight.copy_(remote.rows())
    return remote, local.fuse(OPTIMIZER)


@pytest.mark.parametrize("cut", ["requests", "replies", "both"])
def test_a_cut_in_the_middle_of_messages_changes_no_bit(pair: list[ServerProcess], cut: str) -> None:
    draw = random.Random(cut)

    def limits(number: int) -> tuple[float, float]:
        up, down = draw.randrange(1_000, 20_000), draw.randrange(1_000, 12_000)
        return up if cut != "replies" else ANY, down if cut != "requests" else ANY

    proxies = [Proxy(process.address, limits) for process in pair]
    try:
        with TableServers([proxy.address for proxy in proxies], deadline_s=60.0) as servers:
            remote, local = twins(servers)
            num_steps = train(remote, local, lambda: sum(proxy.num_cuts for proxy in proxies) >= 16)
            assert remote.num_updates == num_steps
            assert torch.equal(remote.rows(), local.weight)
            assert local.row_state is not None
            for name, state in remote.states().items():
                assert torch.equal(state, local.row_state.tensors[name])
            servers.flush()
    finally:
        for proxy in proxies:
            proxy.close()


def test_a_slow_owner_is_waited_for_and_named_at_the_deadline(pair: list[ServerProcess]) -> None:
    slow = Proxy(pair[1].address)
    try:
        with TableServers([pair[0].address, slow.address], deadline_s=4.0) as servers:
            remote, local = twins(servers)
            slow.delay_s = 0.1
            counts = iter(range(4))
            train(remote, local, lambda: next(counts) == 3)
            assert torch.equal(remote.rows(), local.weight)
            slow.delay_s = 10.0
            began = time.monotonic()
            with pytest.raises(UnavailableError, match=f"server {slow.address} must answer before the deadline"):
                remote(batch(9)[0], batch(9)[1], code_stride=16)
            assert time.monotonic() - began < 30.0  # a deadline of seconds, on a machine with much else to do
    finally:
        slow.close()


def test_a_server_that_is_not_there_is_named_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UnavailableError, match=f"server {address} must "):
        TableServers([address], deadline_s=0.5)
