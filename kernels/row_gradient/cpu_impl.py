"""row_gradient on the CPU: no atomics, every row summed by one thread in the order of the tokens.

Two ways, chosen by shape; neither's result depends on the number of threads.

- by lookup: where each lookup has a table of its own (a code stride), a thread takes a few lookups, and keeps one tile of
  columns of their tables and of their gradients in the second-level cache while all tokens pass.
- by row: for ids that may repeat anywhere. The lookups are sorted by row, keeping the tokens in order, and each thread sums
  its own rows; the scores' gradients are a second pass over the tokens.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mfdist.kernels.cpu_ids import checked_ids
from mfdist.kernels.cpu_rows import flat, flat_rows
from mfdist.kernels.cpu_threads import call, jit, num_threads
from mfdist.kernels.lanes import (
    NARROW,
    WIDE,
    load,
    product_add,
    scaled_add,
    store,
    total,
    width,
    zeros_narrow,
    zeros_single,
    zeros_wide,
)

#: What one tile of the tables and one of their gradients may take of a core's second-level cache.
_TILES_BYTES = 512 << 10
#: The largest table of one lookup that is worth passing all tokens over, in rows.
_MAX_OWN_ROWS = 4096
_PARALLEL_WORK = 1 << 16


def row_gradient(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int, name: str
) -> tuple[Tensor, Tensor]:
    """Return ([R, D] in table.dtype, [N, K] fp32); see `mfdist.kernels.row_gradient`."""
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    ids = checked_ids(row_ids, code_stride or num_rows, name, is_code=code_stride > 0)
    if not num_tokens * num_lookups * dim:
        return torch.zeros_like(table, memory_format=torch.contiguous_format), torch.zeros(num_tokens, num_lookups)
    grad_table = torch.empty_like(table, memory_format=torch.contiguous_format)
    grad_scores = torch.empty(num_tokens, num_lookups)
    arrays = (
        flat_rows(table),
        ids,
        flat(scores),
        flat(grad_output.float()),
        flat_rows(grad_table),
        grad_scores.numpy().reshape(-1),
    )
    shape = (num_tokens, num_lookups, dim, code_stride)
    threads = num_threads((num_tokens * num_lookups + num_rows) * dim, worth=_PARALLEL_WORK)
    if 0 < code_stride <= min(_MAX_OWN_ROWS, 2 * num_tokens):
        fitting = _TILES_BYTES // (2 * code_stride * WIDE * 4)
        chunk = max(1, min(fitting, -(-num_lookups // threads)))
        call(_by_lookup, threads, *arrays, *shape, chunk)
    else:
        order, ends = _sorted_by_row(ids, num_rows, num_lookups, code_stride)
        call(_by_row, threads, *arrays, *shape, order, ends, 4 * threads)
    return grad_table, grad_scores


@jit(parallel=True)
def _by_lookup(
    table: Any,
    ids: Any,
    scores: Any,
    grad: Any,
    grad_table: Any,
    grad_scores: Any,
    N: Any,
    K: Any,
    D: Any,
    S: Any,
    chunk: Any,
) -> None:
    for task in numba.prange(-(-K // chunk)):
        first = task * chunk
        end = min(K, first + chunk)
        rows = np.empty(chunk * S * WIDE, np.float32)
        sums = np.empty(chunk * S * WIDE, np.float32)
        products = np.zeros(N * chunk, np.float32)
        column = 0
        while column + WIDE <= D:
            _pass_tokens(
                table, ids, scores, grad, grad_table, rows, sums, products, N, K, D, S, first, end, column, zeros_wide()
            )
            column += WIDE
        while column + NARROW <= D:
            _pass_tokens(
                table,
                ids,
                scores,
                grad,
                grad_table,
                rows,
                sums,
                products,
                N,
                K,
                D,
                S,
                first,
                end,
                column,
                zeros_narrow(),
            )
            column += NARROW
        while column < D:
            _pass_tokens(
                table,
                ids,
                scores,
                grad,
                grad_table,
                rows,
                sums,
                products,
                N,
                K,
                D,
                S,
                first,
                end,
                column,
                zeros_single(),
            )
            column += 1
        for n in range(N):
            for k in range(first, end):
                grad_scores[n * K + k] = products[n * (end - first) + k - first]


@jit()
def _pass_tokens(
    table: Any,
    ids: Any,
    scores: Any,
    grad: Any,
    grad_table: Any,
    rows: Any,
    sums: Any,
    products: Any,
    N: Any,
    K: Any,
    D: Any,
    S: Any,
    first: Any,
    end: Any,
    column: Any,
    zeros: Any,
) -> None:
    """Do one tile of columns of lookups [first, end) for all tokens; `rows` and `sums` are scratch."""
    tile = width(zeros)
    num_rows = (end - first) * S
    for row in range(num_rows):
        store(rows, row * tile, load(table, (first * S + row) * D + column, zeros))
        store(sums, row * tile, zeros)
    for n in range(N):
        incoming = load(grad, n * D + column, zeros)
        for k in range(first, end):
            at = ((k - first) * S + np.int64(ids[n * K + k])) * tile
            store(sums, at, scaled_add(incoming, scores[n * K + k], load(sums, at, zeros)))
            products[n * (end - first) + k - first] += total(product_add(incoming, load(rows, at, zeros), zeros))
    for row in range(num_rows):
        store(grad_table, (first * S + row) * D + column, load(sums, row * tile, zeros))


@jit()
def _sorted_by_row(ids: Any, R: Any, K: Any, S: Any) -> Any:
    """Return the lookups n·K + k sorted by row, ties in order, and where each row's run ends (a counting sort)."""
    ends = np.zeros(R + 1, np.int64)
    for lookup in range(ids.size):
        ends[lookup % K * S + np.int64(ids[lookup]) + 1] += 1
    for row in range(R):
        ends[row + 1] += ends[row]
    order = np.empty(ids.size, np.int64)
    for lookup in range(ids.size):
        row = lookup % K * S + np.int64(ids[lookup])
        order[ends[row]] = lookup
        ends[row] += 1
    return order, ends


