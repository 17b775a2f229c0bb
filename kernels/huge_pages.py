"""Huge pages for large tensors on Linux, where they cost nothing.

Rows that are read at random need the translation of an address each; with pages of 2 MiB instead of 4 KiB these fit in
the processor, and new memory is filled without a fault for each 4 KiB.
"""

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

_MADV_HUGEPAGE = 14
_HUGE_BYTES = 2 << 20
#: Below this the C library's own reuse of freed memory does better.
_WORTH_BYTES = 32 << 20


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Return a newly made tensor, its memory on a CPU marked for huge pages if it is large and as many are free.

    The system would make room for them by moving what lies between, which takes several times what they save.
    """
    is_memory = sys.platform == "linux" and type(fresh) is Tensor and fresh.device.type == "cpu"
    if is_memory and _WORTH_BYTES <= fresh.nbytes <= _free_bytes():
        first = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (fresh.data_ptr() + fresh.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        # Only advice: where it is refused the pages stay small.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return fresh


def _free_bytes() -> int:
    """Return the memory that is free in whole huge pages, or 0 where that cannot be known."""
    try:
        lines = Path("/proc/buddyinfo").read_text("ascii").splitlines()
    except OSError:
        return 0
    total = 0
    for line in lines:  # Node 0, zone Normal, then the number of free blocks of 1, 2, 4, … pages
        for order, count in enumerate(line.split()[4:]):
            block_bytes = mmap.PAGESIZE << order
            total += int(count) * block_bytes if block_bytes >= _HUGE_BYTES else 0
    return total
