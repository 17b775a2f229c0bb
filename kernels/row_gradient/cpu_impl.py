"""row_gradient on the CPU: no atomics, every row summed by one thread in the order of the tokens.

Two ways, chosen by shape; neither's result depends on the number of threads.

- by lookup: where each lookup has a table of its own (a code stride), a thread takes a few lookups and keeps one tile
  of columns of their tables and of their gradients in the second-level cache while all tokens pass.
- by row: for ids that may repeat anywhere. The lookups are sorted by row, keeping the tokens in order, and each thread
  sums its own rows; the scores' gradients are a second pass over the tokens.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from mfdist.kernels.cpu_ids import checked_ids, find_rows
from mfdist.kernels.cpu_rows import flat, flat_rows
from mfdist.kernels.cpu_threads import call, jit, jit_part, num_threads
from mfdist.kernels.huge_pages import in_huge_pages
from mfdist.kernels.lanes import (
    MIDDLE,
    NARROW,
    at,
    load,
    prefetch,
    product_add,
    scaled_add,
    store,
    total,
    width,
    zeros_middle,
    zeros_narrow,
    zeros_single,
)

#: What one tile of the tables and one of their gradients may take of a core's second-level cache.
_TILES_BYTES = 512 << 10
#: The largest table of one lookup that is worth passing all tokens over, in rows.
_MAX_OWN_ROWS = 4096
#: Reads of a row, on average, that repay copying its table and its gradient a tile at a time.
_LEAST_READS = 4
#: Lookups between a row's use and the fetch of a later one.
_AHEAD = 2
#: Rows between the one that is copied and the one that is fetched; tokens, likewise.
_COPIED_AHEAD = 16
_TOKENS_AHEAD = 8
_PARALLEL_WORK = 1 << 16


class Lookup(NamedTuple):
    """The arguments as kernels take them: the fields of `Ids`, flat arrays, sizes."""

    id_bytes: int
    ids: Any
    table: Any
    scores: Any
    grad: Any  # [N, D] fp32
    grad_table: Any
    grad_scores: Any
    N: int
    K: int
    D: int
    S: int


def row_gradient(
    table: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    code_stride: int,
    name: str,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ([R, D] in `dtype` or table.dtype, [N, K] fp32); see `mfdist.kernels.row_gradient`."""
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    ids = checked_ids(row_ids, code_stride or num_rows, name, is_code=code_stride > 0)
    if not num_tokens * num_lookups * dim:
        return table.new_zeros(num_rows, dim, dtype=dtype), scores.new_zeros(num_tokens, num_lookups)
    grad_table = in_huge_pages(table.new_empty(num_rows, dim, dtype=dtype))
    grad_scores = scores.new_empty(num_tokens, num_lookups)
    lookup = Lookup(
        *ids,
        flat_rows(table),
        flat(scores),
        flat(grad_output.float()),
        flat_rows(grad_table),
        flat(grad_scores),
        num_tokens,
        num_lookups,
        dim,
        code_stride,
    )
    threads = num_threads((num_tokens * num_lookups + num_rows) * dim, worth=_PARALLEL_WORK)
    if chunk := lookups_together(code_stride, num_tokens, num_lookups, threads):
        call(_by_lookup, threads, lookup, chunk)
    else:
        order, ends = sorted_by_row(lookup, num_rows)
        call(_by_row, threads, lookup, order, ends, 4 * threads)
    return grad_table, grad_scores


