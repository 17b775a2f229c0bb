"""Pieces: long runs of lookups are cut, and a program sums each piece, so that no frequent row's outlasts all others.

Where all rows are looked up often, the pieces are taken in the order of their tokens. Those at work together then read
the same part of grad_output, which stays in the second-level cache. The sums of pieces take four bytes a column of the
widest slice for every 64 lookups then, and for every 128 else.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_gradient.triton_order import Order, lookup_of
from mfdist.kernels.row_gradient.triton_slices import is_by_token
from mfdist.kernels.row_gradient.triton_sums import sum_lookups
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS
from mfdist.kernels.triton_rows import as_fp32

_LENGTH = 128
#: Where pieces go by token: shorter ones leave less of a run to its row's program, which goes over all tokens.
_LENGTH_BY_TOKEN = 64
#: Windows put in order together: all of a lookup k of 131 072 tokens.
_GROUP = 2048
#: Bits of a token's number that fit a word beside the place of a window in its group.
_TOKEN_BITS = 20


class Pieces(NamedTuple):
    """How runs are cut.

    Args:
        length: lookups of a piece.
        num_windows: programs that sum a piece, if one starts in their window of as many lookups.
        windows: [num_windows] int32, the window of each, -1 for none; None: as they lie.
        row_ids: of each lookup by its number, [N, K], where there is a code stride.
        code_stride: see gather_sum; None: `row_ids` [M] are of the lookups in their order.
    """

    length: int
    num_windows: int
    windows: Tensor | None
    row_ids: Tensor
    code_stride: int | None


def pieces_of(
    order: Order, num_tokens: int, num_lookups: int, num_rows: int, row_ids: Tensor, code_stride: int | None
) -> Pieces:
    """Return how the runs of R rows' lookups, which are numbered n · K + k, are cut.

    Args:
        order: of the lookups.
        num_tokens, num_lookups: N and K.
        num_rows: R.
        row_ids, code_stride: see `Pieces`.
    """
    num_ids = row_ids.numel()
    if not is_by_token(num_tokens, num_ids, num_rows):
        return Pieces(_LENGTH, num_ids // _LENGTH, None, row_ids, code_stride)
    num_windows = num_ids // _LENGTH_BY_TOKEN
    num_groups = triton.cdiv(num_windows, _GROUP)
    windows = row_ids.new_empty(num_groups * _GROUP, dtype=torch.int32)
    shift = max(0, num_tokens.bit_length() - _TOKEN_BITS)
    _order_windows[(num_groups,)](
        order.words, windows, num_tokens, num_lookups, num_windows, shift, _LENGTH_BY_TOKEN, _GROUP,
        num_warps=8, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return Pieces(_LENGTH_BY_TOKEN, windows.numel(), windows, row_ids, code_stride)


@triton.jit
def _order_windows(words, windows, N, K, num_windows, SHIFT, LENGTH: tl.constexpr, GROUP: tl.constexpr):
    """Write which windows of a group come first, second and so on by the tokens of their last lookups.

    Groups take turns: all their first windows lie together, then all their second ones. -1 stands for none.
    """
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, GROUP)
    window = group * GROUP + i
    word = tl.load(words + window * LENGTH + LENGTH - 1, mask=window < num_windows, other=-1)
    # The token of a bad id, or of no window, is taken for the last.
    token = tl.minimum(lookup_of(word).to(tl.int64) // K, N - 1)
    found = group * GROUP + (tl.sort((token >> SHIFT).to(tl.int32) * GROUP + i) & (GROUP - 1))
    at = i.to(tl.int64) * tl.num_programs(0) + group
    tl.store(windows + at, tl.where(found < num_windows, found, -1).to(tl.int32))


@triton.jit
def sum_piece(
    table, row_ids, grad_output, words, starts, ends, windows, pieces, grad_scores,
    D, S, first_column, R,
    K: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over the piece that starts in one window of PIECE lookups, into that row of `pieces`.

    row_ids and S: see `Pieces`.
    """
    window = tl.program_id(0).to(tl.int64)
    if windows is not None:
        window = tl.load(windows + window).to(tl.int64)
    last = window * PIECE + PIECE - 1
    if (last > 0) & (last < tl.load(ends + R - 1)):  # past it are bad ids
        word = tl.load(words + last)
        if word != -1:  # within the order they leave gaps
            if S is None:
                row = tl.load(row_ids + last).to(tl.int64)
            else:
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
def cut_pieces(start, end, PIECE: tl.constexpr):
    """Return where what is left of a run starts once its pieces are cut off."""
    return tl.where(end - start >= 2 * PIECE, end - (end - start) % PIECE, start)


@triton.jit
def add_pieces(total, pieces, start, cut, PIECE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the total [COLUMNS] and the sums of the pieces of [start, cut)."""
    for window in range(start // PIECE, start // PIECE + (cut - start) // PIECE):
        total += tl.load(pieces + tl.cast(window, tl.int64) * COLUMNS + tl.arange(0, COLUMNS))
    return total
