"""A push that is sent again while its update is being made."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mfdist.optim import RowSGD
from mfdist.spec import TableSpec
from mfdist.table_server.messages import ShardSpec
from mfdist.table_server.shard import Contribution, Lookups, Shard
from mfdist.table_server.updates import Push, Updates


class SlowDisk:
    """Puts things on disk when it is told to."""

    def __init__(self) -> None:
        self.written: list[concurrent.futures.Future[None]] = []

    def append(self, version: int, client: int, payload: list[bytes]) -> "concurrent.futures.Future[None]":
        self.written.append(concurrent.futures.Future())
        return self.written[-1]


async def slowly(function: Callable[..., Any], *args: object) -> Any:
    made = function(*args)
    await asyncio.sleep(0.05)  # the rows have changed, and the loop does not know yet
    return made


def first_push() -> tuple[Shard, Push]:
    spec = TableSpec(name="a", num_rows=8, row_dim=4, dtype=torch.float32)
    shard = Shard(ShardSpec(table=spec, region=spec.region, optimizer=RowSGD(lr=0.1), std=1.0, seed=1))
    lookups = Lookups(torch.arange(6).view(3, 2), torch.ones(3, 2))
    contribution = Contribution(lookups, torch.randn(3, 4))
    return shard, Push(client=0, step=1, lr=0.1, contribution=contribution, payload=[b"push"])


@pytest.mark.parametrize("max_staleness", [None, 4])
def test_it_has_the_answer_of_the_first_and_waits_for_the_disk(max_staleness: int | None) -> None:
    (shard, push), disk = first_push(), SlowDisk()

    async def twice() -> None:
        updates = Updates(shard, disk, slowly, max_staleness)
        first = asyncio.create_task(updates.push(push, 1, 10.0))
        await asyncio.sleep(0.02)
        assert shard.version == 1
        answers = await updates.push(push, 1, 10.0), await first
        gradients = [answer.score_gradients for answer in answers]
        assert gradients[0] is not None
        assert gradients[1] is not None
        assert torch.equal(gradients[0], gradients[1])
        waiting = [asyncio.ensure_future(answer.on_disk) for answer in answers]
        await asyncio.sleep(0.02)
        assert not any(one.done() for one in waiting)
        for future in disk.written:
            future.set_result(None)
        await asyncio.gather(*waiting)

    asyncio.run(twice())
    assert shard.version == 1


@pytest.mark.parametrize("max_staleness", [None, 4])
def test_one_who_waits_for_the_disk_and_is_cancelled_leaves_the_others_waiting(max_staleness: int | None) -> None:
    (shard, push), disk = first_push(), SlowDisk()

    async def cancelled() -> None:
        updates = Updates(shard, disk, slowly, max_staleness)
        gone = asyncio.ensure_future((await updates.push(push, 1, 10.0)).on_disk)
        await asyncio.sleep(0)
        gone.cancel()
        reader = asyncio.create_task(updates.on_disk(1))
        again = asyncio.ensure_future((await updates.push(push, 1, 10.0)).on_disk)
        await asyncio.sleep(0.02)
        assert not reader.done()
        assert not again.done()
        for future in disk.written:
            future.set_running_or_notify_cancel()
            future.set_result(None)
        await asyncio.wait_for(asyncio.gather(reader, again), 10)
        assert len(disk.written) == 1

    asyncio.run(cancelled())
