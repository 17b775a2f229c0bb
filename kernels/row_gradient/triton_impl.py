"""row_gradient on a GPU: lookups are sorted by row, then one program a row reads its tokens' grad_output once for both.

1. The order of the lookups, by row and within a row by token: see `triton_order`.
2. Runs of one row twice as long as a piece or longer are cut into pieces, which a program each sums.
3. Each row's program sums what is left of its run and adds the pieces. The row itself stays in registers, so the same
   read of grad_output gives score · grad_output for the row and ⟨grad_output, row⟩ for the lookup's score.

Rows wider than a warp's registers, or far from a power of two, are taken one slice of columns after the other.
No atomics: every sum has one program and a fixed order, so results repeat bit for bit.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_gradient.triton_order import Order, lookup_of, order_by_row, score_of
from mfdist.kernels.row_id_check import can_be_bad, error_word
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, at_most_registers, device_of, next_power_of_2
from mfdist.kernels.triton_rows import as_fp32

#: Columns to a warp, so that nothing waits for another warp: the most that its registers hold, for rows that are cut
#: into nothing else, and half of it for others. A wide slice beside narrower ones takes longer than narrow ones alone.
_MOST_COLUMNS = 1024
_COLUMNS_EACH = 512
#: Where runs are short, the rows themselves leave grad_output less of the second-level cache: fewer columns of it at a
#: time, if it is in fp32.
_SHORT_RUN = 32
#: A pass takes about as long for columns past the last as for others: less than a quarter may be that, but that a slice
#: of so many columns is not cut further, because every pass reads all words.
_LEAST_COLUMNS = 256
#: Of all tokens' grad_output in one slice, what stays in the second-level cache while every row's run reads it: with
#: twice as much, an H200 takes a third longer for each column.
_CACHED_BYTES = 64 << 20
#: Triton knows of a number whether it is a multiple of this, and from that what is aligned.
_ALIGNED = 16
#: Registers to a thread of so many columns in bf16 or fp16; more would leave room for fewer warps.
_REGISTERS = {1024: 96, 512: 64}
#: Lookups of a piece: without pieces one frequent row's program would outlast all others.
PIECE = 128
_NARROW_BYTES = 2
#: Slices of so many columns or more are summed two lookups at a time; narrower ones by tiles of so many elements.
_ELEMENTS: tl.constexpr = tl.constexpr(512)


def row_gradient(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int, name: str
) -> tuple[Tensor, Tensor]:
    """Return ([R, D] in table.dtype, [N, K] fp32); see `mfdist.kernels.row_gradient`."""
    grad_table, _, grad_scores = _row_gradient(table, row_ids, scores, grad_output, code_stride, name, table.dtype)
    return grad_table, grad_scores


def marked_row_gradient(
    table: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    code_stride: int,
    name: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ([R, D] in `dtype`, [R] bool, [N, K] fp32); see `mfdist.kernels.row_gradient.marked_row_gradient`."""
    grads, order, grad_scores = _row_gradient(table, row_ids, scores, grad_output, code_stride, name, dtype)
    is_read = grads.new_zeros(grads.shape[0], dtype=torch.bool) if order is None else order.ends > order.starts
    return grads, is_read, grad_scores


def _row_gradient(
    table: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    code_stride: int,
    name: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Order | None, Tensor]:
    """Return both gradients, and between them the order of the lookups, if there are any."""
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    if not num_tokens * num_lookups * dim:
        no_grad_scores = torch.zeros_like(scores, memory_format=torch.contiguous_format)
        return table.new_zeros(num_rows, dim, dtype=dtype), None, no_grad_scores
    table, row_ids, scores = table.contiguous(), row_ids.contiguous(), scores.contiguous()
    grad_output = grad_output.contiguous()
    grad_table = table.new_empty(num_rows, dim, dtype=dtype)
    grad_scores = scores.new_empty(num_tokens, num_lookups)
    limit = code_stride or num_rows
    word = error_word(name, limit, is_code=code_stride > 0)
    with device_of(table):
        is_checked = can_be_bad(row_ids, limit)
        order = order_by_row(row_ids, scores, grad_scores, word, num_rows, code_stride, is_checked=is_checked)
        _sum(table, row_ids, grad_output, order, grad_table, grad_scores, code_stride)
    return grad_table, order, grad_scores


