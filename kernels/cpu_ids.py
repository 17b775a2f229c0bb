"""Row ids on the CPU: checked before any row is read, and read by the kernels in whichever width they came."""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mfdist.kernels.cpu_threads import jit_part
from mfdist.kernels.lanes import at
from mfdist.kernels.row_id_check import row_id_error


class Ids(NamedTuple):
    """Flat ids; the array of their own width holds them and the others are empty.

    One type for all widths, so that kernels are compiled once. Kernels' own tuples start with these fields, because
    numba takes no tuple within a tuple.
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
    ids: Any = row_ids.contiguous().numpy().reshape(-1)
    size = ids.itemsize
    if size > 1 or limit <= _MAX_BYTE:
        # As an unsigned number a negative id is a very large one, so one comparison does for both ends.
        unsigned = ids.view(np.uint8 if size == 1 else np.uint32 if size == 4 else np.uint64)
        if ids.size and unsigned.max() >= limit:
            first = int((unsigned >= limit).argmax())
            raise row_id_error(int(ids[first]), limit, name, is_code=is_code, lookup=first % row_ids.shape[1])
    if size == 1:
        return Ids(size, ids, _NO_MIDDLE, _NO_WIDE)
    return Ids(size, _NO_NARROW, ids, _NO_WIDE) if size == 4 else Ids(size, _NO_NARROW, _NO_MIDDLE, ids)


_MAX_BYTE = 255
_NO_NARROW, _NO_MIDDLE, _NO_WIDE = np.empty(0, np.uint8), np.empty(0, np.int32), np.empty(0, np.int64)


@jit_part()
def find_rows(lookup: Any, low: Any, high: Any, first: Any, end: Any, origin: Any) -> Any:
    """Return the rows of lookups [first, end) of tokens [low, high) as a flat int64 array.

    Args:
        lookup: a tuple that has the fields of `Ids`, K, and S, the code stride or 0.
        low: first token.
        high: token after the last one.
        first: first lookup.
        end: lookup after the last one.
        origin: lookup that owns row 0; with a code stride, rows are counted from its first one.
    """
    count = end - first
    rows = np.empty((high - low) * count, np.int64)
    for n in range(low, high):
        to = (n - low) * count
        start = n * lookup.K + first
        row = (first - origin) * lookup.S
        if lookup.id_bytes == 1:
            for i in range(count):
                rows[to + i] = row + i * lookup.S + np.int64(at(lookup.narrow_ids, start + i))
        elif lookup.id_bytes == 4:
            for i in range(count):
                rows[to + i] = row + i * lookup.S + np.int64(at(lookup.middle_ids, start + i))
        else:
            for i in range(count):
                rows[to + i] = row + i * lookup.S + at(lookup.wide_ids, start + i)
    return rows
