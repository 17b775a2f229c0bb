"""row_gradient on a GPU: lookups are sorted by row, then one program a row reads its tokens' grad_output once for both.

1. The order of the lookups, by row and within a row by token: see `triton_order`.
2. Whole pieces of the order that belong to one row, which only a long run has, are summed by a program each.
3. Each row's program sums what is left of its run and adds the pieces. The row itself stays in registers, so the same
   read of grad_output gives score · grad_output for the row and ⟨grad_output, row⟩ for the lookup's score.

Steps 2 and 3 go over one slice of columns after the other, so that more of grad_output stays in the second-level cache.
No atomics: every sum has one program and a fixed order, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_gradient.triton_order import Order, order_by_row
from mfdist.kernels.row_id_check import error_word
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, device_of, must_check, next_power_of_2

#: Columns to a warp: what its registers hold, and nothing waits for another warp.
_COLUMNS_EACH = 1024
#: Where runs are short, the rows themselves leave grad_output less of the second-level cache: half of it at a time.
_SHORT_RUN = 32
_COLUMNS_OF_SHORT_RUNS = 512
#: Longer runs are split, lest one frequent row's program outlast all others.
_PIECE = 256


def row_gradient(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int, name: str
) -> tuple[Tensor, Tensor]:
    """Return ([R, D] in table.dtype, [N, K] fp32); see `mfdist.kernels.row_gradient`."""
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    if not num_tokens * num_lookups * dim:
        return table.new_zeros(num_rows, dim), torch.zeros_like(scores, memory_format=torch.contiguous_format)
    table, row_ids, scores = table.contiguous(), row_ids.contiguous(), scores.contiguous()
    grad_output = grad_output.contiguous()
    grad_table = table.new_empty(num_rows, dim)
    grad_scores = scores.new_empty(num_tokens, num_lookups)
    limit = code_stride or num_rows
    word = error_word(name, limit, is_code=code_stride > 0)
    with device_of(table):
        is_checked = must_check(row_ids, limit)
        order = order_by_row(row_ids, grad_scores, word, num_rows, code_stride, is_checked=is_checked)
        _sum(table, row_ids, scores, grad_output, order, grad_table, grad_scores, code_stride)
    return grad_table, grad_scores


def _sum(
    table: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    order: Order,
    grad_table: Tensor,
    grad_scores: Tensor,
    code_stride: int,
) -> None:
    """Fill both gradients, one slice of columns after the other."""
    num_rows, dim = table.shape
    is_short = row_ids.numel() < _SHORT_RUN * num_rows
    columns = min(_COLUMNS_OF_SHORT_RUNS if is_short else _COLUMNS_EACH, next_power_of_2(dim))
    num_pieces = row_ids.numel() // _PIECE
    pieces = scores.new_empty(num_pieces, columns)
    for first in range(0, dim, columns):
        constants = (row_ids.shape[1], _PIECE, columns, first > 0)
        if num_pieces:
            sum_piece[(num_pieces,)](
                table, row_ids, scores, grad_output, order.lookups, order.ends, pieces, grad_scores,
                dim, code_stride, first, order.ends.numel(), row_ids.numel(), *constants, num_warps=1, **LAUNCH_OPTIONS,
            )  # fmt: skip
        _sum_row[(num_rows,)](
            table, scores, grad_output, order.lookups, order.starts, order.ends, pieces, grad_table, grad_scores,
            dim, first, row_ids.numel(), *constants, num_warps=1, **LAUNCH_OPTIONS,
        )  # fmt: skip


@triton.jit
def sum_piece(
    table, row_ids, scores, grad_output, order, ends, pieces, grad_scores,
    D, S, first_column, NUM_RUNS, NUM_LOOKUPS,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over PIECE lookups, if they are all of one row, into a row of `pieces`."""
    piece = tl.program_id(0).to(tl.int64)
    start = piece * PIECE
    end = start + PIECE
    if end <= tl.load(ends + NUM_RUNS - 1):  # past it are bad ids
        first = tl.load(order + start)
        last = tl.load(order + end - 1)
        if (first >= 0) & (last >= 0):  # within the order they leave gaps
            row = _row_of(row_ids, first, K, S)
            if row == _row_of(row_ids, last, K, S):
                c = first_column + tl.arange(0, COLUMNS)
                is_column = c < D
                values = tl.load(table + row * D + c, mask=is_column, other=0.0).to(tl.float32)
                total = _sum_lookups(
                    scores, grad_output, order, grad_scores, values, c, is_column,
                    start, end, end, end, D, NUM_LOOKUPS, K, COLUMNS, IS_ADDED,
                )  # fmt: skip
                tl.store(pieces + piece * COLUMNS + tl.arange(0, COLUMNS), total)