def _sum(
    table: Tensor,
    row_ids: Tensor,
    grad_output: Tensor,
    order: Order,
    grad_table: Tensor,
    grad_scores: Tensor,
    code_stride: int,
) -> None:
    """Fill both gradients, one slice of columns after the other."""
    num_rows, dim = table.shape
    parts = slices(dim, widest(grad_output, is_short=has_short_runs(row_ids, num_rows, grad_output)))
    num_pieces = row_ids.numel() // PIECE
    pieces = grad_scores.new_empty(num_pieces * max(part.columns for part in parts))
    for first, columns in parts:
        options = warp_options(columns, grad_output)
        constants = (row_ids.shape[1], PIECE, columns, first > 0, True, *reach(grad_output, first + columns))
        if num_pieces:
            sum_piece[(num_pieces,)](
                table, row_ids, grad_output, *order, pieces, grad_scores,
                dim, code_stride, first, num_rows, *constants, **options,
            )  # fmt: skip
        _sum_row[(num_rows,)](
            table, grad_output, *order, pieces, grad_table, grad_scores, dim, first, *constants, **options
        )


def has_short_runs(row_ids: Tensor, num_rows: int, grad_output: Tensor) -> bool:
    """Return whether rows are looked up so seldom that reading them counts beside reading a wide grad_output."""
    return grad_output.itemsize > _NARROW_BYTES and row_ids.numel() < _SHORT_RUN * num_rows


class Slice(NamedTuple):
    """Columns that are taken in one pass: a power of two of them, of which the last may lie past the row's end."""

    first: int
    columns: int


def widest(grad_output: Tensor, *, is_short: bool, is_cached: bool = True) -> int:
    """Return the most columns of [N, D] that a warp takes at a time; is_cached: and that the cache holds of all."""
    num_tokens, dim = grad_output.shape
    most = _COLUMNS_EACH if is_short or dim % _MOST_COLUMNS else _MOST_COLUMNS
    if not is_cached:
        return most
    cached = _CACHED_BYTES // (num_tokens * grad_output.itemsize)
    return min(most, max(_LEAST_COLUMNS, 1 << max(0, cached.bit_length() - 1)))


def slices(dim: int, most: int) -> list[Slice]:
    """Return the slices of rows `dim` wide, none with more than `most` columns.

    The narrowest comes first, and so the widest last, which is the one that row-wise Adagrad need not keep sums of; but
    a slice with columns past the row's end is the last, and so is one that would leave others at places whose
    addresses are not known to be aligned.
    """
    widths: list[int] = []
    left = dim
    while left > 0:
        columns = min(most, next_power_of_2(left))
        if columns > _LEAST_COLUMNS and 4 * left <= 3 * columns:
            columns //= 2
        widths.append(columns)
        left -= columns
    if not left and not widths[-1] % _ALIGNED:
        widths.reverse()
    return [Slice(first, columns) for first, columns in zip(accumulate(widths, initial=0), widths, strict=False)]


def reach(grad_output: Tensor, end: int) -> tuple[bool, Any]:
    """Return whether a slice up to column `end` has no columns past the row's, and what holds any place in grad_output.

    With the first no load needs a mask, and with 32 bits its address takes a third of the instructions.
    """
    return end <= grad_output.shape[1], tl.int32 if grad_output.numel() < 1 << 31 else tl.int64


def warp_options(columns: int, grad_output: Tensor) -> dict[str, Any]:
    """Return the launch options of programs of one warp that sum so many columns."""
    is_aligned = grad_output.shape[1] % _ALIGNED == 0  # else addresses take what the cap leaves
    is_capped = columns in _REGISTERS and grad_output.itemsize == _NARROW_BYTES and is_aligned
    return {"num_warps": 1, **LAUNCH_OPTIONS, **(at_most_registers(_REGISTERS[columns]) if is_capped else {})}


