"""gather_sum on the CPU: tiles of columns in registers, tokens in parallel, the table in the order the caches like.

Two orders of the same sums, chosen by shape. Each output element is added up by one thread in the order k = 0..K-1,
so the result depends on neither the order nor the number of threads.

- direct: a token reads its rows where they lie, while those a few lookups ahead are fetched. From a large table all
  tokens read the rows of a few lookups, then of the next few, so that fewer pages are in use at a time.
- packed: where rows are read several times. The tables of a few lookups are copied together, one tile of columns, to
  where they stay in a core's second-level cache while all tokens pass.

Quantised rows have a scale each; scores are multiplied by them first, and then they are rows like all others.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from mfdist.kernels.cpu_ids import bad_id, checked_ids, find_rows, first_bad
from mfdist.kernels.cpu_rows import LIKE, array_at, flat
from mfdist.kernels.cpu_threads import call, jit, jit_part, num_threads
from mfdist.kernels.lanes import (
    E4M3_FACTOR,
    MIDDLE,
    NARROW,
    WIDE,
    at,
    copy,
    load,
    load_mixed,
    prefetch,
    scaled_add,
    store,
    unmixed,
    width,
    zeros_few,
    zeros_half,
    zeros_middle,
    zeros_narrow,
    zeros_single,
    zeros_wide,
)
from mfdist.kernels.row_id_check import can_be_bad

#: A table smaller than this stays in the last-level cache by itself, of which a core has a share.
_CACHED_BYTES = 7 << 20
#: Lookups of a large table that all tokens do before the next, where there are more tokens than these.
_LOOKUPS_TOGETHER = 16
_FEW_TOKENS = 64
#: Lookups between a row's use and the fetch of a later one.
_AHEAD = 12
#: Rows between the one that is copied and the one that is fetched.
_COPIED_AHEAD = 16
#: Tables of a few lookups that are copied together: half of a core's second-level cache.
_PACK_BYTES = 512 << 10
#: Reads of a row, on average, that repay copying it.
_PACK_READS = 8
#: Elements of work that repay waking the threads; more for a single token, because its caller waits for it, and on a
#: busy machine a second thread may come late by much more than it would save.
_PARALLEL_WORK = 1 << 18
_PARALLEL_WORK_OF_ONE = 1 << 22


class _Lookup(NamedTuple):
    """The arguments as kernels take them: the fields of `Ids`, flat arrays, sizes."""

    id_bytes: int
    ids: Any
    table: Any
    scores: Any
    out: Any
    sums: Any  # [N, D] fp32, which may be `out`; used where not all lookups are done at once
    N: int
    K: int
    D: int
    S: int


class _Rows(NamedTuple):
    """What `find_rows` needs."""

    id_bytes: int
    ids: Any
    K: int
    S: int


class _Part(NamedTuple):
    """What one call adds: tokens [low, high) in columns [left, right)."""

    low: int
    high: int
    left: int
    right: int


def gather_sum(
    table: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    code_stride: int,
    name: str,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return [N, D] in `dtype`, or else table.dtype; see `mfdist.kernels.gather_sum`.

    A table of int8, or of the bits of e4m3 as uint8, needs both: `scales` [R] in fp32, and the dtype.
    """
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    is_code, limit = code_stride > 0, code_stride or num_rows
    work = num_tokens * num_lookups * dim
    out = torch.empty(num_tokens, dim, dtype=dtype or table.dtype)
    if not work:
        checked_ids(row_ids, limit, name, is_code=is_code)
        return out.zero_()
    is_split = is_code and num_tokens > _FEW_TOKENS and table.nbytes > _CACHED_BYTES
    # Kernels are given addresses; these names keep what lies there.
    table, ids, scores, sums = table.contiguous(), row_ids.contiguous(), scores.contiguous(), out
    if is_split and out.dtype != torch.float32:
        sums = torch.empty(num_tokens, dim)
    if scales is not None:
        rows = _Rows(*checked_ids(ids, limit, name, is_code=is_code), num_lookups, code_stride)
        factor = np.float32(E4M3_FACTOR if table.dtype == torch.uint8 else 1.0)
        scores = torch.from_numpy(_times_scales(rows, num_tokens, flat(scores), flat(scales), factor))
    rows_like, out_place = LIKE[table.dtype], out.data_ptr()
    lookup = (
        rows_like,
        rows_like if dtype is None else LIKE[dtype],
        limit if can_be_bad(ids, limit) else 0,
        ids.itemsize,
        ids.data_ptr(),
        table.data_ptr(),
        scores.data_ptr(),
        out_place if sums is out else sums.data_ptr(),
        out_place,
        num_tokens,
        num_lookups,
        dim,
        code_stride,
    )
    threads = num_threads(work, worth=_PARALLEL_WORK if num_tokens > 1 else _PARALLEL_WORK_OF_ONE)
    if is_split and num_tokens >= _PACK_READS * code_stride and dim % NARROW == 0:
        chunk = min(num_lookups, max(1, _PACK_BYTES // (code_stride * MIDDLE * table.itemsize)))
        num_tiles = dim // MIDDLE + dim % MIDDLE // NARROW
        bad = call(_packed, threads, chunk, -(-threads // num_tiles), *lookup)
    else:
        chunk = min(num_lookups, _LOOKUPS_TOGETHER) if is_split else num_lookups
        if threads == 1:
            bad = _direct(chunk, *lookup)
        else:
            token_parts = min(num_tokens, threads)
            bad = call(_direct_parts, threads, chunk, token_parts, -(-threads // token_parts), *lookup)
    if bad >= 0:
        raise bad_id(row_ids, bad, limit, name, is_code=is_code)
    return out


@jit()
def _times_scales(lookup: Any, N: Any, scores: Any, scales: Any, factor: Any) -> Any:
    """Return each score times its row's scale and `factor`."""
    row_ids = find_rows(lookup, 0, N, 0, lookup.K, 0)
    weights = np.empty(row_ids.size, np.float32)
    for i in range(row_ids.size):
        weights[i] = at(scores, i) * at(scales, at(row_ids, i)) * factor
    return weights


@jit_part()
def _opened(
    rows_like: Any,
    out_like: Any,
    limit: Any,
    id_bytes: Any,
    ids: Any,
    table: Any,
    scores: Any,
    sums: Any,
    out: Any,
    N: Any,
    K: Any,
    D: Any,
    S: Any,
) -> Any:
    """Return the lookup, addresses as arrays, and the place of its first id not below `limit`, or -1; 0: all are."""
    bytes_like, floats = np.empty(0, np.uint8), np.empty(0, np.float32)
    lookup = _Lookup(
        id_bytes,
        array_at(ids, bytes_like),
        array_at(table, rows_like),
        array_at(scores, floats),
        array_at(out, out_like),
        array_at(sums, floats),
        N,
        K,
        D,
        S,
    )
    bad = -1
    if limit:
        bad = first_bad(lookup.ids, id_bytes, N * K, limit)
    return lookup, bad


# What Python calls takes `_opened`'s arguments and returns the place of a bad id, so that nothing was read, or -1.


@jit()
def _direct(chunk: Any, *arguments: Any) -> Any:
    lookup, bad = _opened(*arguments)
    if bad < 0:
        _add_part(lookup, _Part(0, lookup.N, 0, lookup.D), chunk)
    return bad


@jit()
def _direct_parts(chunk: Any, token_parts: Any, column_parts: Any, *arguments: Any) -> Any:
    lookup, bad = _opened(*arguments)
    if bad < 0:
        _add_parts(lookup, chunk, token_parts, column_parts)
    return bad


@jit()
def _packed(chunk: Any, token_parts: Any, *arguments: Any) -> Any:
    lookup, bad = _opened(*arguments)
    if bad < 0:
        _add_packed(lookup, chunk, token_parts)
    return bad


@jit(parallel=True)
def _add_parts(lookup: Any, chunk: Any, token_parts: Any, column_parts: Any) -> None:
    tokens = -(-lookup.N // token_parts)
    columns = -(-lookup.D // (column_parts * WIDE)) * WIDE
    for index in numba.prange(token_parts * column_parts):
        low = min(lookup.N, index // column_parts * tokens)
        left = min(lookup.D, index % column_parts * columns)
        part = _Part(low, min(lookup.N, low + tokens), left, min(lookup.D, left + columns))
        _add_part(lookup, part, chunk)


@jit_part()
def _add_part(lookup: Any, part: Any, chunk: Any) -> None:
    for first in range(0, lookup.K, chunk):
        end = min(lookup.K, first + chunk)
        rows = find_rows(lookup, part.low, part.high, first, end, 0)
        for n in range(part.low, part.high):
            column = _add_tiles(lookup, rows, part, n, first, end, part.left, zeros_wide())
            column = _add_tiles(lookup, rows, part, n, first, end, column, zeros_half())
            column = _add_tiles(lookup, rows, part, n, first, end, column, zeros_narrow())
            column = _add_tiles(lookup, rows, part, n, first, end, column, zeros_few())
            _add_tiles(lookup, rows, part, n, first, end, column, zeros_single())


@jit_part(forceinline=True)
def _add_tiles(lookup: Any, rows: Any, part: Any, n: Any, first: Any, end: Any, column: Any, zeros: Any) -> Any:
    """Add as many tiles of columns as there is room for; return the column after them."""
    start = (n - part.low) * (end - first)
    while column + width(zeros) <= part.right:
        after = column + width(zeros)
        next_start, next_column = start, after
        if after == part.right:  # the next token comes next
            next_start, next_column = min(start + end - first, rows.size - (end - first)), part.left
        _add_rows(lookup, rows, n, first, end, start, column, next_start, next_column, zeros)
        column = after
    return column


@jit_part()
def _add_rows(
    lookup: Any,
    rows: Any,
    n: Any,
    first: Any,
    end: Any,
    start: Any,
    column: Any,
    next_start: Any,
    next_column: Any,
    zeros: Any,
) -> None:
    """Add lookups [first, end) of token n in the tile at `column`, and fetch what comes after.

    Their rows are those from `rows[start]` on; what comes next are those from `rows[next_start]` on at `next_column`.
    """
    table, D, count = lookup.table, lookup.D, end - first
    ahead = min(_AHEAD, count)
    total = zeros
    if first > 0:
        total = load(lookup.sums, n * D + column, zeros)
    for i in range(count):
        to_fetch = (
            at(rows, start + i + ahead) * D + column
            if i + ahead < count
            else (at(rows, next_start + i + ahead - count) * D + next_column)
        )
        prefetch(table, to_fetch, zeros)
        total = scaled_add(
            load_mixed(table, at(rows, start + i) * D + column, zeros),
            at(lookup.scores, n * lookup.K + first + i),
            total,
        )
    if end == lookup.K:
        store(lookup.out, n * D + column, unmixed(total, table))
    else:
        store(lookup.sums, n * D + column, total)


@jit(parallel=True)
def _add_packed(lookup: Any, chunk: Any, token_parts: Any) -> None:
    N, K, D = lookup.N, lookup.K, lookup.D
    # In the order in which they are used: by chunks of lookups, then by tokens; rows count from a chunk's first.
    rows, weights = np.empty(N * K, np.int32), np.empty(N * K, np.float32)
    for index in numba.prange(-(-K // chunk)):
        _order_chunk(lookup, index * chunk, min(K, index * chunk + chunk), rows, weights)
    num_middle = D // MIDDLE
    num_tiles = num_middle + D % MIDDLE // NARROW
    tokens = -(-N // token_parts)
    for task in numba.prange(num_tiles * token_parts):
        tile = task // token_parts
        low = min(N, task % token_parts * tokens)
        high = min(N, low + tokens)
        if tile < num_middle:
            _pass_tokens(lookup, chunk, rows, weights, low, high, tile * MIDDLE, zeros_middle())
        else:
            column = num_middle * MIDDLE + (tile - num_middle) * NARROW
            _pass_tokens(lookup, chunk, rows, weights, low, high, column, zeros_narrow())


@jit_part()
def _order_chunk(lookup: Any, first: Any, end: Any, rows: Any, scores: Any) -> None:
    found = find_rows(lookup, 0, lookup.N, first, end, first)
    count, origin = end - first, first * lookup.N
    for n in range(lookup.N):
        for i in range(count):
            rows[origin + n * count + i] = at(found, n * count + i)
            scores[origin + n * count + i] = at(lookup.scores, n * lookup.K + first + i)


@jit_part()
def _pass_tokens(lookup: Any, chunk: Any, rows: Any, scores: Any, low: Any, high: Any, column: Any, zeros: Any) -> None:
    """Sum one tile of columns for tokens [low, high): a chunk of lookups from a copy of its rows, then the next."""
    K, D, S = lookup.K, lookup.D, lookup.S
    tile = width(zeros)
    pack = np.empty(chunk * S * tile, lookup.table.dtype)
    sums = np.empty((high - low) * tile, np.float32)
    for first in range(0, K, chunk):
        count = min(K - first, chunk)
        for row in range(count * S):
            prefetch(lookup.table, (first * S + min(row + _COPIED_AHEAD, count * S - 1)) * D + column, zeros)
            copy(pack, row * tile, lookup.table, (first * S + row) * D + column, zeros)
        for n in range(low, high):
            total = zeros
            if first > 0:
                total = load(sums, (n - low) * tile, zeros)
            start = first * lookup.N + n * count
            for i in range(count):
                total = scaled_add(
                    load_mixed(pack, np.int64(at(rows, start + i)) * tile, zeros), at(scores, start + i), total
                )
            if first + count == K:
                store(lookup.out, n * D + column, unmixed(total, pack))
            else:
                store(sums, (n - low) * tile, total)