@triton.jit
def _row_of(row_ids, lookup, K: tl.constexpr, S):
    return tl.load(row_ids + lookup).to(tl.int64) + (lookup % K).to(tl.int64) * S


@triton.jit
def _sum_row(
    table, scores, grad_output, order, starts, ends, pieces, grad_table, grad_scores,
    D, first_column, NUM_LOOKUPS,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over one row's run of lookups; a row without any gets zeros."""
    row = tl.program_id(0).to(tl.int64)
    c = first_column + tl.arange(0, COLUMNS)
    is_column = c < D
    values = tl.load(table + row * D + c, mask=is_column, other=0.0, eviction_policy="evict_first").to(tl.float32)
    total = sum_run(
        scores, grad_output, order, pieces, grad_scores, values, c, is_column,
        tl.load(starts + row), tl.load(ends + row), D, NUM_LOOKUPS, K, PIECE, COLUMNS, IS_ADDED,
    )  # fmt: skip
    tl.store(
        grad_table + row * D + c, total.to(grad_table.dtype.element_ty), mask=is_column, eviction_policy="evict_first"
    )


@triton.jit
def sum_run(
    scores, grad_output, order, pieces, grad_scores, values, c, is_column,
    start, end, D, NUM_LOOKUPS,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Return the sum [COLUMNS] of score · grad_output over one row's run, and write its lookups' score gradients.

    What `sum_piece` has summed of the run is taken from `pieces`.
    """
    first_piece = (start + PIECE - 1) // PIECE
    end_piece = tl.maximum(end // PIECE, first_piece)
    total = _sum_lookups(
        scores, grad_output, order, grad_scores, values, c, is_column,
        start, first_piece * PIECE, end_piece * PIECE, end, D, NUM_LOOKUPS, K, COLUMNS, IS_ADDED,
    )  # fmt: skip
    for piece in range(first_piece, end_piece):
        total += tl.load(pieces + tl.cast(piece, tl.int64) * COLUMNS + tl.arange(0, COLUMNS))
    return total


@triton.jit
def _sum_lookups(
    scores, grad_output, order, grad_scores, values, c, is_column,
    start, gap, gap_end, end, D, NUM_LOOKUPS,
    K: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Return the sum of score · grad_output over [start, gap) and [gap_end, end) of the order.

    Each lookup's ⟨grad_output, values⟩ is written to grad_scores, or added to what an earlier slice left there.
    While one lookup is summed, the next one's grad_output and the number of the one after are on their way; past the
    end, which costs no test, these are lookups of another row that nobody uses.
    """
    skipped = tl.where(gap < end, gap_end - gap, 0)
    lookup = _lookup_at(order, start, gap, skipped, NUM_LOOKUPS)
    next_lookup = _lookup_at(order, start + 1, gap, skipped, NUM_LOOKUPS)
    score, grads = _grads_of(scores, grad_output, lookup, c, is_column, D, K)
    total = tl.zeros([COLUMNS], tl.float32)
    for entry in range(start, end - skipped):
        next_score, next_grads = _grads_of(scores, grad_output, next_lookup, c, is_column, D, K)
        later_lookup = _lookup_at(order, entry + 2, gap, skipped, NUM_LOOKUPS)
        wide = grads.to(tl.float32)
        total += wide * score
        product = tl.sum(wide * values, axis=0)
        if IS_ADDED:
            product += tl.load(grad_scores + lookup)
        tl.store(grad_scores + lookup, product)
        lookup, score, grads = next_lookup, next_score, next_grads
        next_lookup = later_lookup
    return total


@triton.jit
def _lookup_at(order, entry, gap, skipped, NUM_LOOKUPS):
    entry += tl.where(entry >= gap, skipped, 0)
    return tl.maximum(tl.load(order + tl.minimum(entry, NUM_LOOKUPS - 1)), 0)


@triton.jit
def _grads_of(scores, grad_output, lookup, c, is_column, D, K: tl.constexpr):
    score = tl.load(scores + lookup)
    return score, tl.load(grad_output + (lookup // K).to(tl.int64) * D + c, mask=is_column, other=0.0)
