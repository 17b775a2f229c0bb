"""Fused updates of rows that are looked up seldom: a program takes the runs that start in a window of sorted lookups.

A program a row would wait for where its run lies, then for its lookups, then for grad_output, with little to sum at the
end. Here a program goes through the lookups of several rows in one loop, and what the next ones need is copied to
shared memory meanwhile. Runs of two pieces or more, which would hold such a program up, have one of their own.

Narrow slices of columns keep grad_output in the second-level cache beside the rows that stream by; row-wise Adagrad
takes rows as wide as registers allow, because going over a slice twice costs more. In several passes the score
gradients so far lie in the order of the lookups, where they are read and written side by side.
"""

import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_gradient.triton_order import SortedLookups, lookup_of, score_of
from mfdist.kernels.row_gradient.triton_pieces import store_piece
from mfdist.kernels.row_gradient.triton_slices import slices
from mfdist.kernels.row_update.triton_passes import finish_row, passes, two_states, update_run
from mfdist.kernels.row_update.triton_rule import ROWWISE_ADAGRAD, load_constants
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, at_most_registers
from mfdist.kernels.triton_rows import as_fp32

_WINDOW = 32
#: Lookups of a piece: few rows have so many, and their pieces' sums take memory for the worst case.
PIECE = 512
_COLUMNS = 512
_WHOLE_COLUMNS = 1024
#: Registers to a thread of so many columns of bf16 or fp16, so that enough warps fit.
_REGISTERS = {_COLUMNS: 96, _WHOLE_COLUMNS: 128}
_NARROW_BYTES = 2
#: Lookups whose parts are on their way at a time.
_STAGES: tl.constexpr = tl.constexpr(4)


def update_by_windows(
    table: Tensor,
    state: list[Tensor],
    grad_output: Tensor,
    lookups: SortedLookups,
    grad_scores: Tensor,
    constants: tuple[Tensor, Tensor],
    offsets: tuple[int, int],
    rule: int,
) -> None:
    """Update the rows that are looked up, a slice of columns at a time, and fill `grad_scores`."""
    num_rows, dim = table.shape
    num_ids, needs_squares = lookups.words.numel(), rule == ROWWISE_ADAGRAD.value
    parts = slices(dim, _WHOLE_COLUMNS if needs_squares else _COLUMNS)
    num_pieces = num_ids // PIECE
    pieces = grad_scores.new_empty(num_pieces * max(part.columns for part in parts))
    plan = passes(parts, needs_squares=needs_squares)
    # In several passes: score gradients so far, and squares of rows at their last lookups.
    products = grad_scores.new_empty(num_ids if len(plan) > 1 else 0)
    squares = grad_scores.new_empty(num_ids if len(plan) > 1 and needs_squares else 0)
    states = two_states(state, table)
    options = {"num_warps": 1, **LAUNCH_OPTIONS}
    is_narrow = grad_output.itemsize == _NARROW_BYTES
    sizes = (num_ids, num_rows, dim)
    for part in plan:
        first, columns, is_added = part.first_column, part.columns, part.first_column > 0
        is_limited = is_narrow and columns in _REGISTERS
        limited = {**options, **at_most_registers(_REGISTERS[columns])} if is_limited else options
        how = (part.has_products, rule, part.is_updated, part.squares)
        tile = (grad_scores.shape[1], PIECE, columns, is_added)
        if num_pieces:
            _sum_long_piece[(num_pieces,)](
                table, grad_output, *lookups, pieces, grad_scores, *sizes, first, *tile, part.has_products, **options
            )
            _update_long_run[(triton.cdiv(num_ids, 2 * PIECE),)](
                table, *states, grad_output, *lookups, pieces, grad_scores, squares, *constants,
                *sizes, first, *offsets, *tile, *how, **options,
            )  # fmt: skip
        _update_window[(triton.cdiv(num_ids, _WINDOW),)](
            table, *states, grad_output, *lookups, products, grad_scores, squares, *constants,
            *sizes, first, *offsets, *tile, *how, part.is_last_product, first + columns <= dim, _WINDOW, **limited,
        )  # fmt: skip


