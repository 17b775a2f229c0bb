"""row_update on the CPU: the ways of row_gradient, with each row's gradient used up while it is in the cache.

- by lookup: a thread sums the rows of a few lookups' own tables, then updates those that were looked up.
- by row: the scores' gradients first, from the rows as they are; then each row is summed and updated in turn.
- from gradients that are there: rows in parallel.

A row is updated by one thread from its whole gradient, so results depend on neither the way nor the number of threads.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mfdist.kernels.cpu_ids import checked_ids, find_rows
from mfdist.kernels.cpu_rows import flat, flat_rows
from mfdist.kernels.cpu_threads import call, jit, jit_part, num_threads
from mfdist.kernels.row_gradient.cpu_impl import (
    Lookup,
    lookups_together,
    multiply_rows,
    pass_columns,
    share,
    sorted_by_row,
    sum_row,
)
from mfdist.kernels.row_update.cpu_rule import mean_square, rule_of_step, update_row
from mfdist.kernels.row_update.rule import RowRule

_PARALLEL_WORK = 1 << 16
#: The most that gradients of rows, summed but not yet used, may take for each thread.
_SUMS_BYTES = 64 << 20


def fused_row_update(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    lr: float,
    step: int,
    rule: RowRule,
    offsets: tuple[int, int],
    code_stride: int,
    name: str,
) -> Tensor:
    """Update the rows in place and return the scores' gradient; see `mfdist.kernels.fused_row_update`."""
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    ids = checked_ids(row_ids, code_stride or num_rows, name, is_code=code_stride > 0)
    if not num_tokens * num_lookups * dim:
        return torch.zeros_like(scores, memory_format=torch.contiguous_format)
    grad_scores = scores.new_empty(num_tokens, num_lookups)
    rows = flat_rows(table)
    lookup = Lookup(
        *ids,
        rows,
        flat(scores),
        flat(grad_output.float()),
        rows[:0],
        flat(grad_scores),
        num_tokens,
        num_lookups,
        dim,
        code_stride,
    )
    settings = rule_of_step(rule, lr, step, offsets)
    states = _two(state)
    threads = num_threads(num_tokens * num_lookups * dim, worth=_PARALLEL_WORK)
    row_bytes = dim * np.dtype(np.float32).itemsize
    chunk = lookups_together(code_stride, num_tokens, num_lookups, threads)
    if chunk and code_stride * row_bytes <= _SUMS_BYTES:
        chunk = min(chunk, _SUMS_BYTES // (code_stride * row_bytes))
        call(_by_lookup, threads, lookup, *states, settings, chunk, threads)
    else:
        order, ends = sorted_by_row(lookup, num_rows)
        call(_by_row, threads, lookup, *states, settings, order, ends, 4 * threads)
    return grad_scores


def row_update(
    table: Tensor,
    state: list[Tensor],
    grads: Tensor,
    rows: Tensor | None,
    mean_squares: Tensor | None,
    lr: float,
    step: int,
    rule: RowRule,
    offsets: tuple[int, int],
) -> None:
    """Update rows in place from their gradients; see `mfdist.kernels.row_update`."""
    num_rows, dim = table.shape
    num_updated = num_rows if rows is None else rows.numel()
    if not num_updated * dim:
        return
    numbers = _NO_ROWS if rows is None else rows.long().contiguous().numpy()
    squares = _NO_SQUARES if mean_squares is None else flat(mean_squares)
    threads = num_threads(num_updated * dim, worth=_PARALLEL_WORK)
    call(
        _given, threads, flat_rows(table), *_two(state), flat_rows(grads), numbers, squares,
        rule_of_step(rule, lr, step, offsets), dim, num_updated, grads.shape[0] != num_updated, 4 * threads,
    )  # fmt: skip


_NO_ROWS, _NO_SQUARES = np.empty(0, np.int64), np.empty(0, np.float32)


def _two(state: list[Tensor]) -> tuple[Any, Any]:
    """Return two flat arrays, empty ones in place of states that the rule does not have."""
    arrays = [flat_rows(each) for each in state]
    first, second = (*arrays, _NO_SQUARES, _NO_SQUARES)[:2]
    return first, second


@jit(parallel=True)
def _by_lookup(lookup: Any, first: Any, second: Any, rule: Any, chunk: Any, threads: Any) -> None:
    tasks = -(-lookup.K // chunk)
    for thread in numba.prange(threads):
        sums = np.empty(chunk * lookup.S * lookup.D, np.float32)
        for task in range(thread, tasks, threads):
            low = task * chunk
            _update_lookups(lookup, first, second, rule, low, min(lookup.K, low + chunk), sums)


@jit_part()
def _update_lookups(lookup: Any, first: Any, second: Any, rule: Any, low: Any, high: Any, sums: Any) -> None:
    """Sum and update the rows of lookups [low, high); `sums` is scratch."""
    D = lookup.D
    pass_columns(lookup, low, high, sums, 0)
    is_touched = np.zeros((high - low) * lookup.S, np.uint8)
    for row in find_rows(lookup, 0, lookup.N, low, high, low):
        is_touched[row] = 1
    for row in range(is_touched.size):
        if is_touched[row]:
            square = mean_square(sums, row * D, D)
            update_row(lookup.table, first, second, rule, low * lookup.S + row, D, sums, row * D, square)


@jit(parallel=True)
def _by_row(lookup: Any, first: Any, second: Any, rule: Any, order: Any, ends: Any, parts: Any) -> None:
    tokens = -(-lookup.N // parts)
    for part in numba.prange(parts):
        multiply_rows(lookup, min(lookup.N, part * tokens), min(lookup.N, part * tokens + tokens))
    for part in numba.prange(parts):
        _update_rows(lookup, first, second, rule, order, ends, share(ends, part, parts), share(ends, part + 1, parts))


@jit_part()
def _update_rows(lookup: Any, first: Any, second: Any, rule: Any, order: Any, ends: Any, low: Any, high: Any) -> None:
    """Sum and update the rows [low, high)."""
    gradient = np.empty(lookup.D, np.float32)
    for row in range(low, high):
        start = ends[row - 1] if row > 0 else 0
        if ends[row] > start:
            sum_row(lookup, order[start : ends[row]], gradient, 0)
            square = mean_square(gradient, 0, lookup.D)
            update_row(lookup.table, first, second, rule, row, lookup.D, gradient, 0, square)


@jit(parallel=True)
def _given(
    table: Any,
    first: Any,
    second: Any,
    grads: Any,
    rows: Any,
    squares: Any,
    rule: Any,
    D: Any,
    num_updated: Any,
    is_dense: Any,
    parts: Any,
) -> None:
    each = -(-num_updated // parts)
    for part in numba.prange(parts):
        for place in range(min(num_updated, part * each), min(num_updated, part * each + each)):
            row = rows[place] if rows.size > 0 else place
            start = (row if is_dense else place) * D
            square = squares[place] if squares.size > 0 else mean_square(grads, start, D)
            update_row(table, first, second, rule, row, D, grads, start, square)
