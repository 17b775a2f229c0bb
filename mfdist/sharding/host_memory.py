"""Host memory: ranks of one host, on CPUs, write into memory that they share, with no network in between."""

import contextlib
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mfdist.sharding.mailboxes import GrowingMailboxes, Mailboxes
from mfdist.sharding.tag_links import TagLinks

#: Of a message; see `GrowingMailboxes`. What stays in a processor's cache is exchanged sooner.
_MOST_BYTES = 16 << 20


class HostMemory(GrowingMailboxes):
    """Mailboxes in anonymous files that all ranks of a host map; they are gone with the last of them.

    Args:
        links: among the ranks; files are handed over by them, and ranks wait for each other by them.
        deadline_s: longest wait for the slowest rank.
    """

    def __init__(self, links: TagLinks, deadline_s: float) -> None:
        super().__init__(links.world_size, _MOST_BYTES, in_parts=True)
        self._links, self._deadline_s = links, deadline_s
        self._came = torch.zeros(links.world_size, 1, dtype=torch.int64, device="cpu")

    def _make(self, num_bytes: int) -> Mailboxes | None:
        file = -1
        with contextlib.suppress(AttributeError, OSError):  # AttributeError: not Linux
            file = os.memfd_create("mfdist-mailbox")
            os.ftruncate(file, num_bytes)
        memory: list[Tensor] = []
        if self._agree(file >= 0):
            with contextlib.suppress(OSError, ValueError):
                memory = _mapped(self._links.trade_files(file, self._deadline_s), num_bytes)
        elif file >= 0:
            os.close(file)
        return Mailboxes(self._links.rank, memory, self._wait) if self._agree(bool(memory)) else None

    def _wait(self) -> None:
        self._links.start(torch.empty_like(self._came), self._came, self._deadline_s).wait()

    def _agree(self, is_well: bool) -> bool:
        """Return whether all ranks are well."""
        received = torch.empty_like(self._came)
        self._links.start(received, torch.full_like(self._came, int(is_well)), self._deadline_s).wait()
        return bool(received.all())

    def give_up(self) -> None:
        """Do nothing: on a CPU nothing goes on by itself."""


def _mapped(files: Sequence[int], num_bytes: int) -> list[Tensor]:
    """Return the memory of files, which are closed."""
    try:
        return [torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8) for file in files]
    finally:
        for file in files:
            os.close(file)
