"""row_gradient on a GPU: lookups are sorted by row, then one program a row reads its tokens' grad_output once for both.

1. The order of the lookups, by row and within a row by token: see `triton_order`.
2. Runs of one row twice as long as a piece or longer are cut into pieces, which a program each sums.
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
#: Lookups of a piece: without pieces one frequent row's program would outlast all others.
PIECE = 128


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
    columns = slice_columns(dim, is_short=has_short_runs(row_ids.numel(), num_rows))
    num_pieces = row_ids.numel() // PIECE
    pieces = scores.new_empty(num_pieces, columns)
    bounds = (order.lookups, order.starts, order.ends)
    for first in range(0, dim, columns):
        constants = (row_ids.shape[1], PIECE, columns, first > 0, True)
        if num_pieces:
            sum_piece[(num_pieces,)](
                table, row_ids, scores, grad_output, *bounds, row_ids, pieces, grad_scores,
                dim, code_stride, first, num_rows, *constants, False, num_warps=1, **LAUNCH_OPTIONS,
            )  # fmt: skip
        _sum_row[(num_rows,)](
            table, scores, grad_output, *bounds, pieces, grad_table, grad_scores,
            dim, first, *constants, num_warps=1, **LAUNCH_OPTIONS,
        )  # fmt: skip


def has_short_runs(num_lookups: int, num_rows: int) -> bool:
    """Return whether rows are looked up so seldom that reading them counts beside reading grad_output."""
    return num_lookups < _SHORT_RUN * num_rows


def slice_columns(dim: int, *, is_short: bool) -> int:
    """Return the columns that one warp's program takes at a time."""
    return min(_COLUMNS_OF_SHORT_RUNS if is_short else _COLUMNS_EACH, next_power_of_2(dim))


@triton.jit
def sum_piece(
    table, row_ids, scores, grad_output, order, starts, ends, runs, pieces, grad_scores,
    D, S, first_column, NUM_RUNS,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    HAS_RUNS: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over the piece that starts in one window of PIECE lookups, into that row of `pieces`.

    Pieces count from where their run starts, so a run's pieces start in successive windows, and no window has two. The
    last lookup of the window belongs to the piece, if there is one. HAS_RUNS: `runs` holds each lookup's run, which
    otherwise has the row's number.
    """
    window = tl.program_id(0).to(tl.int64)
    last = window * PIECE + PIECE - 1
    if last < tl.load(ends + NUM_RUNS - 1):  # past it are bad ids
        lookup = tl.load(order + last)
        if lookup >= 0:  # within the order they leave gaps
            row = tl.load(row_ids + lookup).to(tl.int64) + (lookup % K).to(tl.int64) * S
            run = row
            if HAS_RUNS:
                run = tl.load(runs + last).to(tl.int64)
            start = tl.load(starts + run).to(tl.int64)
            end = tl.load(ends + run).to(tl.int64)
            first = start + (last - start) // PIECE * PIECE
            if (end - start >= 2 * PIECE) & (first + PIECE <= end):
                c = first_column + tl.arange(0, COLUMNS)
                is_column = c < D
                values = tl.load(table + row * D + c, mask=is_column, other=0.0).to(tl.float32)
                total = sum_lookups(
                    scores, grad_output, order, grad_scores, values, c, is_column,
                    first, first + PIECE, D, K, COLUMNS, IS_ADDED, HAS_PRODUCTS,
                )  # fmt: skip
                tl.store(pieces + window * COLUMNS + tl.arange(0, COLUMNS), total)


@triton.jit
def _sum_row(
    table, scores, grad_output, order, starts, ends, pieces, grad_table, grad_scores,
    D, first_column,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over one row's run of lookups; a row without any gets zeros."""
    row = tl.program_id(0).to(tl.int64)
    c = first_column + tl.arange(0, COLUMNS)
    is_column = c < D
    start = tl.load(starts + row)
    end = tl.load(ends + row)
    values = tl.load(table + row * D + c, mask=is_column, other=0.0, eviction_policy="evict_first").to(tl.float32)
    cut = cut_pieces(start, end, PIECE)
    total = sum_lookups(
        scores, grad_output, order, grad_scores, values, c, is_column,
        cut, end, D, K, COLUMNS, IS_ADDED, HAS_PRODUCTS,
    )  # fmt: skip
    total = add_pieces(total, pieces, start, cut, PIECE, COLUMNS)
    tl.store(
        grad_table + row * D + c, total.to(grad_table.dtype.element_ty), mask=is_column, eviction_policy="evict_first"
    )


@triton.jit
def cut_pieces(start, end, PIECE: tl.constexpr):
    """Return where what is left of a run starts once its pieces are cut off."""
    return tl.where(end - start >= 2 * PIECE, end - (end - start) % PIECE, start)


@triton.jit
def add_pieces(total, pieces, start, cut, PIECE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the total [COLUMNS] and the sums of the pieces of [start, cut)."""
    for window in range(start // PIECE, start // PIECE + (cut - start) // PIECE):
        total += tl.load(pieces + tl.cast(window, tl.int64) * COLUMNS + tl.arange(0, COLUMNS))
    return total


@triton.jit
def sum_lookups(
    scores, grad_output, order, grad_scores, values, c, is_column,
    start, end, D,
    K: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Return the sum [COLUMNS] of score · grad_output over [start, end) of the order.

    Each lookup's ⟨grad_output, values⟩ is written to grad_scores if HAS_PRODUCTS, or added to what an earlier slice
    left there. While one lookup is summed, what belongs to the next one and the number of the one after are on their
    way; past the end the last one is read once more, which the first-level cache answers.
    """
    IS_BEGUN: tl.constexpr = HAS_PRODUCTS and IS_ADDED
    lookup = _lookup_at(order, start, end)
    next_lookup = _lookup_at(order, start + 1, end)
    score, grads, product = _parts_of(scores, grad_output, grad_scores, lookup, c, is_column, D, K, IS_BEGUN)
    total = tl.zeros([COLUMNS], tl.float32)
    for entry in range(start, end):
        next_score, next_grads, next_product = _parts_of(
            scores, grad_output, grad_scores, next_lookup, c, is_column, D, K, IS_BEGUN
        )
        later_lookup = _lookup_at(order, entry + 2, end)
        wide = grads.to(tl.float32)
        total += wide * score
        if HAS_PRODUCTS:
            tl.store(grad_scores + lookup, product + tl.sum(wide * values, axis=0))
        lookup, score, grads, product = next_lookup, next_score, next_grads, next_product
        next_lookup = later_lookup
    return total


@triton.jit
def _lookup_at(order, entry, end):
    """Return the lookup at a place before `end`, or the last one; of an empty run, any that may be read."""
    return tl.maximum(tl.load(order + tl.maximum(tl.minimum(entry, end - 1), 0)), 0)


@triton.jit
def _parts_of(scores, grad_output, grad_scores, lookup, c, is_column, D, K: tl.constexpr, IS_BEGUN: tl.constexpr):
    """Return a lookup's score, its grad_output, and its score gradient so far."""
    score = tl.load(scores + lookup)
    grads = tl.load(grad_output + (lookup // K).to(tl.int64) * D + c, mask=is_column, other=0.0)
    product = tl.load(grad_scores + lookup) if IS_BEGUN else 0.0
    return score, grads, product
