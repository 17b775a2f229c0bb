"""gather_sum on the CPU: tiles of columns in registers, tokens in parallel, the table in the order the caches like.

Three orders of the same sums, chosen by shape. Each output element is added up by one thread in the order k = 0..K-1,
so the result depends on neither the order nor the number of threads.

- whole: a few tokens at a time read all their rows. For few tokens, small tables, and ids that may lie anywhere.
- chunked: all tokens read from the tables of a few lookups, then from the next few. For tables past the last cache.
- packed: as chunked, but the tables' tile of columns is first copied together. Rows a power of two apart fall on the
  same few cache sets; side by side they fill the whole second-level cache. Worth it where a row is read several times.
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
    NARROW,
    WIDE,
    at,
    load,
    scaled_add,
    store,
    width,
    zeros_narrow,
    zeros_single,
    zeros_wide,
)

#: A table smaller than this stays in the last-level cache by itself.
_CACHED_BYTES = 16 << 20
#: Tables of a few lookups that are read together: a share of the last-level cache, or of a core's second-level cache.
_CHUNK_BYTES = 16 << 20
_PACK_BYTES = 512 << 10
#: Reads of a row, on average, that repay copying it, and that repay reading the table in chunks.
_PACK_READS = 4
_CHUNK_READS = 0.5
#: Elements of work that repay waking the threads.
_PARALLEL_WORK = 1 << 18
#: Tokens that pass one tile of columns before the next: many for a table in the cache, whose tile they find closer by
#: each time; few for a larger one, whose rows are then read whole.
_TOKENS_TOGETHER = 256
_TOKENS_TOGETHER_LARGE = 16


class _Lookup(NamedTuple):
    """The arguments as kernels take them: the fields of `Ids`, flat arrays, sizes."""

    id_bytes: int
    narrow_ids: Any
    middle_ids: Any
    wide_ids: Any
    table: Any
    scores: Any
    out: Any  # [N, D] fp32
    N: int
    K: int
    D: int
    S: int


class _Part(NamedTuple):
    """What one call adds: lookups [first, end) of tokens [low, high) in columns [left, right)."""

    low: int
    high: int
    left: int
    right: int
    first: int
    end: int


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
    dtype = dtype or table.dtype
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    ids = checked_ids(row_ids, code_stride or num_rows, name, is_code=code_stride > 0)
    work = num_tokens * num_lookups * dim
    if not work:
        return table.new_zeros(num_tokens, dim, dtype=dtype)
    out = torch.empty(num_tokens, dim)
    lookup = _Lookup(
        *ids, flat_rows(table), flat(scores), out.numpy().reshape(-1), num_tokens, num_lookups, dim, code_stride
    )
    if scales is not None:
        factor = np.float32(E4M3_FACTOR if table.dtype == torch.uint8 else 1.0)
        lookup = lookup._replace(scores=_times_scales(lookup, flat(scales), factor))
    threads = num_threads(work, worth=_PARALLEL_WORK)
    lookup_bytes = code_stride * dim * table.itemsize
    is_large = table.nbytes > _CACHED_BYTES
    together = _TOKENS_TOGETHER_LARGE if is_large else _TOKENS_TOGETHER
    if code_stride and is_large and num_tokens >= _PACK_READS * code_stride and dim % NARROW == 0:
        chunk = max(1, _PACK_BYTES // (code_stride * WIDE * np.dtype(np.float32).itemsize))
        num_tiles = dim // WIDE + dim % WIDE // NARROW
        call(_packed, threads, lookup, min(chunk, num_lookups), -(-threads // num_tiles))
    elif code_stride and is_large and num_tokens >= _CHUNK_READS * code_stride:
        call(_in_parts, threads, lookup, max(1, _CHUNK_BYTES // lookup_bytes), threads, 1)
    elif threads == 1:
        _whole(lookup, together)
    else:
        parts = -(-num_tokens // together)
        parts = parts if parts >= threads else min(num_tokens, threads)
        call(_in_parts, threads, lookup, num_lookups, parts, -(-threads // parts))
    return out.to(dtype)


@jit()
def _times_scales(lookup: Any, scales: Any, factor: Any) -> Any:
    """Return each score times its row's scale and `factor`."""
    row_ids = find_rows(lookup, 0, lookup.N, 0, lookup.K, 0)
    weights = np.empty(row_ids.size, np.float32)
    for i in range(row_ids.size):
        weights[i] = at(lookup.scores, i) * at(scales, at(row_ids, i)) * factor
    return weights


