"""Tensors as the numba kernels take them: flat numpy arrays, rows in a dtype that says how to read them.

Where microseconds tell, kernels take addresses instead, and an empty array for each dtype: handing over an array costs
a microsecond, an address a tenth of one.
"""

from typing import Any

import numba
import numpy as np
import torch
from numba.core.types.misc import CPointer
from numba.extending import intrinsic
from torch import Tensor

from mfdist.kernels.cpu_threads import jit_part

#: dtype of rows → an empty array of the type that `flat_rows` gives.
LIKE: dict[torch.dtype, Any] = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
    torch.int8: np.empty(0, np.int8),
    torch.uint8: np.empty(0, np.uint8),
}


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


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    pointer = CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@jit_part()
def array_at(address: Any, like: Any) -> Any:
    """Return the flat array of `like`'s dtype at an address, in a kernel whose caller keeps its memory; of no size."""
    return numba.carray(_pointer(address, like), (0,))


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor  # half a microsecond, which tells when decoding
