"""gather_sum on the CPU: tiles of columns in registers, tokens in parallel, the table in the order the caches like.

Three orders of the same sums, chosen by shape; each output element is always added up in the order k = 0..K-1 by one
thread, so the result depends on neither the order nor the number of threads.

- whole: a few tokens at a time read all their rows. For few tokens, small tables, and ids that may lie anywhere.
- chunked: all tokens read from the tables of a few lookups, then from the next few. For tables past the last-level cache.
- packed: as chunked, but the tables' tile of columns is first copied together. Rows a power of two apart fall on the same
  few cache sets; side by side they fill the whole second-level cache. Worth the copy where a row is read several times.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mfdist.kernels.cpu_ids import checked_ids
from mfdist.kernels.cpu_rows import flat, flat_rows
from mfdist.kernels.cpu_threads import call, jit, num_threads
from mfdist.kernels.lanes import NARROW, WIDE, load, scaled_add, store, width, zeros_narrow, zeros_single, zeros_wide

#: A table smaller than this stays in the last-level cache by itself.
_CACHED_BYTES = 16 << 20
#: Tables of a few lookups that are read together: a share of the last-level cache, and of a core's second-level cache.
_CHUNK_BYTES = 8 << 20
_PACK_BYTES = 512 << 10
#: Reads of a row, on average, that repay copying it.
_PACK_READS = 4
#: Elements of work that repay waking the threads.
_PARALLEL_WORK = 1 << 18
_TOKENS_TOGETHER = 16


def gather_sum(table: Tensor, row_ids: Tensor, scores: Tensor, code_stride: int, name: str) -> Tensor:
    """Return [N, D] in table.dtype; see `mfdist.kernels.gather_sum`."""
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    ids = checked_ids(row_ids, code_stride or num_rows, name, is_code=code_stride > 0)
    work = num_tokens * num_lookups * dim
    if not work:
        return table.new_zeros(num_tokens, dim)
    out = torch.empty(num_tokens, dim)
    shape = (num_tokens, num_lookups, dim, code_stride)
    arrays = (flat_rows(table), ids, flat(scores), out.numpy().reshape(-1))
    threads = num_threads(work, worth=_PARALLEL_WORK)
    lookup_bytes = code_stride * dim * table.itemsize
    is_large = num_lookups * lookup_bytes > _CACHED_BYTES
    if is_large and num_tokens >= _PACK_READS * code_stride and dim % NARROW == 0:
        chunk = max(1, _PACK_BYTES // (code_stride * WIDE * table.itemsize))
        num_tiles = dim // WIDE + dim % WIDE // NARROW
        call(_packed, threads, *arrays, *shape, min(chunk, num_lookups), -(-threads // num_tiles))
    elif is_large and 2 * num_tokens >= code_stride:
        call(_in_parts, threads, *arrays, *shape, max(1, _CHUNK_BYTES // lookup_bytes), threads, 1)
    elif threads == 1:
        _whole(*arrays, *shape)
    else:
        token_parts = (
            -(-num_tokens // _TOKENS_TOGETHER) if num_tokens >= _TOKENS_TOGETHER * threads else min(num_tokens, threads)
        )
        call(_in_parts, threads, *arrays, *shape, num_lookups, token_parts, -(-threads // token_parts))
    return out if table.dtype == torch.float32 else out.to(table.dtype)


@jit()
def _whole(table: Any, ids: Any, scores: Any, out: Any, N: Any, K: Any, D: Any, S: Any) -> None:
    for low in range(0, N, _TOKENS_TOGETHER):
        _add_columns(table, ids, scores, out, K, D, S, low, min(N, low + _TOKENS_TOGETHER), 0, D, 0, K)


@jit(parallel=True)
def _in_parts(
    table: Any,
    ids: Any,
    scores: Any,
    out: Any,
    N: Any,
    K: Any,
    D: Any,
    S: Any,
    chunk: Any,
    token_parts: Any,
    column_parts: Any,
) -> None:
    tokens = -(-N // token_parts)
    columns = -(-D // (column_parts * WIDE)) * WIDE
    for part in numba.prange(token_parts * column_parts):
        low = part // column_parts * tokens
        left = part % column_parts * columns
        for first in range(0, K, chunk):
            _add_columns(
                table,
                ids,
                scores,
                out,
                K,
                D,
                S,
                low,
                min(N, low + tokens),
                left,
                min(D, left + columns),
                first,
                min(K, first + chunk),
            )


@jit()
def _add_columns(
    table: Any,
    ids: Any,
    scores: Any,
    out: Any,
    K: Any,
    D: Any,
    S: Any,
    low: Any,
    high: Any,
    left: Any,
    right: Any,
    first: Any,
    end: Any,
) -> None:
    column = left
    while column + WIDE <= right:
        _add_tile(table, D, column, 0, ids, scores, out, K, D, S, low, high, column, first, end, zeros_wide())
        column += WIDE
    while column + NARROW <= right:
        _add_tile(table, D, column, 0, ids, scores, out, K, D, S, low, high, column, first, end, zeros_narrow())
        column += NARROW
    while column < right:
        _add_tile(table, D, column, 0, ids, scores, out, K, D, S, low, high, column, first, end, zeros_single())
        column += 1


@jit()
def _add_tile(
    source: Any,
    source_width: Any,
    source_column: Any,
    source_lookup: Any,
    ids: Any,
    scores: Any,
    out: Any,
    K: Any,
    D: Any,
    S: Any,
    low: Any,
    high: Any,
    column: Any,
    first: Any,
    end: Any,
    zeros: Any,
) -> None:
    """Add lookups [first, end) of tokens [low, high) to one tile of columns of `out`, starting it if first is 0."""
    for n in range(low, high):
        total = zeros
        if first > 0:
            total = load(out, n * D + column, zeros)
        for k in range(first, end):
            row = (k - source_lookup) * S + np.int64(ids[n * K + k])
            total = scaled_add(load(source, row * source_width + source_column, zeros), scores[n * K + k], total)
        store(out, n * D + column, total)


@jit(parallel=True)
def _packed(
    table: Any, ids: Any, scores: Any, out: Any, N: Any, K: Any, D: Any, S: Any, chunk: Any, token_parts: Any
) -> None:
    num_wide = D // WIDE
    num_tiles = num_wide + D % WIDE // NARROW
    tokens = -(-N // token_parts)
    for task in numba.prange(num_tiles * token_parts):
        tile = task // token_parts
        low = task % token_parts * tokens
        high = min(N, low + tokens)
        if tile < num_wide:
            _add_packed(table, ids, scores, out, K, D, S, chunk, low, high, tile * WIDE, zeros_wide())
        else:
            column = num_wide * WIDE + (tile - num_wide) * NARROW
            _add_packed(table, ids, scores, out, K, D, S, chunk, low, high, column, zeros_narrow())


@jit()
def _add_packed(
    table: Any,
    ids: Any,
    scores: Any,
    out: Any,
    K: Any,
    D: Any,
    S: Any,
    chunk: Any,
    low: Any,
    high: Any,
    column: Any,
    zeros: Any,
) -> None:
    pack_width = width(zeros)
    pack = np.empty(chunk * S * pack_width, np.float32)
    for first in range(0, K, chunk):
        end = min(K, first + chunk)
        for row in range((end - first) * S):
            store(pack, row * pack_width, load(table, (first * S + row) * D + column, zeros))
        _add_tile(pack, pack_width, 0, first, ids, scores, out, K, D, S, low, high, column, first, end, zeros)
