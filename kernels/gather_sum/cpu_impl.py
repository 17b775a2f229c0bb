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

from mfdist.kernels.cpu_ids import checked_ids, find_rows
from mfdist.kernels.cpu_rows import flat, flat_rows
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
    zeros_middle,
    zeros_narrow,
    zeros_single,
    zeros_wide,
)

#: A table smaller than this stays in the last-level cache by itself, of which a core has a share.
_CACHED_BYTES = 7 << 20
#: Lookups of a large table that all tokens do before the next.
_LOOKUPS_TOGETHER = 8
#: Lookups between a row's use and the fetch of a later one.
_AHEAD = 4
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
    ids = checked_ids(row_ids, code_stride or num_rows, name, is_code=code_stride > 0)
    work = num_tokens * num_lookups * dim
    out = torch.empty(num_tokens, dim, dtype=dtype or table.dtype)
    if not work:
        return out.zero_()
    is_split = code_stride > 0 and num_tokens > 1 and table.nbytes > _CACHED_BYTES
    sums = flat_out = flat_rows(out)
    if is_split and out.dtype != torch.float32:
        sums = np.empty(num_tokens * dim, np.float32)
    lookup = _Lookup(*ids, flat_rows(table), flat(scores), flat_out, sums, num_tokens, num_lookups, dim, code_stride)
    if scales is not None:
        factor = np.float32(E4M3_FACTOR if table.dtype == torch.uint8 else 1.0)
        lookup = lookup._replace(scores=_times_scales(lookup, flat(scales), factor))
    threads = num_threads(work, worth=_PARALLEL_WORK if num_tokens > 1 else _PARALLEL_WORK_OF_ONE)
    if is_split and num_tokens >= _PACK_READS * code_stride and dim % NARROW == 0:
        chunk = min(num_lookups, max(1, _PACK_BYTES // (code_stride * MIDDLE * table.itemsize)))
        num_tiles = dim // MIDDLE + dim % MIDDLE // NARROW
        call(_packed, threads, lookup, chunk, -(-threads // num_tiles))
        return out
    chunk = min(num_lookups, _LOOKUPS_TOGETHER) if is_split else num_lookups
    if threads == 1:
        _direct(lookup, _Part(0, num_tokens, 0, dim), chunk)
    else:
        token_parts = min(num_tokens, threads)
        call(_direct_parts, threads, lookup, chunk, token_parts, -(-threads // token_parts))
    return out


@jit()
def _times_scales(lookup: Any, scales: Any, factor: Any) -> Any:
    """Return each score times its row's scale and `factor`."""
    row_ids = find_rows(lookup, 0, lookup.N, 0, lookup.K, 0)
    weights = np.empty(row_ids.size, np.float32)
    for i in range(row_ids.size):
        weights[i] = at(lookup.scores, i) * at(scales, at(row_ids, i)) * factor
    return weights


@jit(parallel=True)
def _direct_parts(lookup: Any, chunk: Any, token_parts: Any, column_parts: Any) -> None:
    tokens = -(-lookup.N // token_parts)
    columns = -(-lookup.D // (column_parts * WIDE)) * WIDE
    for index in numba.prange(token_parts * column_parts):
        low = min(lookup.N, index // column_parts * tokens)
        left = min(lookup.D, index % column_parts * columns)
        part = _Part(low, min(lookup.N, low + tokens), left, min(lookup.D, left + columns))
        _direct(lookup, part, chunk)


@jit()
def _direct(lookup: Any, part: Any, chunk: Any) -> None:
    for first in range(0, lookup.K, chunk):
        end = min(lookup.K, first + chunk)
        rows = find_rows(lookup, part.low, part.high, first, end, 0)
        for n in range(part.low, part.high):
            column = part.left
            while column + WIDE <= part.right:
                _add_rows(lookup, rows, part.low, n, first, end, column, zeros_wide())
                column += WIDE
            while column + NARROW <= part.right:
                _add_rows(lookup, rows, part.low, n, first, end, column, zeros_narrow())
                column += NARROW
            while column < part.right:
                _add_rows(lookup, rows, part.low, n, first, end, column, zeros_single())
                column += 1


@jit_part(forceinline=True)
def _add_rows(lookup: Any, rows: Any, low: Any, n: Any, first: Any, end: Any, column: Any, zeros: Any) -> None:
    """Add lookups [first, end) of token n in one tile of columns; `rows` are those of tokens from `low` on."""
    table, D = lookup.table, lookup.D
    total = zeros
    if first > 0:
        total = load(lookup.sums, n * D + column, zeros)
    start = (n - low) * (end - first)
    last = rows.size - 1
    for i in range(end - first):
        prefetch(table, at(rows, min(start + i + _AHEAD, last)) * D + column, zeros)
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
def _packed(lookup: Any, chunk: Any, token_parts: Any) -> None:
    N, K = lookup.N, lookup.K
    # In the order in which they are used: by chunks of lookups, then by tokens; rows count from a chunk's first.
    rows, scores = np.empty(N * K, np.int32), np.empty(N * K, np.float32)
    for index in numba.prange(-(-K // chunk)):
        _order_chunk(lookup, index * chunk, min(K, index * chunk + chunk), rows, scores)
    num_middle = lookup.D // MIDDLE
    num_tiles = num_middle + lookup.D % MIDDLE // NARROW
    tokens = -(-N // token_parts)
    for task in numba.prange(num_tiles * token_parts):
        tile = task // token_parts
        low = min(N, task % token_parts * tokens)
        high = min(N, low + tokens)
        if tile < num_middle:
            _pass_tokens(lookup, chunk, rows, scores, low, high, tile * MIDDLE, zeros_middle())
        else:
            column = num_middle * MIDDLE + (tile - num_middle) * NARROW
            _pass_tokens(lookup, chunk, rows, scores, low, high, column, zeros_narrow())


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
