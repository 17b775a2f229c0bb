"""Answers come in order, one ahead, and nothing runs on once nobody takes them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from mfdist.table_server.in_turn import in_turn


async def questions(number: int) -> AsyncIterator[int]:
    for each in range(number):
        yield each


def test_answers_come_in_order_and_the_next_is_made_meanwhile() -> None:
    begun: list[int] = []

    async def answer(question: int) -> int:
        begun.append(question)
        await asyncio.sleep(0)
        return 10 * question

    async def run() -> None:
        got = []
        async for reply in in_turn(questions(5), answer):
            for _ in range(10):  # as long as it takes to send
                await asyncio.sleep(0)
            got.append(reply)
            assert len(begun) == min(5, len(got) + 1)
        assert got == [0, 10, 20, 30, 40]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_whoever_asks_one_by_one_is_answered_one_by_one() -> None:
    async def run() -> None:
        answered = asyncio.Event()

        async def asking() -> AsyncIterator[int]:
            yield 1
            await answered.wait()
            yield 2

        async def answer(question: int) -> int:
            return question

        got = []
        async for reply in in_turn(asking(), answer):
            got.append(reply)
            answered.set()
        assert got == [1, 2]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_failure_comes_in_its_turn() -> None:
    async def answer(question: int) -> int:
        if question == 2:
            raise ValueError("two")
        return question

    async def run() -> None:
        got = []
        with pytest.raises(ValueError, match="two"):
            async for reply in in_turn(questions(5), answer):
                got.append(reply)
        assert got == [0, 1]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_what_nobody_will_take_is_given_up() -> None:
    async def run() -> None:
        ends: list[int] = []
        before = asyncio.all_tasks()

        async def answer(question: int) -> int:
            try:
                await asyncio.sleep(60 if question else 0)
            except asyncio.CancelledError:
                ends.append(question)
                raise
            return question

        async with contextlib.aclosing(in_turn(questions(3), answer)) as replies:
            async for _ in replies:
                await asyncio.sleep(0.01)
                break
        assert ends == [1]
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(run(), 30))
