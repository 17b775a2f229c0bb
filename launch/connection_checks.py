"""Checks of what several processes and hosts need from a machine: ports, groups of ranks, shared memory, a clock."""

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from mfdist import quantities
from mfdist.launch import machine
from mfdist.launch.check import Check, CheckFailed, attempt

_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED_MEMORY_BYTES = 256 << 20  # containers often start with 64 MiB, which Ray and workers of loaders outgrow
_MOST_SKEW_S = 5.0
_DEADLINE_S = 20.0


def connection_checks(folder: Path) -> Iterator[Check]:
    """Yield the checks one by one, as they are done. None is essential: one process trains without any of it.

    Args:
        folder: where runs would be written, whose file system has a clock too.
    """
    yield attempt("loopback", _loopback, "allow connections to 127.0.0.1, in the firewall too", is_essential=False)
    yield attempt(
        "gloo",
        _gloo,
        "give this machine's name an address in /etc/hosts, or set GLOO_SOCKET_IFNAME to a network interface",
        is_essential=False,
    )
    if machine.gpus():
        yield attempt("nccl", _nccl, "install a CUDA build of torch, which brings NCCL", is_essential=False)
    yield attempt(
        "shared memory", _shared_memory, "start the container with more: docker run --shm-size=8g", is_essential=False
    )
    yield attempt("clock", lambda: _clock(folder), "set the clocks of all machines by NTP", is_essential=False)


def _loopback() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=_DEADLINE_S):
            return f"a port was opened and reached ({port})"


def _gloo() -> str:
    """Let two ranks, both in this process, add up a tensor over gloo, as ranks of a training do."""
    import torch
    from torch import distributed as dist

    sums: list[float] = []
    troubles: list[str] = []

    def rank(number: int, path: str) -> None:
        try:
            store = dist.FileStore(path, 2)  # type: ignore[attr-defined]
            group = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=_DEADLINE_S))
            value = torch.tensor([float(number + 1)])
            group.allreduce([value]).wait()  # type: ignore[attr-defined]
            sums.append(value.item())
        except RuntimeError as error:
            troubles.append(" ".join(str(error).split()))

    if not dist.is_available() or not dist.is_gloo_available():
        raise CheckFailed(f"torch {torch.__version__} has no gloo; ranks on CPUs cannot speak to each other")
    with tempfile.TemporaryDirectory(prefix="mfdist-doctor-") as temporary:
        path = str(Path(temporary) / "rendezvous")
        ranks = [threading.Thread(target=rank, args=(number, path), daemon=True) for number in range(2)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(2 * _DEADLINE_S)
    if troubles:
        raise CheckFailed(troubles[0])
    if sums != [3.0, 3.0]:
        raise CheckFailed(
            f"two ranks must agree on a sum within {2 * _DEADLINE_S:g} s; got {sums} instead of [3.0, 3.0]"
        )
    return "two ranks met and added up"


def _nccl() -> str:
    import torch
    from torch import distributed as dist

    if not dist.is_available() or not dist.is_nccl_available():
        raise CheckFailed(f"torch {torch.__version__} has no NCCL; ranks on GPUs cannot speak to each other")
    version = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    count = torch.cuda.device_count()
    return f"{version}, for {count} GPU{'s' if count > 1 else ''}"


def _shared_memory() -> str:
    if not _SHARED_MEMORY.is_dir():
        raise CheckFailed(f"there is no {_SHARED_MEMORY}")
    with tempfile.TemporaryFile(dir=_SHARED_MEMORY):
        free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < _LEAST_SHARED_MEMORY_BYTES:
        least = quantities.num_bytes(_LEAST_SHARED_MEMORY_BYTES)
        raise CheckFailed(f"{quantities.num_bytes(free)} free in {_SHARED_MEMORY}; clusters need at least {least}")
    return f"{quantities.num_bytes(free)} free in {_SHARED_MEMORY}"


def _clock(folder: Path) -> str:
    """Compare this machine's clock with that of the file system, which another machine's may be."""
    with tempfile.NamedTemporaryFile(dir=machine.existing_parent(folder)) as file:
        before = time.time()
        file.write(b"x")
        file.flush()
        written = os.stat(file.fileno()).st_mtime  # noqa: PTH116 - of an open file
        after = time.time()
    skew = max(before - written, written - after, 0.0)
    if skew > _MOST_SKEW_S:
        raise CheckFailed(
            f"it and the file system of {folder} are {skew:.0f} s apart; at most {_MOST_SKEW_S:.0f} s is right"
        )
    return f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, as the file system has it"
