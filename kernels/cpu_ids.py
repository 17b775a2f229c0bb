"""Row ids on the CPU: checked before any row is read, and read by the kernels in whichever width they came."""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mfdist.kernels.cpu_threads import jit_part
from mfdist.kernels.row_id_check import row_id_error

_UNSIGNED = {1: np.uint8, 4: np.uint32, 8: np.uint64}


class Ids(NamedTuple):
    """Flat ids; the array of their own width holds them and the others are empty.

    One type for all widths: kernels are compiled once, and a branch that always goes the same way costs next to nothing
    beside reading a row. Kernels' own tuples start with these fields, because numba takes no tuple within a tuple.
    """

    id_bytes: int
    narrow_ids: Any
    middle_ids: Any
    wide_ids: Any


def checked_ids(row_ids: Tensor, limit: int, name: str, *, is_code: bool) -> Ids:
    """Return ids [N, K] as the kernels take them, without a copy if they are contiguous.

    Raises:
        RowIdError: an id is negative or not below `limit`.
    """
    ids = row_ids.contiguous().numpy().reshape(-1)
    unsigned = _UNSIGNED[ids.itemsize]
    # As an unsigned number a negative id is a very large one, so one comparison does for both ends.
    if ids.size and (ids.itemsize > 1 or limit <= np.iinfo(unsigned).max) and ids.view(unsigned).max() >= limit:
        first = int((ids.view(unsigned) >= limit).argmax())
        raise row_id_error(int(ids[first]), limit, name, is_code=is_code, lookup=first % row_ids.shape[1])
    return Ids(ids.itemsize, *(ids if ids.itemsize == size else _NO_IDS[size] for size in (1, 4, 8)))


_NO_IDS = {1: np.empty(0, np.uint8), 4: np.empty(0, np.int32), 8: np.empty(0, np.int64)}


@jit_part()
def id_at(lookup: Any, index: Any) -> Any:
    """Return id number `index` as int64, from a tuple that has the fields of `Ids`."""
    if lookup.id_bytes == 1:
        return np.int64(lookup.narrow_ids[index])
    if lookup.id_bytes == 4:
        return np.int64(lookup.middle_ids[index])
    return lookup.wide_ids[index]
