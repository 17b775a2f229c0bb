"""Choosing the device a run computes on, how it computes there, and what it uses of it."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mfdist import quantities
from mfdist.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the device called `auto`, `cpu` or `cuda`; auto takes a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and torch sees none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError(
            f"training.device=cuda needs a GPU that torch {torch.__version__} can use, and it sees none; "
            "use auto or cpu, or see `mfdist doctor`"
        )
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def describe_device(device: torch.device) -> str:
    """Return the device's name and size as a reader knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {quantities.threads(torch.get_num_threads())}"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether torch had no memory left: it has a class for that on a GPU, and none on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def deterministic(is_on: bool) -> Iterator[None]:
    """Make torch repeat itself bit for bit while the body runs, then put its switches back."""
    if not is_on:
        yield
        return
    # cuBLAS reads this when its first handle is made; without it torch refuses deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic: Any = torch.utils.deterministic  # its flag is a property that torch does not type
    was_on, filled = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # it costs a pass over every new tensor and hides nothing here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)
        deterministic.fill_uninitialized_memory = filled
