"""Passes of a fused update over slices of columns, and what a program does with one row's run of lookups in one.

Rows wider than a slice take a pass for each. Row-wise Adagrad, which needs the square of a row's whole gradient, goes
over the slices adding up squares, updates the last one when they are complete, and then goes over the others once more:
from their sums, where those were kept, or else summing again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_gradient.triton_pieces import add_pieces, cut_pieces
from mfdist.kernels.row_gradient.triton_slices import Slice
from mfdist.kernels.row_gradient.triton_sums import sum_lookups
from mfdist.kernels.row_update.triton_rule import ROWWISE_ADAGRAD, accumulate, load_constants, update_row
from mfdist.kernels.triton_rows import as_fp32

#: What a pass does with the gradient's squares: uses its own, begins a sum, adds to it, completes it, or has used it.
OWN, BEGUN, ADDED, COMPLETED, KNOWN = range(5)
_OWNS: tl.constexpr = tl.constexpr(OWN)
_BEGINS: tl.constexpr = tl.constexpr(BEGUN)
_KNOWS: tl.constexpr = tl.constexpr(KNOWN)


class Pass(NamedTuple):
    """One pass over a slice of columns: what is done besides summing the rows' gradients."""

    first_column: int
    columns: int
    has_products: bool  # score gradients
    is_updated: bool
    squares: int
    is_last_product: bool = False


def passes(parts: Sequence[Slice], *, needs_squares: bool) -> list[Pass]:
    """Return the passes that update all slices."""
    *others, last = parts
    if not others or not needs_squares:
        return [Pass(*part, True, True, OWN, part == last) for part in parts]
    looks = [Pass(*part, True, False, ADDED if part.first else BEGUN) for part in others]
    return [*looks, Pass(*last, True, True, COMPLETED, True), *(Pass(*part, False, True, KNOWN) for part in others)]


def two_states(state: list[Tensor], table: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors, the table in place of states that the rule does not have."""
    first, second = (*state, table, table)[:2]
    return first, second


@triton.jit
def update_run(
    table, first, second, grad_output, words, pieces, grad_scores, squares, sums, shared, keys,
    row, start, end, place, D, first_column, num_kept, row_offset, column_offset,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
    RULE: tl.constexpr, IS_UPDATED: tl.constexpr, SQUARES: tl.constexpr, IS_KEPT: tl.constexpr,
):  # fmt: skip
    """Sum one row's run of lookups over a slice of columns, and update the slice by it; squares[place] is the row's.

    IS_KEPT: a slice that is not updated has its sum written to the row's place in `sums`, num_kept columns wide.
    """
    c = first_column + tl.arange(0, COLUMNS)
    is_column = c < D
    values = as_fp32(tl.load(table + row * D + c, mask=is_column, other=0.0, eviction_policy="evict_first"))
    accumulated = 0.0
    if RULE == ROWWISE_ADAGRAD:  # before the sum, whose stores would keep it waiting
        accumulated = tl.load(first + row)
    cut = cut_pieces(start, end, PIECE)
    gradient = sum_lookups(
        grad_output, words, grad_scores, values, first_column, is_column,
        cut, end, D, K, COLUMNS, IS_ADDED, HAS_PRODUCTS, IS_WHOLE, OFFSET,
    )  # fmt: skip
    gradient = add_pieces(gradient, pieces, start, cut, PIECE, COLUMNS)
    if IS_KEPT and not IS_UPDATED:
        tl.store(sums + tl.cast(place, tl.int64) * num_kept + c, gradient, mask=is_column)
    finish_row(
        table, first, second, squares, row, place, c, is_column, values, gradient, accumulated,
        load_constants(shared, keys, RULE), D, row_offset, column_offset, RULE, IS_UPDATED, SQUARES,
    )  # fmt: skip


@triton.jit
def finish_row(
    table, first, second, squares, row, place, c, is_column, values, gradient, accumulated,
    constants, D, row_offset, column_offset,
    RULE: tl.constexpr, IS_UPDATED: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Do with a slice's gradient [COLUMNS] what the pass is for; squares[place] is the row's."""
    known = tl.load(squares + place) if SQUARES > _BEGINS else 0.0
    if SQUARES == _KNOWS:
        # The state has them already; they only tell once more whether the row is to be left alone.
        square = known
    else:
        square = known + tl.sum(gradient * gradient, axis=0) / D
        if SQUARES != _OWNS:
            tl.store(squares + place, square)
        if RULE == ROWWISE_ADAGRAD and IS_UPDATED:
            accumulated = accumulate(accumulated, square, constants)
    if IS_UPDATED:
        update_row(
            table, first, second, row, c, is_column, values, gradient, square,
            accumulated, constants, D, row_offset, column_offset, RULE,
        )  # fmt: skip