@jit(parallel=True)
def _by_row(
    table: Any,
    ids: Any,
    scores: Any,
    grad: Any,
    grad_table: Any,
    grad_scores: Any,
    N: Any,
    K: Any,
    D: Any,
    S: Any,
    order: Any,
    ends: Any,
    parts: Any,
) -> None:
    R = ends.size - 1
    for part in numba.prange(parts):
        # Equal shares of lookups plus rows, so that neither a hot row nor a long empty stretch makes one part late.
        _sum_rows(
            scores,
            grad,
            grad_table,
            K,
            D,
            order,
            ends,
            _row_at(ends, R, part, parts),
            _row_at(ends, R, part + 1, parts),
        )
    tokens = -(-N // parts)
    for part in numba.prange(parts):
        _multiply_rows(table, ids, grad, grad_scores, K, D, S, part * tokens, min(N, part * tokens + tokens))


@jit()
def _row_at(ends: Any, R: Any, part: Any, parts: Any) -> Any:
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


@jit()
def _sum_rows(
    scores: Any, grad: Any, grad_table: Any, K: Any, D: Any, order: Any, ends: Any, low: Any, high: Any
) -> None:
    for row in range(low, high):
        start = ends[row - 1] if row > 0 else 0
        column = 0
        while column + WIDE <= D:
            _sum_row(scores, grad, grad_table, K, D, order, start, ends[row], row, column, zeros_wide())
            column += WIDE
        while column + NARROW <= D:
            _sum_row(scores, grad, grad_table, K, D, order, start, ends[row], row, column, zeros_narrow())
            column += NARROW
        while column < D:
            _sum_row(scores, grad, grad_table, K, D, order, start, ends[row], row, column, zeros_single())
            column += 1


@jit()
def _sum_row(
    scores: Any,
    grad: Any,
    grad_table: Any,
    K: Any,
    D: Any,
    order: Any,
    start: Any,
    end: Any,
    row: Any,
    column: Any,
    zeros: Any,
) -> None:
    incoming = zeros
    for i in range(start, end):
        incoming = scaled_add(load(grad, order[i] // K * D + column, zeros), scores[order[i]], incoming)
    store(grad_table, row * D + column, incoming)


@jit()
def _multiply_rows(
    table: Any, ids: Any, grad: Any, grad_scores: Any, K: Any, D: Any, S: Any, low: Any, high: Any
) -> None:
    for n in range(low, high):
        for k in range(K):
            row = (k * S + np.int64(ids[n * K + k])) * D
            wide = zeros_wide()
            narrow = zeros_narrow()
            single = zeros_single()
            column = 0
            while column + WIDE <= D:
                wide = product_add(load(grad, n * D + column, wide), load(table, row + column, wide), wide)
                column += WIDE
            while column + NARROW <= D:
                narrow = product_add(load(grad, n * D + column, narrow), load(table, row + column, narrow), narrow)
                column += NARROW
            while column < D:
                single = product_add(load(grad, n * D + column, single), load(table, row + column, single), single)
                column += 1
            grad_scores[n * K + k] = total(wide) + total(narrow) + total(single)
