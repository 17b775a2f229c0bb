"""Checkpoints that a server makes by itself and cannot write, finds damaged, or finds gone."""

import asyncio
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.errors import CheckpointError, InternalError
from mfdist.optim import RowSGD
from mfdist.spec import TableSpec
from mfdist.table_server.messages import ShardSpec
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.server import _until_stopped
from mfdist.table_server.shard import Shard
from mfdist.table_server.store import Held, Store
from tests.table_server.pairs import counters_of
from tests.table_server.processes import DEADLINE_S, ServerProcess, server, until
from tests.table_server.raw_client import RawClient, acknowledged

#: A table of 2 MiB, of which a checkpoint is a file that is longer than those of a log that is full at 200 kB.
NUM_ROWS, ROW_DIM, LOG_BYTES, FILE_BYTES = 1 << 13, 64, 200_000, 1 << 20
#: More than the note of a checkpoint takes in the log, and a push that waits for none.
NOTE_BYTES = 50_000


def trained(process: ServerProcess) -> tuple[RawClient, Callable[[int], None]]:
    client = RawClient(process.address)
    client.create("a", NUM_ROWS, ROW_DIM)
    client.join()
    return client, lambda step: push(client, step)


def push(client: RawClient, step: int) -> None:
    acknowledged(client.push(client.message("a", step, NUM_ROWS, ROW_DIM)))


def is_failing(process: ServerProcess, what: str) -> bool:
    return counters_of(process)[f'mfdist_failing{{what="{what}"}}'] == 1


def health_of(process: ServerProcess) -> str:
    with grpc.insecure_channel(process.address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def test_a_checkpoint_that_cannot_be_written_is_told_and_made_once_there_is_room(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = {"file_bytes": FILE_BYTES, "log_gib": LOG_BYTES / 2**30, "log": log}
    with server(tmp_path / "a", **settings) as process:
        _, push_one = trained(process)
        step = 0
        while counters_of(process)["mfdist_log_bytes"] <= LOG_BYTES:
            step += 1
            push_one(step)
        until(lambda: is_failing(process, "checkpoint"))
        push_one(step + 1)  # the log has room, and rows are served
        until(lambda: counters_of(process)["checkpoints"] >= 2)  # tries
        assert health_of(process) == "SERVING"
        assert CheckpointDirectory(process.data / "checkpoints").steps() == []
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until(lambda: not is_failing(process, "checkpoint"))
        assert counters_of(process)['mfdist_table_checkpoint_lag{table="a"}'] == 0
        for again in range(step + 2, 2 * step + 10):
            push_one(again)
        until(lambda: len(CheckpointDirectory(process.data / "checkpoints").steps()) == 2)
    said = log.read_text("utf-8")
    assert said.count("WARNING no checkpoint, the log grows until there is one: ") == 1
    assert said.count("WARNING checkpoints work again") == 1


def test_a_small_log_is_checkpointed_once_each_time_it_is_full(tmp_path: Path) -> None:
    with server(tmp_path / "a", log_gib=LOG_BYTES / 2**30) as process:
        _, push_one = trained(process)
        step = 0
        for number in (1, 2):
            while counters_of(process)["mfdist_log_bytes"] <= LOG_BYTES:
                step += 1
                push_one(step)
            until(lambda number=number: counters_of(process).get("checkpoints") == number)
            until(lambda: counters_of(process)["mfdist_log_bytes"] < NOTE_BYTES)
        push_one(step + 1)
        time.sleep(2.5)
        assert counters_of(process)["checkpoints"] == 2
        process.stop()
        process.start()
        assert counters_of(process)["mfdist_log_bytes"] < NOTE_BYTES


def test_what_was_logged_before_rows_were_loaded_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    spec = TableSpec(name="a", num_rows=4, row_dim=2, dtype=torch.float32)
    shard = Shard(ShardSpec(table=spec, region=spec.region, optimizer=RowSGD(lr=0.1), std=1.0, seed=1))
    try:
        store.log(store.add(shard.spec)).append(1, 0, [b"push"]).result(DEADLINE_S)
        assert len(store.ledger.tables()) == 1
        store.checkpoint([Held(shard, "another life....", {}, {})])
        until(lambda: store.ledger.tables() == [])
    finally:
        store.close()


def test_a_full_disk_is_in_the_log_the_metrics_and_the_health(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with server(tmp_path / "a", file_bytes=FILE_BYTES, log=log) as process:
        _, push_one = trained(process)
        step = 0
        with pytest.raises(grpc.RpcError, match="make room"):
            while step < 1000:
                push_one(step + 1)
                step += 1
        until(lambda: health_of(process) == "NOT_SERVING")
        assert is_failing(process, "log")
        with pytest.raises(grpc.RpcError, match="make room"):
            push_one(step + 1)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until(lambda: health_of(process) == "SERVING")
        assert not is_failing(process, "log")
        push_one(step + 1)
    said = log.read_text("utf-8")
    assert said.count("WARNING pushes are refused: a push must be on disk before it is acknowledged") == 1
    assert said.count("WARNING the log is written again") == 1


def test_a_task_that_ends_ends_the_server() -> None:
    async def broken() -> None:
        raise ZeroDivisionError("a defect")

    async def ended() -> None: ...

    async def defect_of(*running: asyncio.Task[None], is_told: bool = False) -> BaseException | None:
        stopping = asyncio.Event()
        if is_told:
            stopping.set()
        return await asyncio.wait_for(_until_stopped(stopping, running), 10)

    async def all_of_them() -> None:
        lasting = asyncio.create_task(asyncio.sleep(60, None))
        assert isinstance(await defect_of(asyncio.create_task(broken()), lasting), ZeroDivisionError)
        assert isinstance(await defect_of(lasting, asyncio.create_task(ended())), InternalError)
        assert await defect_of(lasting, is_told=True) is None
        lasting.cancel()

    asyncio.run(all_of_them())


def saved_twice(folder: Path) -> ServerProcess:
    """Return a server that was killed with two checkpoints of its own, the last of rows that were loaded."""
    process, run = ServerProcess(folder / "a").start(), str(folder / "run")
    client, push_one = trained(process)
    for step in range(1, 4):
        push_one(step)
    client.stub.Save(pb.SaveRequest(), timeout=60)
    client.stub.Save(pb.SaveRequest(directory=run, step=1, world_size=1), timeout=60)
    client.stub.Load(pb.LoadRequest(directory=run), timeout=60)
    client.join()
    for step in range(4, 7):
        push_one(step)
    process.kill()
    assert len(CheckpointDirectory(process.data / "checkpoints").steps()) == 2
    return process


def test_a_damaged_checkpoint_says_what_a_server_needs_and_without_it_nothing_is_served(tmp_path: Path) -> None:
    process = saved_twice(tmp_path)
    last = CheckpointDirectory(process.data / "checkpoints").steps()[-1]
    aside = shutil.copytree(last.path, tmp_path / "aside")
    chunk = max((file for file in last.path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 0x10
    chunk.unlink()  # it may be a link that the checkpoint before has, too
    chunk.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"crc32c.*do not delete it.*an empty folder") as caught:
        process.start()
    assert "delete this one" not in str(caught.value)
    shutil.rmtree(last.path)
    with pytest.raises(CheckpointError, match=r"goes on from checkpoint 2, .* 1; bring it back"):
        process.start()
    shutil.copytree(aside, last.path)
    process.start()
    assert RawClient(process.address).join()["a"] == 6
    process.kill()
