"""row_update on a GPU: row_gradient with the update in place of the store.

The order of the lookups and the sums are the same, and score gradients come from the row as it was. A program whose row
has no lookups ends before it touches the row; where a table has more rows than there are lookups, only the rows that
are looked up have programs.

Wide rows are taken a slice of columns at a time, as in row_gradient, narrower ones where runs are short: the rows that
stream by then leave less of the second-level cache to grad_output. Row-wise Adagrad, which needs the square of a row's
whole gradient, has slices of wide rows only: it goes over them adding up squares, updates the last one when they are
complete, and then goes over the others once more.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_gradient.triton_impl import (
    PIECE,
    add_pieces,
    cut_pieces,
    has_short_runs,
    slice_columns,
    sum_lookups,
    sum_piece,
)
from mfdist.kernels.row_gradient.triton_order import order_by_row
from mfdist.kernels.row_id_check import error_word
from mfdist.kernels.row_update.rule import RowRule
from mfdist.kernels.row_update.triton_rule import NUMBERS, ROWWISE_ADAGRAD, load_constants, step_constants, update_row
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, device_of, must_check, next_power_of_2

#: Columns to a warp of a row's program where its gradient is given, and the most warps.
_COLUMNS_EACH = 1024
_MAX_WARPS = 16
#: What a pass does with the gradient's squares: uses its own, begins a sum, adds to it, completes it, or has used it.
_OWN, _BEGUN, _ADDED, _COMPLETED, _KNOWN = range(5)
_OWNS: tl.constexpr = tl.constexpr(_OWN)
_BEGINS: tl.constexpr = tl.constexpr(_BEGUN)
_KNOWS: tl.constexpr = tl.constexpr(_KNOWN)


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
) -> Tensor:
    """Update the rows in place and return the scores' gradient; see `mfdist.kernels.fused_row_update`."""
    num_rows, dim = table.shape
    if not row_ids.numel() * dim:
        return torch.zeros_like(scores, memory_format=torch.contiguous_format)
    row_ids, scores, grad_output = row_ids.contiguous(), scores.contiguous(), grad_output.contiguous()
    grad_scores = torch.empty_like(scores)
    limit = code_stride or num_rows
    word = error_word(name, limit, is_code=code_stride > 0)
    needs_squares = rule.kind == "rowwise_adagrad"
    is_short = has_short_runs(row_ids.numel(), num_rows)
    columns = slice_columns(dim, is_short=is_short and not needs_squares)
    num_pieces = row_ids.numel() // PIECE
    options: dict[str, Any] = {"num_warps": 1, **LAUNCH_OPTIONS}
    with device_of(table):
        order = order_by_row(
            row_ids, grad_scores, word, num_rows, code_stride,
            is_checked=must_check(row_ids, limit), is_brief=True,
        )  # fmt: skip
        num_runs = order.ends.numel()
        pieces = scores.new_empty(num_pieces, columns)
        squares = scores.new_empty(num_runs if dim > columns else 0)
        shared, keys = step_constants(lr, step, rule)
        bounds = (order.lookups, order.starts, order.ends)
        has_rows = order.rows is not None
        rows, runs = (order.rows, order.runs) if has_rows else (row_ids, row_ids)
        for part in _passes(dim, columns, needs_squares=needs_squares):
            constants = (row_ids.shape[1], PIECE, columns, part.first_column > 0, part.has_products)
            if num_pieces:
                sum_piece[(num_pieces,)](
                    table, row_ids, scores, grad_output, *bounds, runs, pieces, grad_scores,
                    dim, code_stride, part.first_column, num_runs, *constants, has_rows, **options,
                )  # fmt: skip
            _update_looked_up[(num_runs,)](
                table, *_two(state, table), scores, grad_output, *bounds, rows,
                pieces, grad_scores, squares, shared, keys,
                dim, part.first_column, *offsets,
                *constants, NUMBERS[rule.kind], has_rows, part.is_updated, part.squares, is_short, **options,
            )  # fmt: skip
    return grad_scores


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
            table, *_two(state, table), grads,
            grads if rows is None else rows.contiguous(),
            grads if mean_squares is None else mean_squares.contiguous(),
            word, *step_constants(lr, step, rule),
            num_rows, dim, *offsets,
            columns, NUMBERS[rule.kind], rows is not None, grads.shape[0] != num_updated, mean_squares is not None,
            num_warps=warps, **LAUNCH_OPTIONS,
        )  # fmt: skip


