"""What the Triton kernels share on the host: where and how they are launched, and sizes."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor

#: Multiply-adds rounded once, said outright: Triton 3.9 warns where it is left open, and later ones change the default.
LAUNCH_OPTIONS: Final = {"enable_fp_fusion": True}


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the tensor's GPU; Triton's interpreter runs on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def can_chain(tensor: Tensor) -> bool:
    """Return whether the tensor's GPU can start a kernel while the one before it still runs; see `triton_chain`."""
    return tensor.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def chain_options(*, is_chained: bool) -> dict[str, bool]:
    """Return the launch option of a kernel that waits for its inputs, which only NVIDIA's launcher takes."""
    return {"launch_pdl": True} if is_chained else {}


def at_most_registers(count: int) -> dict[str, int]:
    """Return the launch option that keeps a thread to so many registers, which only NVIDIA's compiler takes."""
    return {} if torch.version.hip else {"maxnreg": count}


def next_power_of_2(size: int) -> int:
    """Return the least power of two that is at least `size`, which must be positive."""
    return 1 << (size - 1).bit_length()
