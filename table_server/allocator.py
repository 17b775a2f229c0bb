"""How the C library of a server keeps memory that messages leave behind: for the next ones, in few places.

By default each of a server's threads takes memory from a place of its own, up to eight for a core, and all of them grow
until each has held the largest messages; and what a large message leaves is given back to the system, to be asked for
and filled with zeros again, page by page, for the next one.
"""

import ctypes
import os
import sys
from typing import Final

# Of glibc's mallopt(3), and what each is called in GLIBC_TUNABLES.
_ARENA_MAX: Final = (-8, "glibc.malloc.arena_max", "MALLOC_ARENA_MAX")
_MMAP_THRESHOLD: Final = (-3, "glibc.malloc.mmap_threshold", "MALLOC_MMAP_THRESHOLD_")
_TRIM_THRESHOLD: Final = (-1, "glibc.malloc.trim_threshold", "MALLOC_TRIM_THRESHOLD_")

_SETTINGS: Final = (
    (*_ARENA_MAX, 2),  # gRPC's threads and Python's
    (*_MMAP_THRESHOLD, 32 << 20),  # the most it takes, and twice the largest message
    (*_TRIM_THRESHOLD, 128 << 20),  # what is freed beyond, as after a large push, is given back
)


def keep_memory() -> None:
    """Have this process's C library keep memory as a server needs it, unless its environment says otherwise.

    Called before other threads begin; where the library is not glibc, it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    said = os.environ.get("GLIBC_TUNABLES", "")
    for number, tunable, variable, value in _SETTINGS:
        if tunable not in said and variable not in os.environ:
            mallopt(number, value)
