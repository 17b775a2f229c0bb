"""Readers together, writers alone: what lets lookups see an update whole or not at all."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class Gate:
    """A lock for one event loop. A waiting writer keeps new readers out, so that it is not starved.

    Leaving never waits: a call whose client is gone is cancelled anywhere, and must not stay counted as within.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._num_readers = 0
        self._num_waiting_writers = 0
        self._is_writing = False

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Hold writers off."""
        await self._until(lambda: not self._is_writing and not self._num_waiting_writers)
        self._num_readers += 1
        try:
            yield
        finally:
            self._num_readers -= 1
            self._tell()

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Hold everyone off."""
        self._num_waiting_writers += 1
        try:
            await self._until(lambda: not self._is_writing and not self._num_readers)
            self._is_writing = True
        finally:
            self._num_waiting_writers -= 1
            self._tell()
        try:
            yield
        finally:
            self._is_writing = False
            self._tell()

    async def _until(self, may: Callable[[], bool]) -> None:
        while not may():
            await self._changed.wait()

    def _tell(self) -> None:
        """Wake all who wait, and let those who come next wait for the next change."""
        told, self._changed = self._changed, asyncio.Event()
        told.set()
