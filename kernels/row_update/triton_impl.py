"""row_update on a GPU: row_gradient with the update in place of the store.

The order of the lookups and the sums are the same, and score gradients come from the row as it was. Where a row is
looked up often, on average, each row has a program, which ends before it touches a row without lookups. Where rows are
looked up seldom, see `triton_windows`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_gradient.triton_order import sort_by_row, sort_list
from mfdist.kernels.row_gradient.triton_ordered import Ordered, order_list, ordered_lookups
from mfdist.kernels.row_gradient.triton_pieces import sum_piece
from mfdist.kernels.row_gradient.triton_slices import is_seldom, reach, slices, warp_options, widest
from mfdist.kernels.row_id_check import can_be_bad, error_word
from mfdist.kernels.row_update.rule import RowRule
from mfdist.kernels.row_update.triton_passes import passes, two_states, update_run
from mfdist.kernels.row_update.triton_rule import (
    NUMBERS,
    ROWWISE_ADAGRAD,
    accumulate,
    load_constants,
    step_constants,
    update_row,
)
from mfdist.kernels.row_update.triton_windows import update_by_windows
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, device_of, next_power_of_2

#: Columns to a warp of a row's program where its gradient is given, and the most warps.
_COLUMNS_EACH = 1024
_MAX_WARPS = 16
#: Sums of the slices before the last are kept in so much memory at most; else they are summed twice.
_MOST_KEPT_BYTES = 512 << 20
#: Columns of a program that updates a row by kept sums.
_KEPT_COLUMNS = 512


def fused_row_update(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    lr: Tensor,
    step: Tensor,
    rule: RowRule,
    offsets: tuple[int, int],
    code_stride: int,
    name: str,
    ordered: Ordered | None = None,
) -> Tensor:
    """Update the rows in place and return the scores' gradient; see `mfdist.kernels.fused_row_update`."""
    num_rows, dim = table.shape
    if not row_ids.numel() * dim:
        return torch.zeros_like(scores, memory_format=torch.contiguous_format)
    row_ids, scores, grad_output = row_ids.contiguous(), scores.contiguous(), grad_output.contiguous()
    with device_of(table):
        constants = step_constants(lr, step, rule)
        if ordered is None and is_seldom(row_ids.numel(), num_rows):
            grad_scores, limit = torch.empty_like(scores), code_stride or num_rows
            word = error_word(name, limit, is_code=code_stride > 0)
            lookup = (row_ids, scores, grad_scores, word, num_rows, code_stride)
            lookups = sort_by_row(*lookup, is_checked=can_be_bad(row_ids, limit))
            update_by_windows(table, state, grad_output, lookups, grad_scores, constants, offsets, NUMBERS[rule.kind])
            return grad_scores
        ordered = ordered or ordered_lookups(row_ids, scores, num_rows, code_stride, name)
        _update_by_rows(table, state, grad_output, ordered, constants, offsets, NUMBERS[rule.kind])
    return ordered.grad_scores


def ragged_row_update(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    runs: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    num_lookups: int,
    lr: Tensor,
    step: Tensor,
    rule: RowRule,
    offsets: tuple[int, int],
) -> Tensor:
    """Update the rows in place and return the scores' gradient; see `mfdist.kernels.ragged_row_update`."""
    num_rows, dim = table.shape
    num_ids = row_ids.numel()
    if not num_ids * dim:
        return torch.zeros_like(scores)
    row_ids, scores, grad_output = row_ids.contiguous(), scores.contiguous(), grad_output.contiguous()
    with device_of(table):
        constants = step_constants(lr, step, rule)
        grad_scores, numbers = scores.new_empty(runs.numel(), num_lookups), _numbers(runs, num_ids, num_lookups)
        if is_seldom(num_ids, num_rows):
            lookups = sort_list(row_ids, scores, numbers, num_rows)
            update_by_windows(table, state, grad_output, lookups, grad_scores, constants, offsets, NUMBERS[rule.kind])
        else:
            ordered = order_list(row_ids, scores, numbers, grad_scores, num_rows)
            _update_by_rows(table, state, grad_output, ordered, constants, offsets, NUMBERS[rule.kind])
        return grad_scores.view(-1)[numbers]