@jit()
def _whole(lookup: Any, together: Any) -> None:
    for low in range(0, lookup.N, together):
        high = min(lookup.N, low + together)
        _add_columns(lookup, _Part(low, high, 0, lookup.D, 0, lookup.K))


@jit(parallel=True)
def _in_parts(lookup: Any, chunk: Any, token_parts: Any, column_parts: Any) -> None:
    tokens = -(-lookup.N // token_parts)
    columns = -(-lookup.D // (column_parts * WIDE)) * WIDE
    for part in numba.prange(token_parts * column_parts):
        low = min(lookup.N, part // column_parts * tokens)
        left = min(lookup.D, part % column_parts * columns)
        for first in range(0, lookup.K, chunk):
            high, right, end = min(lookup.N, low + tokens), min(lookup.D, left + columns), min(lookup.K, first + chunk)
            _add_columns(lookup, _Part(low, high, left, right, first, end))


@jit_part()
def _add_columns(lookup: Any, part: Any) -> None:
    table, D = lookup.table, lookup.D
    row_ids = find_rows(lookup, part.low, part.high, part.first, part.end, 0)
    column = part.left
    while column + WIDE <= part.right:
        _add_tile(lookup.scores, lookup.out, lookup.K, D, part, column, table, D, column, row_ids, zeros_wide())
        column += WIDE
    while column + NARROW <= part.right:
        _add_tile(lookup.scores, lookup.out, lookup.K, D, part, column, table, D, column, row_ids, zeros_narrow())
        column += NARROW
    while column < part.right:
        _add_tile(lookup.scores, lookup.out, lookup.K, D, part, column, table, D, column, row_ids, zeros_single())
        column += 1


@jit_part()
def _add_tile(
    scores: Any,
    out: Any,
    K: Any,
    D: Any,
    part: Any,
    column: Any,
    rows: Any,
    row_width: Any,
    row_column: Any,
    row_ids: Any,
    zeros: Any,
) -> None:
    """Add to one tile of columns of `out`, or start it if the part begins with lookup 0.

    `row_ids` count the rows of `rows`, which is the table or a copied piece of it: they lie `row_width` apart, and are
    read from `row_column` on.
    """
    num_lookups = part.end - part.first
    for n in range(part.low, part.high):
        total = zeros
        if part.first > 0:
            total = load(out, n * D + column, zeros)
        score = n * K + part.first
        row = (n - part.low) * num_lookups
        for i in range(num_lookups):
            total = scaled_add(
                load(rows, at(row_ids, row + i) * row_width + row_column, zeros), at(scores, score + i), total
            )
        store(out, n * D + column, total)


@jit(parallel=True)
def _packed(lookup: Any, chunk: Any, token_parts: Any) -> None:
    num_wide = lookup.D // WIDE
    num_tiles = num_wide + lookup.D % WIDE // NARROW
    tokens = -(-lookup.N // token_parts)
    for task in numba.prange(num_tiles * token_parts):
        tile = task // token_parts
        low = min(lookup.N, task % token_parts * tokens)
        high = min(lookup.N, low + tokens)
        if tile < num_wide:
            _add_packed(lookup, chunk, low, high, tile * WIDE, zeros_wide())
        else:
            _add_packed(lookup, chunk, low, high, num_wide * WIDE + (tile - num_wide) * NARROW, zeros_narrow())


@jit_part()
def _add_packed(lookup: Any, chunk: Any, low: Any, high: Any, column: Any, zeros: Any) -> None:
    tile = width(zeros)
    pack = np.empty(chunk * lookup.S * tile, np.float32)
    for first in range(0, lookup.K, chunk):
        end = min(lookup.K, first + chunk)
        for row in range((end - first) * lookup.S):
            store(pack, row * tile, load(lookup.table, (first * lookup.S + row) * lookup.D + column, zeros))
        part = _Part(low, high, column, column + tile, first, end)
        row_ids = find_rows(lookup, low, high, first, end, first)
        _add_tile(lookup.scores, lookup.out, lookup.K, lookup.D, part, column, pack, tile, 0, row_ids, zeros)
