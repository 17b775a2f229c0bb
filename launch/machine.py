"""Facts about this machine and its software, as plain JSON values."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from mfdist import __version__

#: Distributions that mfdist cannot run without, and those that one feature needs.
REQUIRED = (
    "torch",
    "numpy",
    "numba",
    "pydantic",
    "tomli-w",
    "crc32c",
    "xxhash",
    "tokenizers",
    "zstandard",
    "psutil",
    "typer",
    "rich",
)
OPTIONAL = (
    "triton",
    "ray",
    "grpcio",
    "protobuf",
    "transformers",
    "datasets",
    "pyarrow",
    "obstore",
    "safetensors",
    "tensorboard",
)

_VECTOR_FLAGS = ("sse4_2", "avx", "fma", "f16c", "amx", "asimd", "sve")
_CGROUP_MEMORY = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_NO_CGROUP_LIMIT_BYTES = 2**60


def versions() -> dict[str, str | None]:
    """Return the versions of Python, mfdist and everything it uses; None where something is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "mfdist": __version__}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe(folder: Path, cache: Path) -> dict[str, Any]:
    """Return what this machine has: system, cores, memory, GPUs, and free disk where runs and the cache would lie."""
    return {
        "system": platform.platform(),
        "cpu": cpu(),
        "memory": memory(),
        "gpus": gpus(),
        "disk": {"runs": disk(folder), "cache": disk(cache)},
    }


def cpu() -> dict[str, Any]:
    """Return the processor's name, its cores, those this process may use, and its vector extensions."""
    name, flags = _cpuinfo()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": name or platform.processor(), "cores": os.cpu_count(), "usable_cores": usable, "flags": flags}


def memory() -> dict[str, int | None]:
    """Return memory in bytes: all, what is free now, and the limit this process lives under, if there is one."""
    import psutil

    now = psutil.virtual_memory()
    return {"total_bytes": now.total, "available_bytes": now.available, "limit_bytes": _memory_limit_bytes()}


def num_gpus() -> int:
    """Return how many NVIDIA GPUs this machine has, without loading torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def gpus() -> list[dict[str, Any]]:
    """Return the GPUs that torch can use; none where torch is missing or built without CUDA."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "free_bytes": free, "memory_bytes": total})
    return found


def disk(path: Path) -> dict[str, Any]:
    """Return the free bytes of the disk that holds `path` or would hold it."""
    return {"path": str(path), "free_bytes": shutil.disk_usage(existing_parent(path)).free}


def existing_parent(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.is_dir())


def _cpuinfo() -> tuple[str, list[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return "", []
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    return fields.get("model name", ""), sorted(flag for flag in flags if flag.startswith(_VECTOR_FLAGS))


def _memory_limit_bytes() -> int | None:
    for name in _CGROUP_MEMORY:
        try:
            text = Path(name).read_text("ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _NO_CGROUP_LIMIT_BYTES:
            return int(text)
    return None
