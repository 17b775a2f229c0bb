"""Checks that this machine can do the work: each does a small piece of it for real and says what to do if it fails."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mfdist import quantities
from mfdist.launch import machine
from mfdist.launch.check import Check, CheckFailed, attempt
from mfdist.launch.connection_checks import connection_checks

_OLDEST_TORCH = (2, 11)
_LEAST_DISK_BYTES = 1 << 30
_LEAST_MEMORY_BYTES = 1 << 30
_PROBE_BYTES = 64 << 20
_LEAST_WRITE_BYTES_PER_S = 50e6  # a checkpoint of the demo, 0.5 GB, then takes ten seconds
_TOLERANCE = 1e-5


def checks(folder: Path, cache: Path) -> Iterator[Check]:
    """Yield the checks one by one, as they are done; the kernels' may take some seconds, for they are compiled.

    Args:
        folder: where runs would be written; made by nobody here, only tried.
        cache: where tokenised text would be kept.
    """
    yield attempt("packages", _packages, "pip install --upgrade mfdist")
    yield attempt("memory", _memory, "stop other programs, or give this process more memory", is_essential=False)
    yield attempt("disk", lambda: _disk(folder), "free some space, or name a folder on another disk with --at")
    yield attempt(
        "disk speed", lambda: _disk_speed(folder), "name a folder on a faster disk with --at", is_essential=False
    )
    yield attempt("cache", lambda: _cache(cache), "set XDG_CACHE_HOME, or data.cache_dir, to a folder you can write")
    yield attempt("cpu kernels", lambda: _kernels("cpu"), "pip install --upgrade numba numpy; if it stays, report it")
    yield attempt("checkpoint", lambda: _checkpoint(folder), "name a folder that you can write with --at")
    yield attempt("file locks", lambda: _locks(folder), "put runs on a local disk, or on a file system with locks")
    yield attempt("gpu", _gpu, "install a CUDA build of torch, or the driver it asks for", is_essential=False)
    if machine.gpus():
        yield attempt("gpu kernels", lambda: _kernels("cuda"), "pip install triton", is_essential=False)
    yield from connection_checks(folder)


def _packages() -> str:
    missing = [name for name in machine.REQUIRED if machine.versions()[name] is None]
    if missing:
        raise CheckFailed(f"not installed: {', '.join(missing)}")
    import torch

    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < _OLDEST_TORCH:
        raise CheckFailed(f"torch must be {'.'.join(map(str, _OLDEST_TORCH))} or newer; got {torch.__version__}")
    return f"all {len(machine.REQUIRED)} are there; torch {torch.__version__}"


def _memory() -> str:
    found = machine.memory()
    available = found["available_bytes"] or 0
    if available < _LEAST_MEMORY_BYTES:
        raise CheckFailed(
            f"{quantities.num_bytes(available)} free; the demo needs about {quantities.num_bytes(_LEAST_MEMORY_BYTES)}"
        )
    limit = found["limit_bytes"]
    return f"{quantities.num_bytes(available)} free of {quantities.num_bytes(found['total_bytes'] or 0)}" + (
        f", limit {quantities.num_bytes(limit)}" if limit else ""
    )


def _disk(folder: Path) -> str:
    free = shutil.disk_usage(machine.existing_parent(folder)).free
    if free < _LEAST_DISK_BYTES:
        needed = quantities.num_bytes(_LEAST_DISK_BYTES)
        raise CheckFailed(f"{quantities.num_bytes(free)} free in {folder}; the demo needs about {needed}")
    return f"{quantities.num_bytes(free)} free in {folder}"


def _disk_speed(folder: Path) -> str:
    block = os.urandom(1 << 20)  # nothing that a disk could compress
    with tempfile.NamedTemporaryFile(prefix=".mfdist-doctor-", dir=machine.existing_parent(folder)) as file:
        start = time.monotonic()
        for _ in range(_PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = _PROBE_BYTES / (time.monotonic() - start)
    found = f"{quantities.num_bytes(_PROBE_BYTES)} written and synced at {speed / 1e6:.0f} MB/s"
    if speed < _LEAST_WRITE_BYTES_PER_S:
        raise CheckFailed(f"{found}; checkpoints will take long below {_LEAST_WRITE_BYTES_PER_S / 1e6:.0f} MB/s")
    return found


def _cache(cache: Path) -> str:
    with tempfile.TemporaryFile(dir=machine.existing_parent(cache)):
        return f"{cache} can be written"


def _kernels(device: str) -> str:
    """Run both kernels forward and backward on a small problem and compare with plain torch."""
    import torch

    from mfdist.kernels import gather_sum, sign_hash

    generator = torch.Generator().manual_seed(0)
    num_tokens, bits, num_tables, row_dim = 33, 8, 4, 40
    x = torch.randn(num_tokens, bits * num_tables, generator=generator)
    weight = torch.randn(num_tables << bits, row_dim, generator=generator)

    places = 1 << torch.arange(bits - 1, -1, -1)
    chunks = x.view(num_tokens, num_tables, bits)
    row_ids = ((chunks >= 0) * places).sum(-1) + torch.arange(num_tables) * (1 << bits)
    expected_x, expected_weight = chunks.clone().requires_grad_(), weight.clone().requires_grad_()
    expected_scores = torch.sigmoid(2 * expected_x.abs()).prod(-1)
    expected = (expected_weight[row_ids] * expected_scores[..., None]).sum(1)
    expected.square().sum().backward()  # type: ignore[no-untyped-call]

    got_x, got_weight = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
    codes, scores = sign_hash(got_x, bits)
    got = gather_sum(got_weight, codes, scores, 1 << bits)
    got.square().sum().backward()  # type: ignore[no-untyped-call]

    for name, ours, theirs in (
        ("lookup", got, expected),
        ("input gradient", got_x.grad, expected_x.grad),
        ("table gradient", got_weight.grad, expected_weight.grad),
    ):
        if ours is None or theirs is None:
            raise CheckFailed(f"there is no {name}")
        right = theirs.detach()
        error = float((ours.detach().cpu().reshape(right.shape) - right).norm() / right.norm())
        if not error <= _TOLERANCE:  # so written that NaN fails too
            raise CheckFailed(f"the {name} is off by {error:.1e} of its size; at most {_TOLERANCE:.0e} is right")
    return "compile, and agree with plain torch forward and backward"


def _checkpoint(folder: Path) -> str:
    """Save, verify and load a real checkpoint where runs would lie."""
    import torch

    from mfdist.checkpoint.directory import CheckpointDirectory
    from mfdist.checkpoint.state import CheckpointState, TableState

    weight = torch.arange(96, dtype=torch.float32).reshape(12, 8)
    table = TableState(weight=weight, optimizer={})
    state = CheckpointState(step=1, tables={"layer": table}, dense={"bias": weight[0].clone()}, attributes={})
    with tempfile.TemporaryDirectory(prefix=".mfdist-doctor-", dir=machine.existing_parent(folder)) as temporary:
        directory = CheckpointDirectory(Path(temporary) / "checkpoints")
        directory.save(state)
        damages = directory.verify()
        if damages:
            raise CheckFailed(f"what was written is not what is read: {damages[0]}")
        if not torch.equal(directory.load().tables["layer"].weight, weight):
            raise CheckFailed("a table came back with other values")
    return f"written, synced and read back in {folder}"


def _locks(folder: Path) -> str:
    import fcntl

    with tempfile.NamedTemporaryFile(dir=machine.existing_parent(folder)) as first:
        fcntl.flock(first.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = os.open(first.name, os.O_RDWR)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"work in {folder}"
        finally:
            os.close(second)
    raise CheckFailed(f"two processes can lock one file in {folder}; a run could be written by both")


def _gpu() -> str:
    found = machine.gpus()
    if found:
        return ", ".join(f"{gpu['name']} with {quantities.num_bytes(gpu['memory_bytes'])}" for gpu in found)
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        import torch

        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        raise CheckFailed(f"there is an NVIDIA driver, but torch {torch.__version__} {build} and finds no GPU")
    return "none; training uses the CPU"