def _numbers(runs: Tensor, num_ids: int, num_lookups: int) -> Tensor:
    """Return the numbers n · K + k of listed lookups, as though every token had K of which some are not there."""
    missing = num_lookups - runs.long()
    skipped = torch.repeat_interleave(missing.cumsum(0) - missing, runs, output_size=num_ids)
    return skipped.add_(torch.arange(num_ids, device=runs.device))


def _update_by_rows(
    table: Tensor,
    state: list[Tensor],
    grad_output: Tensor,
    ordered: Ordered,
    constants: tuple[Tensor, Tensor],
    offsets: tuple[int, int],
    rule: int,
) -> None:
    """Update the rows that are looked up, a slice of columns at a time, and fill the scores' gradients."""
    num_rows, dim = table.shape
    order, cut, grad_scores = ordered
    needs_squares = rule == ROWWISE_ADAGRAD.value
    parts = slices(dim, widest(grad_output, order.words.numel(), num_rows, needs_squares=needs_squares))
    plan = passes(parts, needs_squares=needs_squares)
    num_kept = parts[-1].first if len(plan) > len(parts) else 0
    is_kept = 0 < num_kept * num_rows * grad_scores.itemsize <= _MOST_KEPT_BYTES
    sums = grad_scores.new_empty(num_rows * num_kept if is_kept else 0)
    squares = grad_scores.new_empty(num_rows if len(parts) > 1 else 0)
    pieces = grad_scores.new_empty(cut.num_windows * max(part.columns for part in parts))
    states = two_states(state, table)
    for part in plan[: len(parts)] if is_kept else plan:
        ways = reach(grad_output, part.first_column + part.columns)
        tile = (grad_scores.shape[1], cut.length, part.columns, part.first_column > 0, part.has_products, *ways)
        options = warp_options(part.columns, grad_output)
        if cut.num_windows:
            sum_piece[(cut.num_windows,)](
                table, cut.row_ids, grad_output, *order, cut.windows, pieces, grad_scores,
                dim, cut.code_stride, part.first_column, num_rows, *tile, **options,
            )  # fmt: skip
        _update_row[(num_rows,)](
            table, *states, grad_output, *order, pieces, grad_scores, squares, sums, *constants,
            dim, part.first_column, num_kept, *offsets,
            *tile, rule, part.is_updated, part.squares, is_kept, **options,
        )  # fmt: skip
    if is_kept:
        _update_kept[(num_rows, triton.cdiv(num_kept, _KEPT_COLUMNS))](
            table, *states, order.starts, order.ends, squares, sums, *constants,
            dim, num_kept, *offsets, _KEPT_COLUMNS, rule, num_warps=1, **LAUNCH_OPTIONS,
        )  # fmt: skip


def row_update(
    table: Tensor,
    state: list[Tensor],
    grads: Tensor,
    rows: Tensor | None,
    mean_squares: Tensor | None,
    lr: Tensor,
    step: Tensor,
    rule: RowRule,
    offsets: tuple[int, int],
    name: str,
) -> None:
    """Update rows in place from their gradients; see `mfdist.kernels.row_update`."""
    num_rows, dim = table.shape
    num_updated = num_rows if rows is None else rows.numel()
    if not num_updated * dim:
        return
    grads = grads.contiguous()
    word = error_word(name, num_rows, is_code=False)
    columns, warps = _shape(dim)
    with device_of(table):
        _update_given[(num_updated,)](
            table, *two_states(state, table), grads,
            grads if rows is None else rows.contiguous(),
            grads if mean_squares is None else mean_squares.contiguous(),
            word, *step_constants(lr, step, rule),
            num_rows, dim, *offsets,
            columns, NUMBERS[rule.kind], rows is not None, grads.shape[0] != num_updated, mean_squares is not None,
            num_warps=warps, **LAUNCH_OPTIONS,
        )  # fmt: skip


