"""Readers together, writers alone: what lets lookups see an update whole or not at all."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """A lock for one event loop. A waiting writer keeps new readers out, so that it is not starved."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._num_readers = 0
        self._num_waiting_writers = 0
        self._is_writing = False

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Hold writers off."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_writing and not self._num_waiting_writers)
            self._num_readers += 1
        try:
            yield
        finally:
            async with self._changed:
                self._num_readers -= 1
                self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Hold everyone off."""
        async with self._changed:
            self._num_waiting_writers += 1
            try:
                await self._changed.wait_for(lambda: not self._is_writing and not self._num_readers)
                self._is_writing = True
            finally:
                self._num_waiting_writers -= 1
        try:
            yield
        finally:
            async with self._changed:
                self._is_writing = False
                self._changed.notify_all()
