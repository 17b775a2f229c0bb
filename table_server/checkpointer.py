"""When a server checkpoints by itself: whenever its log has grown to its limit."""

import asyncio
import logging
from typing import TYPE_CHECKING

from mfdist.errors import MfdistError

if TYPE_CHECKING:
    from mfdist.table_server.node import Node

_LOOK_S = 1.0  # between looks at the log's size
_LAST_PAUSE_S = 60.0  # the longest, between attempts that fail: each may write all rows in vain

_logger = logging.getLogger(__name__)


class Checkpointer:
    """Checkpoints a node in time. Where that fails it says so once, and tries again: the log has all that is needed.

    Args:
        node: what the server holds.
    """

    def __init__(self, node: "Node") -> None:
        self._node = node
        self.failure = ""  # of the last attempt, until a checkpoint is there

    async def run(self) -> None:
        """Look at the log again and again; runs until it is cancelled."""
        pause_s = _LOOK_S
        while True:
            await asyncio.sleep(pause_s)
            if self._is_due and self._node.standing.is_whole:
                await self._checkpoint()
            elif self.failure and not self._is_due:  # somebody else asked for one
                self._recovered()
            pause_s = min(_LAST_PAUSE_S, 2 * pause_s) if self.failure else _LOOK_S

    @property
    def _is_due(self) -> bool:
        return self._node.store.unsaved_bytes > self._node.config.log_gib * 2**30

    async def _checkpoint(self) -> None:
        try:
            await self._node.checkpoint()
        except (MfdistError, OSError) as error:
            if str(error) != self.failure:
                self.failure = str(error)
                fields = {"log_bytes": self._node.store.unsaved_bytes}
                _logger.warning("no checkpoint, the log grows until there is one: %s", error, extra={"fields": fields})
        else:
            if self.failure:
                self._recovered()

    def _recovered(self) -> None:
        self.failure = ""
        _logger.warning("checkpoints work again")