@triton.jit
def sum_piece(
    table, row_ids, grad_output, words, starts, ends, pieces, grad_scores,
    D, S, first_column, R,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over the piece that starts in one window of PIECE lookups, into that row of `pieces`."""
    window = tl.program_id(0).to(tl.int64)
    last = window * PIECE + PIECE - 1
    if last < tl.load(ends + R - 1):  # past it are bad ids
        word = tl.load(words + last)
        if word != -1:  # within the order they leave gaps
            lookup = lookup_of(word)
            row = tl.load(row_ids + lookup).to(tl.int64) + (lookup % K).to(tl.int64) * S
            store_piece(
                table, grad_output, words, pieces, grad_scores,
                row, tl.load(starts + row).to(tl.int64), tl.load(ends + row).to(tl.int64), window, D, first_column,
                K, PIECE, COLUMNS, IS_ADDED, HAS_PRODUCTS, IS_WHOLE, OFFSET,
            )  # fmt: skip


@triton.jit
def store_piece(
    table, grad_output, words, pieces, grad_scores,
    row, start, end, window, D, first_column,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Store the sum of the piece that starts in a window, if there is one.

    Pieces count from where their run starts, so a run's pieces start in successive windows, and no window has two. The
    last lookup of the window, which is one of the row in [start, end), belongs to the piece.
    """
    first = start + (window * PIECE + PIECE - 1 - start) // PIECE * PIECE
    if (end - start >= 2 * PIECE) & (first + PIECE <= end):
        c = first_column + tl.arange(0, COLUMNS)
        is_column = c < D
        values = as_fp32(tl.load(table + row * D + c, mask=is_column, other=0.0))
        total = sum_lookups(
            grad_output, words, grad_scores, values, first_column, is_column,
            first, first + PIECE, D, K, COLUMNS, IS_ADDED, HAS_PRODUCTS, IS_WHOLE, OFFSET,
        )  # fmt: skip
        tl.store(pieces + window * COLUMNS + tl.arange(0, COLUMNS), total)


@triton.jit
def _sum_row(
    table, grad_output, words, starts, ends, pieces, grad_table, grad_scores,
    D, first_column,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over one row's run of lookups; a row without any gets zeros."""
    row = tl.program_id(0).to(tl.int64)
    c = first_column + tl.arange(0, COLUMNS)
    is_column = c < D
    start = tl.load(starts + row)
    end = tl.load(ends + row)
    total = tl.zeros([COLUMNS], tl.float32)
    if end > start:
        values = as_fp32(tl.load(table + row * D + c, mask=is_column, other=0.0, eviction_policy="evict_first"))
        cut = cut_pieces(start, end, PIECE)
        total = sum_lookups(
            grad_output, words, grad_scores, values, first_column, is_column,
            cut, end, D, K, COLUMNS, IS_ADDED, HAS_PRODUCTS, IS_WHOLE, OFFSET,
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
    grad_output, words, grad_scores, values, first_column, is_column,
    start, end, D,
    K: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Return the sum [COLUMNS] of score · grad_output over [start, end) of the order.

    Each lookup's ⟨grad_output, values⟩ is written to grad_scores if HAS_PRODUCTS, or added to what an earlier slice
    left there. The row's pieces may leave nothing to sum, but the word before `end` is always one of the row's, and is
    read in place of any past it.
    """
    IS_BEGUN: tl.constexpr = HAS_PRODUCTS and IS_ADDED
    if COLUMNS >= _ELEMENTS:
        total = _sum_pairs(
            grad_output, words, grad_scores, values, first_column, is_column,
            start, end, D, K, COLUMNS, IS_BEGUN, HAS_PRODUCTS, IS_WHOLE, OFFSET,
        )  # fmt: skip
    else:
        total = _sum_tiles(
            grad_output, words, grad_scores, values, first_column, is_column,
            start, end, D, K, _ELEMENTS // COLUMNS, COLUMNS, IS_BEGUN, HAS_PRODUCTS, IS_WHOLE, OFFSET,
        )  # fmt: skip
    return total


@triton.jit
def _sum_pairs(
    grad_output, words, grad_scores, values, first_column, is_column,
    start, end, D,
    K: tl.constexpr, COLUMNS: tl.constexpr, IS_BEGUN: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Sum wide slices two lookups at a time: both are read before either is summed, and the next two words before both.

    Two are what registers hold, and their chains of additions, which have to wait for each step, go on side by side.
    """
    total = tl.zeros([COLUMNS], tl.float32)
    last = tl.maximum(end - 1, 0)  # `end` is positive: told so, the compiler's loop is shorter
    word = _words_at(words, start, last)
    other = _words_at(words, start + 1, last)
    for place in range(start, end - 1, 2):
        next_word = _words_at(words, place + 2, last)
        next_other = _words_at(words, place + 3, last)
        grads, product = _parts_of(
            grad_output, grad_scores, word, first_column, is_column, D, K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET
        )
        more, other_product = _parts_of(
            grad_output, grad_scores, other, first_column, is_column, D, K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET
        )
        total = _add_lookup(total, word, grads, values, product, grad_scores, IS_BEGUN, HAS_PRODUCTS)
        total = _add_lookup(total, other, more, values, other_product, grad_scores, IS_BEGUN, HAS_PRODUCTS)
        word, other = next_word, next_other
    if (end - start) % 2 == 1:
        grads, product = _parts_of(
            grad_output, grad_scores, word, first_column, is_column, D, K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET
        )
        total = _add_lookup(total, word, grads, values, product, grad_scores, IS_BEGUN, HAS_PRODUCTS)
    return total


@triton.jit
def _parts_of(
    grad_output, grad_scores, word, first_column, is_column, D,
    K: tl.constexpr, COLUMNS: tl.constexpr, IS_BEGUN: tl.constexpr, IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Return the grad_output [COLUMNS] of one lookup, or [LOOKUPS, COLUMNS] of several, and score gradients so far."""
    lookup = lookup_of(word)
    token = (lookup // K).to(OFFSET)
    c = tl.arange(0, COLUMNS)
    if len(word.shape) == 0:
        # One address, from which those of all threads and of their columns lie at distances that are constants.
        places = grad_output + (token * D + first_column).to(tl.int64) + c
    else:
        places = grad_output + (token[:, None] * D + (first_column + c)[None, :])
    grads = tl.load(places) if IS_WHOLE else tl.load(places, mask=is_column, other=0.0)
    product = tl.load(grad_scores + lookup) if IS_BEGUN else 0.0
    return grads, product


@triton.jit
def _add_lookup(total, word, grads, values, product, grad_scores, IS_BEGUN: tl.constexpr, HAS_PRODUCTS: tl.constexpr):
    """Return the total with one lookup added, and write its score gradient."""
    wide = as_fp32(grads)
    if HAS_PRODUCTS:
        found = tl.sum(wide * values, axis=0)
        tl.store(grad_scores + lookup_of(word), found + product if IS_BEGUN else found)
    return total + wide * score_of(word)


@triton.jit
def _sum_tiles(
    grad_output, words, grad_scores, values, first_column, is_column,
    start, end, D,
    K: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, IS_BEGUN: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Sum narrow slices LOOKUPS at a time; while some are summed, what belongs to the next ones is on its way."""
    i = tl.arange(0, LOOKUPS)
    total = tl.zeros([LOOKUPS, COLUMNS], tl.float32)
    last = tl.maximum(end - 1, 0)
    word = _words_at(words, start + i, last)
    next_word = _words_at(words, start + LOOKUPS + i, last)
    grads, product = _parts_of(
        grad_output, grad_scores, word, first_column, is_column[None, :], D, K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET
    )
    for place in range(start, end, LOOKUPS):
        next_grads, next_product = _parts_of(
            grad_output, grad_scores, next_word, first_column, is_column[None, :], D,
            K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET,
        )  # fmt: skip
        later_word = _words_at(words, place + 2 * LOOKUPS + i, last)
        is_lookup = place + i < end
        wide = as_fp32(grads)
        if HAS_PRODUCTS:
            found = product + tl.sum(wide * values[None, :], axis=1)
            tl.store(grad_scores + lookup_of(word), found, mask=is_lookup)
        total += wide * tl.where(is_lookup, score_of(word), 0.0)[:, None]
        word, grads, product, next_word = next_word, next_grads, next_product, later_word
    return tl.sum(total, axis=0)


@triton.jit
def _words_at(words, places, last):
    """Return the words at places up to `last`, or that one."""
    return tl.load(words + tl.minimum(places, last))
