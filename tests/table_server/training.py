"""Clients that train tables on servers in threads, and what must come of it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mfdist.optim import RowAdam
from mfdist.sharding.table_plan import TablePlan
from mfdist.spec import TableSpec
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.tables.local import LocalTable
from tests.table_server.processes import DEADLINE_S

NUM_CLIENTS, NUM_TOKENS, NUM_SLOTS, STRIDE, ROW_DIM = 2, 24, 4, 16, 12
OPTIMIZER = RowAdam(lr=0.05, weight_decay=0.01)
#: Of the first table, and of the second.
OPTIMIZERS = (OPTIMIZER, RowAdam(lr=0.05, weight_decay=0.01, state_dtype=torch.uint8))
STEPS_A_SAVE = 25


def spec_of(name: str) -> TableSpec:
    return TableSpec(name=name, num_rows=NUM_SLOTS * STRIDE, row_dim=ROW_DIM, dtype=torch.float32)


def batch(client: int, step: int, table: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scores and the gradient of the sums, the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(client + 10 * table + 100 * step)
    codes = torch.randint(0, STRIDE, (NUM_TOKENS, NUM_SLOTS), generator=generator).to(torch.uint8)
    scores = torch.randn(NUM_TOKENS, NUM_SLOTS, generator=generator)
    return codes, scores, torch.randn(NUM_TOKENS, ROW_DIM, generator=generator)


class Clients:
    """All clients' training, each in a thread of its own, until `finish`; what they were told is theirs to check.

    Args:
        addresses: of the servers.
        plans: of the tables.
        settings: more of `TableServers`.
    """

    def __init__(self, addresses: list[str], plans: list[TablePlan], **settings: Any) -> None:
        self.addresses, self.plans, self.settings = addresses, plans, settings
        self.last_step = 1 << 60
        self.steps = [0] * NUM_CLIENTS
        self.first_rows: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self._made = threading.Barrier(NUM_CLIENTS)
        self._threads = ThreadPoolExecutor(NUM_CLIENTS)
        self._running = [self._threads.submit(self._train, client) for client in range(NUM_CLIENTS)]

    def connected(self, client: int) -> TableServers:
        """Return the servers as a client reaches them."""
        return TableServers(
            self.addresses, client=client, num_clients=NUM_CLIENTS, deadline_s=DEADLINE_S, **self.settings
        )

    def go_on(self, num_steps: int) -> None:
        """Wait until they have done so many steps more."""
        before, end = max(self.steps), time.monotonic() + DEADLINE_S
        while max(self.steps) < before + num_steps:
            self.raise_failed()
            assert time.monotonic() < end, "training does not go on"
            time.sleep(0.001)

    def finish(self) -> int:
        """Let all end with the same step; return it."""
        self.last_step = max(self.steps) + 3
        for running in self._running:
            running.result(DEADLINE_S)
        self._threads.shutdown()
        return self.last_step

    def raise_failed(self) -> None:
        """Raise what a client failed with."""
        for running in self._running:
            if running.done():
                running.result()

    def _train(self, client: int) -> None:
        with self.connected(client) as servers:
            made = zip(self.plans, OPTIMIZERS, strict=False)
            tables = [RemoteTable(plan, servers, std=1.0, seed=7, fuse=optimizer) for plan, optimizer in made]
            if client == 0:
                self.first_rows = [table.rows() for table in tables]
            self._made.wait(DEADLINE_S)
            while (step := self.steps[client] + 1) <= self.last_step:
                for number, table in enumerate(tables):
                    codes, scores, grad = batch(client, step, number)
                    scores.requires_grad_()
                    table(codes, scores, code_stride=STRIDE).backward(grad)
                    assert scores.grad is not None
                    assert scores.grad.isfinite().all()
                    assert table.num_updates == step
                if client == 0 and step % STEPS_A_SAVE == 0:
                    servers.wait(servers.all(lambda server: server.once("Save", pb.SaveRequest())))
                self.steps[client] = step
            servers.flush()
            self._made.wait(DEADLINE_S)
            if client == 0:
                self.rows = [table.rows() for table in tables]
                self.states = [table.states() for table in tables]
            self._made.wait(DEADLINE_S)


def check_undisturbed(clients: Clients, last_step: int) -> None:
    """See that tables and states have the bits of a run that nobody disturbed."""
    for number, plan in enumerate(clients.plans):
        rows, states = undisturbed(plan.spec, number, clients.first_rows[number], last_step)
        assert torch.equal(clients.rows[number], rows)
        assert clients.states[number].keys() == states.keys()
        for name, state in states.items():
            assert torch.equal(clients.states[number][name], state)


def undisturbed(spec: TableSpec, number: int, first_rows: Tensor, last_step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return rows and states of the same steps in one process, without a server."""
    table = LocalTable(spec)
    with torch.no_grad():
        table.weight.copy_(first_rows)
    table.fuse(OPTIMIZERS[number])
    for step in range(1, last_step + 1):
        batches = [batch(client, step, number) for client in range(NUM_CLIENTS)]
        codes, scores, grads = (torch.cat(parts) for parts in zip(*batches, strict=True))
        out = table(codes, scores.requires_grad_(), code_stride=STRIDE)
        out.backward(grads / NUM_CLIENTS)
    assert table.row_state is not None
    return table.weight.detach(), dict(table.row_state.tensors)
