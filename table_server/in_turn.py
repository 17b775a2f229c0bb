"""Answers to a stream in its order, the next one made while one is on its way."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

_Q = TypeVar("_Q")
_A = TypeVar("_A")

_END: Final = object()


async def in_turn(questions: AsyncIterator[_Q], answer: Callable[[_Q], Awaitable[_A]]) -> AsyncGenerator[_A, None]:
    """Yield the answer to each question, in their order; a failure comes in its turn.

    Close it, as with `contextlib.aclosing`: an answer that nobody will take is given up then.
    """

    async def one() -> Any:
        question: Any = await anext(questions, _END)
        return _END if question is _END else await answer(question)

    coming = asyncio.ensure_future(one())
    try:
        while (made := await coming) is not _END:
            coming = asyncio.ensure_future(one())
            yield made
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