@triton.jit
def _update_window(
    table, first, second, grad_output, rows, words, products, grad_scores, squares, shared, keys,
    M, R, D, first_column, row_offset, column_offset,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
    HAS_PRODUCTS: tl.constexpr, RULE: tl.constexpr, IS_UPDATED: tl.constexpr, SQUARES: tl.constexpr,
    IS_LAST_PRODUCT: tl.constexpr, IS_WHOLE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Sum the runs, shorter than two pieces, that start in one window of lookups, and update their rows.

    What the loop reads within conditions that always hold stays in registers: copying a single number to shared memory
    takes more instructions than waiting for it, mostly in the first-level cache. Addresses read ahead must not come
    from the round before, or nothing would be ahead.
    """
    begin = tl.program_id(0).to(tl.int64) * WINDOW
    window = begin + tl.arange(0, WINDOW)
    inside = tl.load(rows + window, mask=window < M, other=R)
    before = tl.load(rows + begin - 1, mask=begin > 0, other=-1)
    start = begin + tl.sum((inside == before).to(tl.int32), axis=0)
    end = begin + tl.sum((inside < R).to(tl.int32), axis=0)
    if start < end:
        last = tl.load(rows + end - 1)
        if tl.load(rows + begin + WINDOW, mask=begin + WINDOW < M, other=R) == last:
            beyond = begin + WINDOW + tl.arange(0, 2 * PIECE)
            end += tl.sum((tl.load(rows + beyond, mask=beyond < M, other=R) == last).to(tl.int32), axis=0)
        last_start = begin + tl.sum((inside < last).to(tl.int32), axis=0)
        if end - last_start >= 2 * PIECE:
            end = last_start
    if start < end:
        constants = load_constants(shared, keys, RULE)
        c = first_column + tl.arange(0, COLUMNS)
        is_column = tl.arange(0, COLUMNS) < (COLUMNS if IS_WHOLE else D - first_column)
        first_row = tl.load(rows + start)
        first_word = tl.load(words + start)
        next_row, next_word = first_row, first_word
        next_product = 0.0
        if IS_ADDED and HAS_PRODUCTS:
            next_product = tl.load(products + start)
        next_accumulated = 0.0
        if RULE == ROWWISE_ADAGRAD:
            next_accumulated = tl.load(first + next_row)
        nothing = tl.zeros([COLUMNS], tl.int32)
        values = tl.zeros([COLUMNS], tl.float32)
        gradient = tl.zeros([COLUMNS], tl.float32)
        for place in tl.range(start, end, num_stages=_STAGES):
            row, word, product, accumulated = next_row, next_word, next_product, next_accumulated
            far_row, row_before, far_word = first_row, first_row, first_word
            if place >= start:
                far_row = tl.load(rows + place)
                row_before = tl.load(rows + place - 1, mask=place > start, other=-1).to(far_row.dtype)
                far_word = tl.load(words + place)
            is_first = far_row != row_before
            token = (lookup_of(far_word) // K).to(tl.int64)
            grads = tl.load(grad_output + token * D + c, mask=is_column, other=0.0)
            new_values = tl.load(
                table + far_row.to(tl.int64) * D + c,
                mask=is_column & (nothing < is_first.to(tl.int32)), other=0.0, eviction_policy="evict_first",
            )  # fmt: skip
            next_row = tl.cast(R, row.dtype)
            if place + 1 < M:
                next_row = tl.load(rows + place + 1)
                next_word = tl.load(words + place + 1)
                if IS_ADDED and HAS_PRODUCTS:
                    next_product = tl.load(products + place + 1)
                if RULE == ROWWISE_ADAGRAD:
                    is_other = next_row != row
                    found = tl.load(first + next_row, mask=is_other & (next_row < R), other=0.0)
                    next_accumulated = tl.where(is_other, found, next_accumulated)
            if is_first:
                values = as_fp32(new_values)
                gradient = tl.zeros([COLUMNS], tl.float32)
            wide = as_fp32(grads)
            gradient += wide * score_of(word)
            if HAS_PRODUCTS:
                product += tl.sum(wide * values, axis=0)
                if IS_LAST_PRODUCT:
                    tl.store(grad_scores + lookup_of(word), product)
                else:
                    tl.store(products + place, product)
            if next_row != row:
                finish_row(
                    table, first, second, squares, row.to(tl.int64), place, c, is_column, values, gradient,
                    accumulated, constants, D, row_offset, column_offset, RULE, IS_UPDATED, SQUARES,
                )  # fmt: skip


@triton.jit
def _update_long_run(
    table, first, second, grad_output, rows, words, pieces, grad_scores, squares, shared, keys,
    M, R, D, first_column, row_offset, column_offset,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr,
    HAS_PRODUCTS: tl.constexpr, RULE: tl.constexpr, IS_UPDATED: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Update the row whose run of two pieces or more starts in a window of that length, where there is one."""
    begin = tl.program_id(0).to(tl.int64) * (2 * PIECE)
    place = begin + tl.arange(0, 2 * PIECE)
    row = tl.load(rows + place, mask=place < M, other=R)
    before = tl.load(rows + place - 1, mask=(place > 0) & (place < M), other=-1)
    ahead = place + (2 * PIECE - 1)
    is_start = (row != before) & (row < R) & (tl.load(rows + ahead, mask=ahead < M, other=R) == row)
    start = tl.max(tl.where(is_start, place, -1), axis=0)
    if start >= 0:
        found = tl.load(rows + start).to(tl.int64)
        end = _first_place(rows, found + 1, start, M)
        update_run(
            table, first, second, grad_output, words, pieces, grad_scores, squares, squares, shared, keys,
            found, start, end, end - 1, D, first_column, 0, row_offset, column_offset,
            K, PIECE, COLUMNS, IS_ADDED, HAS_PRODUCTS, False, tl.int64, RULE, IS_UPDATED, SQUARES, False,
        )  # fmt: skip


@triton.jit
def _sum_long_piece(
    table, grad_output, rows, words, pieces, grad_scores,
    M, R, D, first_column,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Sum the piece that starts in one window of PIECE lookups, where there is one; see `store_piece`."""
    window = tl.program_id(0).to(tl.int64)
    last = window * PIECE + PIECE - 1
    row = tl.load(rows + last)
    before = tl.load(rows + last - PIECE, mask=window > 0, other=-1)
    after = tl.load(rows + last + PIECE, mask=last + PIECE < M, other=R)
    # A run of two pieces reaches one of them, before or after any of its places.
    if (row < R) & ((before == row) | (after == row)):
        wide_row = row.to(tl.int64)
        start = _first_place(rows, wide_row, 0, last)
        store_piece(
            table, grad_output, words, pieces, grad_scores,
            wide_row, start, _first_place(rows, wide_row + 1, last, M), window, D, first_column,
            K, PIECE, COLUMNS, IS_ADDED, HAS_PRODUCTS, False, tl.int64,
        )  # fmt: skip


@triton.jit
def _first_place(rows, row, low, high):
    """Return the first place in [low, high) whose row is not below `row`, or `high`."""
    low = tl.cast(low, tl.int64)
    high = tl.cast(high, tl.int64)
    while low < high:
        middle = (low + high) // 2
        if tl.load(rows + middle).to(tl.int64) < row:
            low = middle + 1
        else:
            high = middle
    return low
