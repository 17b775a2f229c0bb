"""ragged_gradient on the CPU: lookups sorted by row, each row summed by one thread in the order of the list."""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from mfdist.kernels.cpu_ids import checked_ids
from mfdist.kernels.cpu_rows import flat, flat_rows
from mfdist.kernels.cpu_threads import call, jit, jit_part, num_threads
from mfdist.kernels.lanes import (
    MIDDLE,
    NARROW,
    load,
    product_add,
    scaled_add,
    store,
    total,
    zeros_middle,
    zeros_narrow,
    zeros_single,
)

#: Rows a lookup up to which counting them beats sorting the lookups.
_COUNTED_ROWS = 4
_PARALLEL_WORK = 1 << 16


class _Lookups(NamedTuple):
    """The arguments as kernels take them, flat, in the order of the list."""

    table: Any
    row_ids: Any  # [M] int64
    tokens: Any  # [M] int64
    scores: Any
    grad: Any  # [T, D] fp32
    D: int


def ragged_gradient(
    table: Tensor,
    row_ids: Tensor,
    tokens: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    dtype: torch.dtype,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ([U] int64, [U, D] in `dtype`, [M] fp32); see `mfdist.kernels.ragged_gradient`."""
    num_rows, dim = table.shape
    checked_ids(row_ids.unsqueeze(1), num_rows, name, is_code=False)
    lookups = _Lookups(
        flat_rows(table),
        row_ids.long().contiguous().numpy(),
        tokens.long().contiguous().numpy(),
        flat(scores),
        flat(grad_output.float()),
        dim,
    )
    if num_rows <= _COUNTED_ROWS * row_ids.numel():
        order, rows, ends = _counted(lookups.row_ids, num_rows)
    else:
        by_row, sorted_order = torch.sort(row_ids.long(), stable=True)
        unique, counts = torch.unique_consecutive(by_row, return_counts=True)
        order, rows, ends = sorted_order.numpy(), unique.numpy(), counts.cumsum(0).numpy()
    grad_rows = table.new_empty(rows.size, dim, dtype=dtype)
    grad_scores = scores.new_empty(scores.numel())
    threads = num_threads(row_ids.numel() * dim, worth=_PARALLEL_WORK)
    call(_sum, threads, lookups, order, ends, flat_rows(grad_rows), grad_scores.numpy(), 4 * threads)
    return torch.from_numpy(rows), grad_rows, grad_scores


@jit()
def _counted(row_ids: Any, num_rows: Any) -> Any:
    """Return the lookups in stable order by row, the rows that have any, and where each one's run ends."""
    starts = np.zeros(num_rows + 1, np.int64)
    for i in range(row_ids.size):
        starts[row_ids[i] + 1] += 1
    num_found = 0
    for row in range(num_rows):
        num_found += starts[row + 1] > 0
        starts[row + 1] += starts[row]
    rows, ends = np.empty(num_found, np.int64), np.empty(num_found, np.int64)
    found = 0
    for row in range(num_rows):
        if starts[row + 1] > starts[row]:
            rows[found] = row
            ends[found] = starts[row + 1]
            found += 1
    order = np.empty(row_ids.size, np.int64)
    for i in range(row_ids.size):
        order[starts[row_ids[i]]] = i
        starts[row_ids[i]] += 1
    return order, rows, ends


@jit(parallel=True)
def _sum(lookups: Any, order: Any, ends: Any, grad_rows: Any, grad_scores: Any, parts: Any) -> None:
    for part in numba.prange(parts):
        # Equal shares of lookups; a row belongs to the part in which its run ends.
        low = np.searchsorted(ends, part * order.size // parts, side="right")
        high = np.searchsorted(ends, (part + 1) * order.size // parts, side="right")
        _sum_rows(lookups, order, ends, grad_rows, low, high)
        _multiply(lookups, grad_scores, part * order.size // parts, (part + 1) * order.size // parts)


@jit_part()
def _sum_rows(lookups: Any, order: Any, ends: Any, grad_rows: Any, low: Any, high: Any) -> None:
    D = lookups.D
    for row in range(low, high):
        run = order[(ends[row - 1] if row > 0 else 0) : ends[row]]
        column = 0
        while column + MIDDLE <= D:
            _sum_tile(lookups, run, grad_rows, row * D + column, column, zeros_middle())
            column += MIDDLE
        while column + NARROW <= D:
            _sum_tile(lookups, run, grad_rows, row * D + column, column, zeros_narrow())
            column += NARROW
        while column < D:
            _sum_tile(lookups, run, grad_rows, row * D + column, column, zeros_single())
            column += 1


@jit_part()
def _sum_tile(lookups: Any, run: Any, grad_rows: Any, to: Any, column: Any, zeros: Any) -> None:
    grad = zeros
    for i in range(run.size):
        start = lookups.tokens[run[i]] * lookups.D + column
        grad = scaled_add(load(lookups.grad, start, zeros), lookups.scores[run[i]], grad)
    store(grad_rows, to, grad)


@jit_part()
def _multiply(lookups: Any, grad_scores: Any, low: Any, high: Any) -> None:
    D = lookups.D
    for i in range(low, high):
        row, token = lookups.row_ids[i] * D, lookups.tokens[i] * D
        middle, narrow, single = zeros_middle(), zeros_narrow(), zeros_single()
        column = 0
        while column + MIDDLE <= D:
            tile = load(lookups.table, row + column, middle)
            middle = product_add(load(lookups.grad, token + column, middle), tile, middle)
            column += MIDDLE
        while column + NARROW <= D:
            part = load(lookups.table, row + column, narrow)
            narrow = product_add(load(lookups.grad, token + column, narrow), part, narrow)
            column += NARROW
        while column < D:
            end = load(lookups.table, row + column, single)
            single = product_add(load(lookups.grad, token + column, single), end, single)
            column += 1
        grad_scores[i] = total(middle) + total(narrow) + total(single)
