"""Choosing the device a run computes on, and what it uses of it."""

import resource
import sys

import torch

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
    return f"CPU, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
