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

#: Few columns and one warp: nothing waits for another warp, and many programs share a multiprocessor.
_COLUMNS = 512
#: Lookups whose grad_output a program reads at a time, while it sums as many.
_ENTRIES = 2
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
    columns = min(_COLUMNS, next_power_of_2(dim))
    num_pieces = row_ids.numel() // _PIECE
    pieces = scores.new_empty(num_pieces, columns)
    for first in range(0, dim, columns):
        constants = (row_ids.shape[1], _PIECE, _ENTRIES, columns, first > 0)
        if num_pieces:
            sum_piece[(num_pieces,)](
                table, row_ids, scores, grad_output, order.lookups, order.ends, pieces, grad_scores,
                dim, code_stride, first, order.ends.numel(), *constants, num_warps=1, **LAUNCH_OPTIONS,
            )  # fmt: skip
        _sum_row[(num_rows,)](
            table, scores, grad_output, order.lookups, order.ends, pieces, grad_table, grad_scores,
            dim, first, order.ends_each, *constants, num_warps=1, **LAUNCH_OPTIONS,
        )  # fmt: skip


@triton.jit
def sum_piece(
    table, row_ids, scores, grad_output, order, ends, pieces, grad_scores,
    D, S, first_column, NUM_ENDS,
    K: tl.constexpr, PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over PIECE lookups, if they are all of one row, into a row of `pieces`."""
    piece = tl.program_id(0).to(tl.int64)
    start = piece * PIECE
    end = start + PIECE
    if end <= tl.load(ends + NUM_ENDS - 1):  # past it are bad ids
        row = _row_of(row_ids, tl.load(order + start), K, S)
        if row == _row_of(row_ids, tl.load(order + end - 1), K, S):
            c = first_column + tl.arange(0, COLUMNS)
            is_column = c < D
            values = tl.load(table + row * D + c, mask=is_column, other=0.0).to(tl.float32)
            total = _sum_lookups(
                scores, grad_output, order, grad_scores, values, c, is_column,
                start, end, end, end, D, K, ENTRIES, COLUMNS, IS_ADDED,
            )  # fmt: skip
            tl.store(pieces + piece * COLUMNS + tl.arange(0, COLUMNS), tl.sum(total, axis=0))


@triton.jit
def _row_of(row_ids, lookup, K: tl.constexpr, S):
    return tl.load(row_ids + lookup).to(tl.int64) + (lookup % K).to(tl.int64) * S


@triton.jit
def _sum_row(
    table, scores, grad_output, order, ends, pieces, grad_table, grad_scores,
    D, first_column, ENDS_EACH,
    K: tl.constexpr, PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over one row's run of lookups; a row without any gets zeros."""
    row = tl.program_id(0).to(tl.int64)
    c = first_column + tl.arange(0, COLUMNS)
    is_column = c < D
    start = tl.load(ends + row * ENDS_EACH - 1, mask=row > 0, other=0)
    end = tl.load(ends + (row + 1) * ENDS_EACH - 1)
    values = tl.load(table + row * D + c, mask=is_column, other=0.0).to(tl.float32)
    total = sum_run(
        scores, grad_output, order, pieces, grad_scores, values, c, is_column,
        start, end, D, K, PIECE, ENTRIES, COLUMNS, IS_ADDED,
    )  # fmt: skip
    tl.store(grad_table + row * D + c, total.to(grad_table.dtype.element_ty), mask=is_column)


@triton.jit
def sum_run(
    scores, grad_output, order, pieces, grad_scores, values, c, is_column,
    start, end, D,
    K: tl.constexpr, PIECE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Return the sum [COLUMNS] of score · grad_output over one row's run, and write its lookups' score gradients.

    What `sum_piece` has summed of the run is taken from `pieces`.
    """
    first_piece = (start + PIECE - 1) // PIECE
    end_piece = tl.maximum(end // PIECE, first_piece)
    total = _sum_lookups(
        scores, grad_output, order, grad_scores, values, c, is_column,
        start, first_piece * PIECE, end_piece * PIECE, end, D, K, ENTRIES, COLUMNS, IS_ADDED,
    )  # fmt: skip
    for first in range(first_piece, end_piece, ENTRIES):
        piece = first + tl.arange(0, ENTRIES)
        at = piece.to(tl.int64)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        total += tl.load(pieces + at, mask=(piece < end_piece)[:, None], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _sum_lookups(
    scores, grad_output, order, grad_scores, values, c, is_column,
    start, gap, gap_end, end, D,
    K: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Return the sum of score · grad_output over [start, gap) and [gap_end, end) of the order, in ENTRIES parts.

    Each lookup's ⟨grad_output, values⟩ is written to grad_scores, or added to what an earlier slice left there.
    While one round is summed, the next one's grad_output and the one after's lookups are on their way.
    """
    skipped = tl.where(gap < end, gap_end - gap, 0)
    entry = start + tl.arange(0, ENTRIES)
    lookup, is_entry = _lookups_at(order, entry, gap, skipped, end)
    next_lookup, is_next = _lookups_at(order, entry + ENTRIES, gap, skipped, end)
    score, grads = _grads_of(scores, grad_output, lookup, is_entry, c, is_column, D, K)
    total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
    for first in range(start, end - skipped, ENTRIES):
        next_score, next_grads = _grads_of(scores, grad_output, next_lookup, is_next, c, is_column, D, K)
        entry = first + 2 * ENTRIES + tl.arange(0, ENTRIES)
        later_lookup, is_later = _lookups_at(order, entry, gap, skipped, end)
        if IS_ADDED:
            product = tl.load(grad_scores + lookup, mask=is_entry, other=0.0)
        else:
            product = tl.zeros([ENTRIES], tl.float32)
        wide = grads.to(tl.float32)
        total += wide * score[:, None]
        product += tl.sum(wide * values[None, :], axis=1)
        tl.store(grad_scores + lookup, product, mask=is_entry)
        lookup, is_entry, score, grads = next_lookup, is_next, next_score, next_grads
        next_lookup, is_next = later_lookup, is_later
    return total


@triton.jit
def _lookups_at(order, entry, gap, skipped, end):
    entry += tl.where(entry >= gap, skipped, 0)
    is_entry = entry < end
    return tl.load(order + entry, mask=is_entry, other=0), is_entry


@triton.jit
def _grads_of(scores, grad_output, lookup, is_entry, c, is_column, D, K: tl.constexpr):
    score = tl.load(scores + lookup, mask=is_entry, other=0.0)
    at = (lookup // K).to(tl.int64)[:, None] * D + c[None, :]
    return score, tl.load(grad_output + at, mask=is_entry[:, None] & is_column[None, :], other=0.0)
