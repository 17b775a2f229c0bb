"""Memory of messages stays with a server: few arenas, and no page is asked for twice."""

import os
import subprocess
import sys

import pytest

#: Prints how many arenas threads made, and how many pages were faulted in for 200 blocks of 8 MiB, one after the other.
CODE = """
import ctypes, resource, sys, threading
from mfdist.table_server import allocator
if sys.argv[1] == "kept":
    allocator.keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
barrier = threading.Barrier(12)
def one():
    barrier.wait(30)
    libc.free(libc.malloc(5000))
    barrier.wait(30)
threads = [threading.Thread(target=one) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_stats()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
sizes = [8 << 20, 12 << 20, 16 << 20]
def fill():
    held = [libc.malloc(size) for size in sizes]
    for address, size in zip(held, sizes):
        ctypes.memset(address, 1, size)
        libc.free(address)
fill()
before = faults()
for _ in range(50):
    fill()
print(faults() - before)
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc"
)


def found(how: str, **environment: str) -> tuple[int, int]:
    """Return the arenas and the page faults."""
    ran = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return ran.stderr.count("Arena "), int(ran.stdout)


def test_few_arenas_and_no_page_is_asked_for_twice() -> None:
    arenas, faults = found("kept")
    assert arenas <= 2
    assert faults < 100
    arenas, faults = found("as it is")
    assert arenas > 2
    assert faults > 1000


def test_what_the_environment_says_stays() -> None:
    assert found("kept", GLIBC_TUNABLES="glibc.malloc.arena_max=5")[0] > 2
    assert found("kept", MALLOC_TRIM_THRESHOLD_="1000")[1] > 1000