def _shape(dim: int) -> tuple[int, int]:
    """Return the columns of a row's program and its warps."""
    columns = next_power_of_2(dim)
    return columns, min(_MAX_WARPS, max(1, columns // _COLUMNS_EACH))


@triton.jit
def _update_row(
    table, first, second, grad_output, words, starts, ends, pieces, grad_scores, squares, sums, shared, keys,
    D, first_column, num_kept, row_offset, column_offset,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
    RULE: tl.constexpr, IS_UPDATED: tl.constexpr, SQUARES: tl.constexpr, IS_KEPT: tl.constexpr,
):  # fmt: skip
    """Update one slice of a row, if the row is looked up; a slice that is to be updated later has its sum kept."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    end = tl.load(ends + row)
    if end > start:
        update_run(
            table, first, second, grad_output, words, pieces, grad_scores, squares, sums, shared, keys,
            row, start, end, row, D, first_column, num_kept, row_offset, column_offset,
            K, PIECE, COLUMNS, IS_ADDED, HAS_PRODUCTS, IS_WHOLE, OFFSET, RULE, IS_UPDATED, SQUARES, IS_KEPT,
        )  # fmt: skip


@triton.jit
def _update_kept(
    table, first, second, starts, ends, squares, sums, shared, keys,
    D, num_kept, row_offset, column_offset,
    COLUMNS: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Update COLUMNS columns of one row by their kept sums, if the row is looked up; its state has the squares."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ends + row) > tl.load(starts + row):
        c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = c < num_kept
        values = tl.load(table + row * D + c, mask=is_column, other=0.0).to(tl.float32)
        gradient = tl.load(sums + row * num_kept + c, mask=is_column, other=0.0)
        update_row(
            table, first, second, row, c, is_column, values, gradient, tl.load(squares + row),
            tl.load(first + row), load_constants(shared, keys, RULE), D, row_offset, column_offset, RULE,
        )  # fmt: skip


@triton.jit
def _update_given(
    table, first, second, grads, rows, mean_squares, error_word, shared, keys,
    R, D, row_offset, column_offset,
    COLUMNS: tl.constexpr, RULE: tl.constexpr,
    HAS_ROWS: tl.constexpr, IS_DENSE: tl.constexpr, HAS_SQUARES: tl.constexpr,
):  # fmt: skip
    """Update one row by its gradient, of which there is one for each updated row, or for each row of the table."""
    place = tl.program_id(0).to(tl.int64)
    row = place
    if HAS_ROWS:
        row = tl.load(rows + place).to(tl.int64)
        if (row < 0) | (row >= R):
            tl.store(error_word, row)
    if (row >= 0) & (row < R):
        c = tl.arange(0, COLUMNS)
        is_column = c < D
        values = tl.load(table + row * D + c, mask=is_column, other=0.0).to(tl.float32)
        at = (row if IS_DENSE else place) * D
        gradient = tl.load(grads + at + c, mask=is_column, other=0.0).to(tl.float32)
        mean_square = tl.load(mean_squares + place) if HAS_SQUARES else tl.sum(gradient * gradient, axis=0) / D
        constants = load_constants(shared, keys, RULE)
        accumulated = 0.0
        if RULE == ROWWISE_ADAGRAD:
            before = tl.load(first + row)
            tl.debug_barrier()  # every warp has read it, before one of them writes what it becomes
            accumulated = accumulate(before, mean_square, constants)
        update_row(
            table, first, second, row, c, is_column, values, gradient, mean_square,
            accumulated, constants, D, row_offset, column_offset, RULE,
        )  # fmt: skip
