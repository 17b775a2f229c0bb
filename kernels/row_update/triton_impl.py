"""row_update on a GPU: one program a row holds it whole, because one rule needs the square of its whole gradient.

Fused, it is row_gradient with the update in place of the store: the same order of the lookups, the same sums, and score
gradients from the row as it was. A program whose row has no lookups ends before it touches the row; where a table has
more rows than there are lookups, only the rows that are looked up have programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_gradient.triton_impl import sum_piece, sum_run
from mfdist.kernels.row_gradient.triton_order import order_by_row
from mfdist.kernels.row_id_check import error_word
from mfdist.kernels.row_update.rule import RowRule
from mfdist.kernels.row_update.triton_rule import NUMBERS, step_constants, update_row
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, device_of, must_check, next_power_of_2

#: Columns to a warp of a row's program, and the most warps.
_COLUMNS_EACH = 1024
_MAX_WARPS = 16
#: Longer runs are split, for rows of one warp; wider rows have more warps and longer pieces.
_PIECE = 256


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
    columns, warps = _shape(dim)
    piece = _PIECE * warps
    num_pieces = row_ids.numel() // piece
    options: dict[str, Any] = {"num_warps": warps, **LAUNCH_OPTIONS}
    with device_of(table):
        order = order_by_row(
            row_ids, grad_scores, word, num_rows, code_stride,
            is_checked=must_check(row_ids, limit), is_brief=True,
        )  # fmt: skip
        pieces = scores.new_empty(num_pieces, columns)
        constants = (row_ids.shape[1], piece, columns)
        if num_pieces:
            sum_piece[(num_pieces,)](
                table, row_ids, scores, grad_output, order.lookups, order.ends, pieces, grad_scores,
                dim, code_stride, 0, order.ends.numel(), row_ids.numel(), *constants, False, **options,
            )  # fmt: skip
        num_runs = num_rows if order.rows is None else order.rows.numel()
        _update_looked_up[(num_runs,)](
            table, *_two(state, table), scores, grad_output,
            order.lookups, order.starts, order.ends, order.lookups if order.rows is None else order.rows,
            pieces, grad_scores, *step_constants(lr, step, rule),
            dim, row_ids.numel(), *offsets,
            *constants, NUMBERS[rule.kind], order.rows is not None, **options,
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
    table, first, second, scores, grad_output, order, starts, ends, rows, pieces, grad_scores, shared, keys,
    D, NUM_LOOKUPS, row_offset, column_offset,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr,
    RULE: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Sum one row's run of lookups and update the row by it."""
    run = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + run)
    end = tl.load(ends + run)
    if end > start:
        row = run
        if HAS_ROWS:
            row = tl.load(rows + run).to(tl.int64)
        c = tl.arange(0, COLUMNS)
        is_column = c < D
        values = tl.load(table + row * D + c, mask=is_column, other=0.0, eviction_policy="evict_first").to(tl.float32)
        gradient = sum_run(
            scores, grad_output, order, pieces, grad_scores, values, c, is_column,
            start, end, D, NUM_LOOKUPS, K, PIECE, COLUMNS, False,
        )  # fmt: skip
        update_row(
            table, first, second, row, c, is_column, values, gradient, tl.sum(gradient * gradient, axis=0) / D,
            shared, keys, D, row_offset, column_offset, RULE,
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
        update_row(
            table, first, second, row, c, is_column, values, gradient, mean_square,
            shared, keys, D, row_offset, column_offset, RULE,
        )  # fmt: skip
