"""How the numba kernels are compiled and spread over threads: as many as torch uses, from numba's own pool."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import torch
from numba.core import event

#: numba's fallback thread pool must not be entered by two threads at once.
_pool = threading.Lock()


def jit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a kernel at its first call and keep its machine code on disk, beside the source or in a user cache."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options.update(nogil=True, no_cfunc_wrapper=True)
        try:
            compiled: Any = numba.njit(cache=True, **options)(function)
            # numba looks at the kernel's own file alone, and would go on with machine code made of parts as they were.
            compiled._cache._cache_file._source_stamp = _stamp()
        except RuntimeError:  # neither folder can be written: compile in every process rather than fail
            compiled = numba.njit(**options)(function)
        made: Callable[..., Any] = compiled
        return made

    return decorate


@functools.cache
def _stamp() -> tuple[int, int]:
    """Return when any file of the kernels was changed last, and their size."""
    return stamp_of(Path(__file__).parent)


def stamp_of(folder: Path) -> tuple[int, int]:
    """Return when any Python file below a folder was changed last, in nanoseconds, and how long all are together."""
    stats = [file.stat() for file in folder.rglob("*.py")]
    return max((stat.st_mtime_ns for stat in stats), default=0), sum(stat.st_size for stat in stats)


def jit_part(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a part of kernels, which only they can call; without the entry from Python that takes half the time."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = numba.njit(no_cfunc_wrapper=True, no_cpython_wrapper=True, **options)(function)
        return compiled

    return decorate


@contextlib.contextmanager
def on_compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` whenever any thread begins to compile something, as opposed to loading what was compiled."""

    class Listener(event.Listener):  # type: ignore[misc]  # numba has no types
        def on_start(self, event: Any) -> None:
            tell()

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield


def num_threads(work: int, *, worth: int) -> int:
    """Return how many threads to use: torch's number, but one for less than `worth` elements of work.

    Waking a thread costs about as much as moving `worth` elements.
    """
    if work < worth:
        return 1
    most: int = numba.config.NUMBA_NUM_THREADS
    return min(torch.get_num_threads(), most)


def call(kernel: Callable[..., Any], threads: int, *args: Any) -> Any:
    """Call a kernel that contains `prange` loops with a number of threads.

    Starting its pool, numba tells OpenMP how many threads the process uses, which is torch's setting too; torch's own
    sums are split by it, and their last bits with them, so it is put back.
    """
    before = torch.get_num_threads()
    with _pool:
        numba.set_num_threads(threads)
        result = kernel(*args)
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
    return result
