"""Tensors as the numba kernels take them: flat numpy arrays, rows in a dtype that says how to read them."""

import ctypes
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PAGE_BYTES = 4096
_MADV_HUGEPAGE = 14
#: Below this the C library's own reuse of freed memory does better.
_HUGE_BYTES = 32 << 20


def flat(tensor: Tensor) -> Any:
    """Return fp32 values as a flat array, copied only if they are not contiguous."""
    return _detached(tensor).contiguous().numpy().reshape(-1)


def flat_rows(table: Tensor) -> Any:
    """Return rows as a flat array of the types `lanes` reads them by.

    They are float32 for fp32, uint16 for bf16 and int16 for fp16; int8, and uint8 for e4m3, stay as they are.
    """
    return np.asarray(_Memory(_detached(table).contiguous()))


#: How `lanes` reads rows: bf16 as unsigned words, fp16 as signed ones.
_READ_AS = {
    torch.float32: "<f4",
    torch.bfloat16: "<u2",
    torch.float16: "<i2",
    torch.int8: "|i1",
    torch.uint8: "|u1",
}


class _Memory:
    """A contiguous tensor's memory, as numpy takes it.

    `Tensor.numpy` would do, but forbids ever after that the storage is resized, as FSDP does to give memory back.
    """

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        place, typestr = (tensor.data_ptr(), False), _READ_AS[tensor.dtype]
        self.__array_interface__ = {"data": place, "shape": (tensor.numel(),), "typestr": typestr, "version": 3}


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor  # half a microsecond, which tells when decoding


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Return a newly made tensor, its memory marked for huge pages on Linux if it is large.

    A large tensor is new memory each time, and a fault for each 4 KiB page of it costs more than filling it.
    """
    if sys.platform == "linux" and fresh.nbytes >= _HUGE_BYTES:
        first = -(-fresh.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
        size = (fresh.data_ptr() + fresh.nbytes - first) // _PAGE_BYTES * _PAGE_BYTES
        # Only advice: where it is refused the pages stay small.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return fresh