class _Pass(NamedTuple):
    """One pass over a slice of columns: what is done besides summing the row's gradient."""

    first_column: int
    has_products: bool  # score gradients
    is_updated: bool
    squares: int


def _passes(dim: int, columns: int, *, needs_squares: bool) -> list[_Pass]:
    """Return the passes that update all slices."""
    *others, last = range(0, dim, columns)
    if not others or not needs_squares:
        return [_Pass(first, True, True, _OWN) for first in (*others, last)]
    looks = [_Pass(first, True, False, _ADDED if first else _BEGUN) for first in others]
    return [*looks, _Pass(last, True, True, _COMPLETED), *(_Pass(first, False, True, _KNOWN) for first in others)]


def _shape(dim: int) -> tuple[int, int]:
    """Return the columns of a row's program and its warps."""
    columns = next_power_of_2(dim)
    return columns, min(_MAX_WARPS, max(1, columns // _COLUMNS_EACH))


def _two(state: list[Tensor], table: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors, the table in place of states that the rule does not have."""
    first, second = (*state, table, table)[:2]
    return first, second


@triton.jit
def _update_looked_up(
    table, first, second, scores, grad_output, order, starts, ends, rows, pieces, grad_scores, squares, shared, keys,
    D, first_column, row_offset, column_offset,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    RULE: tl.constexpr, HAS_ROWS: tl.constexpr, IS_UPDATED: tl.constexpr, SQUARES: tl.constexpr,
    IS_SHORT: tl.constexpr,
):  # fmt: skip
    """Sum one row's run of lookups over a slice of columns, and update the slice by it."""
    run = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + run)
    end = tl.load(ends + run)
    if end > start:
        row = run
        if HAS_ROWS:
            row = tl.load(rows + run).to(tl.int64)
        c = first_column + tl.arange(0, COLUMNS)
        is_column = c < D
        values = tl.load(table + row * D + c, mask=is_column, other=0.0, eviction_policy="evict_first").to(tl.float32)
        accumulated = 0.0
        if (RULE == ROWWISE_ADAGRAD) & IS_SHORT:  # before the sum, whose stores would keep it waiting
            accumulated = tl.load(first + row)
        known = tl.load(squares + run) if SQUARES > _BEGINS else 0.0
        cut = cut_pieces(start, end, PIECE)
        gradient = sum_lookups(
            scores, grad_output, order, grad_scores, values, c, is_column,
            cut, end, D, K, COLUMNS, IS_ADDED, HAS_PRODUCTS,
        )  # fmt: skip
        gradient = add_pieces(gradient, pieces, start, cut, PIECE, COLUMNS)
        if SQUARES == _KNOWS:
            # The state has them already; they only tell once more whether the row is to be left alone.
            square = known * 0.0
        else:
            square = known + tl.sum(gradient * gradient, axis=0) / D
            if SQUARES != _OWNS:
                tl.store(squares + run, square)
        if (RULE == ROWWISE_ADAGRAD) & (IS_SHORT == 0):  # after it, as registers are scarce
            accumulated = tl.load(first + row)
        if IS_UPDATED:
            update_row(
                table, first, second, row, c, is_column, values, gradient, square,
                accumulated, load_constants(shared, keys, RULE), D, row_offset, column_offset, RULE,
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
        accumulated = tl.load(first + row) if RULE == ROWWISE_ADAGRAD else 0.0
        update_row(
            table, first, second, row, c, is_column, values, gradient, mean_square,
            accumulated, load_constants(shared, keys, RULE), D, row_offset, column_offset, RULE,
        )  # fmt: skip
