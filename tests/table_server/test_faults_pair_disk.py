"""Pairs of which one server's disk is full, or a file of its configuration wrong for a while."""

import asyncio
import resource
from pathlib import Path

import numpy as np
import pytest

from mfdist.table_server.config import ReplicationConfig, ServerSection
from mfdist.table_server.node import Node
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.replicator import Replicator
from mfdist.table_server.store import Store
from tests.table_server.pairs import connected, described, made, primary_of, rows_of, running_pair, step
from tests.table_server.processes import ServerProcess, until


def fill_disk(process: ServerProcess) -> None:
    """Let no file of a server grow beyond its log's."""
    longest = max(file.stat().st_size for file in (process.data / "ledger").glob("*.db*"))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (longest, resource.RLIM_INFINITY))


def make_room(process: ServerProcess) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_primary_whose_disk_is_full_lets_its_replica_go_on(tmp_path: Path) -> None:
    with running_pair(tmp_path, log=tmp_path / "log") as pair, connected(pair) as servers:
        table = made(servers)
        step(table, 1)
        before = primary_of(pair)
        for number in range(2, 6):
            step(table, number)
        servers.flush()
        fill_disk(pair[before])
        for number in range(6, 12):
            step(table, number)
        servers.flush()
        assert described(pair[1 - before]).role == pb.PRIMARY
        assert described(pair[before]).role == pb.REPLICA
        for number in (12, 13):
            step(table, number)
        make_room(pair[before])
        until(lambda: described(pair[1 - before]).is_in_sync)
        assert primary_of(pair) == 1 - before
        step(table, 14)
        servers.flush()
        rows = table.rows().numpy()
        assert [shard.version for process in pair for shard in described(process).shards] == [14, 14]
        for process in pair:
            assert np.array_equal(rows_of(process), rows)
    assert (tmp_path / "log").read_text("utf-8").count("WARNING stepping down for ") == 1


def test_a_primary_that_stepped_down_and_starts_again_is_an_old_one(tmp_path: Path) -> None:
    with running_pair(tmp_path) as pair, connected(pair) as servers:
        table = made(servers)
        step(table, 1)
        before = primary_of(pair)
        fill_disk(pair[before])
        for number in (2, 3):
            step(table, number)
        servers.flush()
        pair[before].kill()
        step(table, 4)
        pair[before].start()  # with room, for another process has no limit
        assert primary_of(pair) == 1 - before
        step(table, 5)
        servers.flush()
        assert np.array_equal(rows_of(pair[before]), table.rows().numpy())


def test_a_primary_whose_token_is_gone_says_so_once_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "a")
    store.remember(role="primary")
    store.close()
    config = ReplicationConfig(peer="127.0.0.1:1", token_file=tmp_path / "missing.token")
    node = Node(ServerSection(data=tmp_path / "a"), config)

    async def running() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Replicator(node, config).run(), 1.7)

    try:
        asyncio.run(running())
    finally:
        node.close()
    assert caplog.text.count("no replica: ") == 1
    assert "missing.token" in caplog.text
