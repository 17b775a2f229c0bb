"""Row ids on the CPU: the check that all of them lie in the table, before any row is read."""

from typing import Any

import numpy as np
from torch import Tensor

from mfdist.kernels.cpu_threads import jit
from mfdist.kernels.row_id_check import row_id_error


def checked_ids(row_ids: Tensor, limit: int, name: str, *, is_code: bool) -> Any:
    """Return ids [N, K] as a flat numpy array, none of them copied if they are contiguous.

    Raises:
        RowIdError: an id is negative or not below `limit`.
    """
    ids = row_ids.contiguous().numpy().reshape(-1)
    if ids.dtype == np.uint8 and limit > np.iinfo(np.uint8).max:
        return ids
    first = _first_outside(ids, limit)
    if first >= 0:
        raise row_id_error(int(ids[first]), limit, name, is_code=is_code, lookup=first % row_ids.shape[1])
    return ids


@jit()
def _first_outside(ids: Any, limit: Any) -> Any:
    num_outside = 0
    for i in range(ids.size):
        num_outside += (ids[i] < 0) | (ids[i] >= limit)
    if num_outside:
        for i in range(ids.size):
            if ids[i] < 0 or ids[i] >= limit:
                return i
    return -1
