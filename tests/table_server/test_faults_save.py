"""A server that dies while all save one checkpoint: the others do not wait for what it would have told them."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.optim import RowAdam
from mfdist.sharding.kinds import table_wise
from mfdist.spec import TableSpec
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from tests.table_server.processes import DEADLINE_S, ServerProcess

#: After the servers met: from before either has written to after both have.
_DELAYS_S = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16)


@pytest.mark.timeout(600)
def test_a_save_that_a_death_interrupts_is_made_again(tmp_path: Path) -> None:
    servers = [ServerProcess(tmp_path / f"data-{index}").start() for index in range(2)]
    directory = CheckpointDirectory(tmp_path / "tables")
    spec = TableSpec(name="both", num_rows=1 << 15, row_dim=32, dtype=torch.float32)
    addresses = [server.address for server in servers]
    try:
        with TableServers(addresses, deadline_s=DEADLINE_S) as clients, ThreadPoolExecutor(1) as threads:
            table = RemoteTable(table_wise(spec, 2, 1 << 13), clients, std=1.0, seed=7, fuse=RowAdam(lr=0.1))
            rows = table.rows()
            for step, delay_s in enumerate(_DELAYS_S, start=1):
                met = set((tmp_path / "tables").glob(".meeting-*"))
                saving = threads.submit(clients.save, str(tmp_path / "tables"), step)
                until = time.monotonic() + DEADLINE_S
                while not saving.done() and not set((tmp_path / "tables").glob(".meeting-*")) - met:
                    assert time.monotonic() < until
                    time.sleep(0.001)
                time.sleep(delay_s)
                servers[1].kill()
                servers[1].start()
                saving.result(2 * DEADLINE_S)
                assert torch.equal(directory.load(step).tables["both"].weight, rows)
    finally:
        for server in servers:
            server.kill()
