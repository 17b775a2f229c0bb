"""Tensors as the numba kernels take them: flat numpy arrays, rows in a dtype that says how to read them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def flat(tensor: Tensor) -> Any:
    """Return fp32 values as a flat array, copied only if they are not contiguous."""
    return tensor.detach().contiguous().numpy().reshape(-1)


def flat_rows(table: Tensor) -> Any:
    """Return fp32, bf16 or fp16 rows as a flat array of float32, uint16 or int16, the types `lanes` reads them by."""
    table = table.detach().contiguous()
    if table.dtype == torch.float32:
        return table.numpy().reshape(-1)
    words = table.view(torch.int16).numpy().reshape(-1)
    return words.view(np.uint16) if table.dtype == torch.bfloat16 else words
