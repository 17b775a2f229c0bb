"""The gate, with tasks that are cancelled anywhere, as those of clients that are gone are."""

import asyncio
import random

import pytest

from mfdist.table_server.gate import Gate


@pytest.mark.parametrize("seed", range(20))
def test_writers_are_alone_and_whoever_is_cancelled_is_not_within(seed: int) -> None:
    draw = random.Random(seed)
    gate, within = Gate(), {"readers": 0, "writers": 0}

    async def use(kind: str) -> None:
        async with gate.reading() if kind == "readers" else gate.writing():
            within[kind] += 1
            try:
                assert within["writers"] == (kind == "writers")
                assert kind == "readers" or not within["readers"]
                for _ in range(draw.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                within[kind] -= 1

    async def disturbed() -> None:
        tasks = [asyncio.create_task(use(draw.choice(("readers", "readers", "writers")))) for _ in range(200)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            task = draw.choice(tasks)
            if draw.random() < 0.5:
                task.cancel()
        for task in tasks:
            assert task.cancelled() or task.exception() is None
        await asyncio.wait_for(use("writers"), 10)
        await asyncio.wait_for(use("readers"), 10)

    asyncio.run(asyncio.wait_for(disturbed(), 30))


def test_a_waiting_writer_goes_before_later_readers_and_one_that_gives_up_lets_them_in() -> None:
    async def order() -> None:
        gate, came = Gate(), list[str]()

        async def enter(name: str, is_writer: bool) -> None:
            async with gate.writing() if is_writer else gate.reading():
                came.append(name)

        async with gate.reading():
            given_up = asyncio.create_task(enter("given up", True))
            await asyncio.sleep(0)
            reader = asyncio.create_task(enter("reader", False))
            await asyncio.sleep(0)
            assert came == []
            given_up.cancel()
            await asyncio.wait_for(reader, 10)
            assert came == ["reader"]
            writer = asyncio.create_task(enter("writer", True))
            await asyncio.sleep(0)
            later = asyncio.create_task(enter("later", False))
            await asyncio.sleep(0)
            assert came == ["reader"]
        await asyncio.wait_for(asyncio.gather(writer, later), 10)
        assert came == ["reader", "writer", "later"]

    asyncio.run(order())
