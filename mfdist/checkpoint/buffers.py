"""Host memory that a save copies into: bounded, used again and again, and filled before the disk is waited for."""

import threading

import torch
from torch import Tensor

from mfdist.checkpoint.grid import CHUNK_BYTES, CHUNKS_PER_FILE

_USUAL_BYTES = CHUNK_BYTES * CHUNKS_PER_FILE


class BlockBuffers:
    """Buffers of a file's size, at most `max_bytes` of them in use; whoever wants more waits until some are given back.

    Thread-safe. Buffers stay allocated for the next save, because touching new memory costs as much as copying to it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._free: list[Tensor] = []
        self._in_use = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> Tensor:
        """Return `num_bytes` of uninitialised memory, uint8; a block larger than the bound is lent when it is alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_use or self._in_use + num_bytes <= self._max_bytes)
            self._in_use += num_bytes
            buffer = self._free.pop() if self._free and num_bytes <= _USUAL_BYTES else None
        if buffer is None:
            is_pinned = torch.cuda.is_available()
            buffer = torch.empty(max(num_bytes, _USUAL_BYTES), dtype=torch.uint8, pin_memory=is_pinned)
        return buffer[:num_bytes]

    def give_back(self, buffer: Tensor) -> None:
        """Take a buffer back, which the caller no longer uses."""
        whole = buffer if buffer._base is None else buffer._base
        with self._changed:
            self._in_use -= buffer.numel()
            if whole.numel() == _USUAL_BYTES:
                self._free.append(whole)
            self._changed.notify_all()