def lookups_together(code_stride: int, num_tokens: int, num_lookups: int, threads: int) -> int:
    """Return how many lookups a thread takes at a time, or 0 where they are to be sorted by row."""
    if not 0 < code_stride <= min(_MAX_OWN_ROWS, num_tokens // _LEAST_READS):
        return 0
    fitting = _TILES_BYTES // (2 * code_stride * MIDDLE * np.dtype(np.float32).itemsize)
    return max(1, min(fitting, -(-num_lookups // threads)))


@jit(parallel=True)
def _by_lookup(lookup: Any, chunk: Any) -> None:
    for task in numba.prange(-(-lookup.K // chunk)):
        first = task * chunk
        pass_columns(lookup, first, min(lookup.K, first + chunk), lookup.grad_table, first * lookup.S)


@jit_part()
def pass_columns(lookup: Any, first: Any, end: Any, target: Any, target_row: Any) -> None:
    """Write the scores' gradients of lookups [first, end), and their rows' to `target` from a row of it on."""
    count = end - first
    row_ids = find_rows(lookup, 0, lookup.N, first, end, first)
    rows = np.empty(count * lookup.S * MIDDLE, np.float32)
    sums = np.empty(count * lookup.S * MIDDLE, np.float32)
    products = np.zeros(lookup.N * count, np.float32)
    column = 0
    while column + MIDDLE <= lookup.D:
        _pass_tokens(lookup, row_ids, rows, sums, products, first, count, column, target, target_row, zeros_middle())
        column += MIDDLE
    while column + NARROW <= lookup.D:
        _pass_tokens(lookup, row_ids, rows, sums, products, first, count, column, target, target_row, zeros_narrow())
        column += NARROW
    while column < lookup.D:
        _pass_tokens(lookup, row_ids, rows, sums, products, first, count, column, target, target_row, zeros_single())
        column += 1
    for n in range(lookup.N):
        for i in range(count):
            lookup.grad_scores[n * lookup.K + first + i] = products[n * count + i]


@jit_part()
def _pass_tokens(
    lookup: Any,
    row_ids: Any,
    rows: Any,
    sums: Any,
    products: Any,
    first: Any,
    count: Any,
    column: Any,
    target: Any,
    target_row: Any,
    zeros: Any,
) -> None:
    """Do one tile of columns of `count` lookups for all tokens; `rows` and `sums` are scratch."""
    N, K, D = lookup.N, lookup.K, lookup.D
    table, scores, grads = lookup.table, lookup.scores, lookup.grad
    tile = width(zeros)
    origin = first * lookup.S
    for row in range(count * lookup.S):
        prefetch(table, (origin + min(row + _COPIED_AHEAD, count * lookup.S - 1)) * D + column, zeros)
        store(rows, row * tile, load(table, (origin + row) * D + column, zeros))
        store(sums, row * tile, zeros)
    for n in range(N):
        prefetch(grads, min(n + _TOKENS_AHEAD, N - 1) * D + column, zeros)
        grad = load(grads, n * D + column, zeros)
        for i in range(count):
            start = at(row_ids, n * count + i) * tile
            store(sums, start, scaled_add(grad, at(scores, n * K + first + i), load(sums, start, zeros)))
            products[n * count + i] += total(product_add(grad, load(rows, start, zeros), zeros))
    for row in range(count * lookup.S):
        store(target, (target_row + row) * D + column, load(sums, row * tile, zeros))


@jit()
def sorted_by_row(lookup: Any, R: Any) -> Any:
    """Return the lookups n·K + k sorted by row, ties in order, and where each row's run ends (a counting sort)."""
    rows = find_rows(lookup, 0, lookup.N, 0, lookup.K, 0)
    ends = np.zeros(R + 1, np.int64)
    for i in range(rows.size):
        ends[rows[i] + 1] += 1
    for row in range(R):
        ends[row + 1] += ends[row]
    order = np.empty(rows.size, np.int64)
    for i in range(rows.size):
        order[ends[rows[i]]] = i
        ends[rows[i]] += 1
    return order, ends[:R]


@jit(parallel=True)
def _by_row(lookup: Any, order: Any, ends: Any, parts: Any) -> None:
    for part in numba.prange(parts):
        # Equal shares of lookups plus rows, so that neither a hot row nor a long empty stretch makes one part late.
        _sum_rows(lookup, order, ends, share(ends, part, parts), share(ends, part + 1, parts))
    tokens = -(-lookup.N // parts)
    for part in numba.prange(parts):
        multiply_rows(lookup, min(lookup.N, part * tokens), min(lookup.N, part * tokens + tokens))


@jit_part()
def share(ends: Any, part: Any, parts: Any) -> Any:
    """Return the first row of a part."""
    R = ends.size
    wanted = (ends[R - 1] + R) * part // parts
    low, high = 0, R
    while low < high:
        middle = (low + high) // 2
        start = ends[middle - 1] if middle > 0 else 0
        if start + middle < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@jit_part()
def _sum_rows(lookup: Any, order: Any, ends: Any, low: Any, high: Any) -> None:
    for row in range(low, high):
        sum_row(lookup, order[(ends[row - 1] if row > 0 else 0) : ends[row]], lookup.grad_table, row * lookup.D)


@jit_part()
def sum_row(lookup: Any, run: Any, target: Any, at: Any) -> None:
    """Write score · grad_output, summed over a run of lookups, to `target` from `at` on."""
    column = 0
    while column + MIDDLE <= lookup.D:
        _sum_tile(lookup, run, target, at, column, zeros_middle())
        column += MIDDLE
    while column + NARROW <= lookup.D:
        _sum_tile(lookup, run, target, at, column, zeros_narrow())
        column += NARROW
    while column < lookup.D:
        _sum_tile(lookup, run, target, at, column, zeros_single())
        column += 1


@jit_part(forceinline=True)
def _sum_tile(lookup: Any, run: Any, target: Any, to: Any, column: Any, zeros: Any) -> None:
    grad = zeros
    for i in range(run.size):
        at = run[i] // lookup.K * lookup.D + column
        grad = scaled_add(load(lookup.grad, at, zeros), lookup.scores[run[i]], grad)
    store(target, to + column, grad)


@jit_part()
def multiply_rows(lookup: Any, low: Any, high: Any) -> None:
    """Write the scores' gradients of tokens [low, high)."""
    D = lookup.D
    rows = find_rows(lookup, low, high, 0, lookup.K, 0)
    for n in range(low, high):
        for k in range(lookup.K):
            index = (n - low) * lookup.K + k
            start = rows[index] * D
            ahead = rows[min(index + _AHEAD, rows.size - 1)] * D
            middle, narrow, single = zeros_middle(), zeros_narrow(), zeros_single()
            column = 0
            while column + MIDDLE <= D:
                prefetch(lookup.table, ahead + column, middle)
                row = load(lookup.table, start + column, middle)
                middle = product_add(load(lookup.grad, n * D + column, middle), row, middle)
                column += MIDDLE
            while column + NARROW <= D:
                row_part = load(lookup.table, start + column, narrow)
                narrow = product_add(load(lookup.grad, n * D + column, narrow), row_part, narrow)
                column += NARROW
            while column < D:
                row_end = load(lookup.table, start + column, single)
                single = product_add(load(lookup.grad, n * D + column, single), row_end, single)
                column += 1
            lookup.grad_scores[n * lookup.K + k] = total(middle) + total(narrow) + total(single)
