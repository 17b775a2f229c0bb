"""Row ids on the CPU: checked before any row is read, and read by the kernels in whichever width they came."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from mfdist.errors import RowIdError
from mfdist.kernels.cpu_threads import jit, jit_part
from mfdist.kernels.row_id_check import can_be_bad, row_id_error


class Ids(NamedTuple):
    """Flat ids of some width, as bytes.

    One type for all widths, so that kernels are compiled once. Kernels' own tuples start with these fields, because
    numba takes no tuple within a tuple.
    """

    id_bytes: int
    ids: Any


def checked_ids(row_ids: Tensor, limit: int, name: str, *, is_code: bool) -> Ids:
    """Return ids [N, K] as the kernels take them, without a copy if they are contiguous.

    Raises:
        RowIdError: an id is negative or not below `limit`.
    """
    ids: Any = row_ids.contiguous().numpy().reshape(-1)
    made = Ids(ids.itemsize, ids.view(np.uint8))
    if can_be_bad(row_ids, limit):
        place = first_bad(made.ids, made.id_bytes, ids.size, limit)
        if place >= 0:
            raise bad_id(row_ids, place, limit, name, is_code=is_code)
    return made


def bad_id(row_ids: Tensor, place: int, limit: int, name: str, *, is_code: bool) -> RowIdError:
    """Return the error for the id [N, K] at a place, counted row by row."""
    token, lookup = divmod(place, row_ids.shape[1])
    return row_id_error(int(row_ids[token, lookup]), limit, name, is_code=is_code, lookup=lookup)


_WIDE_BITS = 64


def _reader(bits: int) -> Callable[[Any, Any], Any]:
    @intrinsic
    def read(typing_context: Any, ids: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            first = builder.bitcast(data, ir.IntType(bits).as_pointer())
            value = builder.load(builder.gep(first, [args[1]]))
            value.align = bits // 8
            return value if bits == _WIDE_BITS else builder.zext(value, ir.IntType(_WIDE_BITS))

        return types.int64(ids, types.intp), generate

    made: Callable[[Any, Any], Any] = read
    return made


#: Ids by their place among ids of so many bits, as if none were negative: those that are, are very large.
_read_8, _read_16, _read_32, _read_64 = (_reader(bits) for bits in (8, 16, 32, 64))


@jit()
def first_bad(ids: Any, id_bytes: Any, count: Any, limit: Any) -> Any:
    """Return the place of the first of `count` ids that is negative or not below `limit`, or -1."""
    end = np.uint64(min(limit, 1 << 31) if id_bytes == 4 else limit)
    if _largest(ids, id_bytes, 0, count) < end:
        return -1
    for i in range(count):
        if _largest(ids, id_bytes, i, i + 1) >= end:
            return i
    return -1


@jit_part()
def _largest(ids: Any, id_bytes: Any, low: Any, high: Any) -> Any:
    """Return the largest of some ids as an unsigned number, or 0 where there is none."""
    largest = np.uint64(0)
    if id_bytes == 1:
        for i in range(low, high):
            largest = max(largest, np.uint64(_read_8(ids, i)))
    elif id_bytes == 2:
        for i in range(low, high):
            largest = max(largest, np.uint64(_read_16(ids, i)))
    elif id_bytes == 4:
        for i in range(low, high):
            largest = max(largest, np.uint64(_read_32(ids, i)))
    else:
        for i in range(low, high):
            largest = max(largest, np.uint64(_read_64(ids, i)))
    return largest


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
                rows[to + i] = row + i * lookup.S + _read_8(lookup.ids, start + i)
        elif lookup.id_bytes == 2:
            for i in range(count):
                rows[to + i] = row + i * lookup.S + _read_16(lookup.ids, start + i)
        elif lookup.id_bytes == 4:
            for i in range(count):
                rows[to + i] = row + i * lookup.S + _read_32(lookup.ids, start + i)
        else:
            for i in range(count):
                rows[to + i] = row + i * lookup.S + _read_64(lookup.ids, start + i)
    return rows
