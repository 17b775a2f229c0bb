"""Slices: how many columns of a row one warp sums at a time, and what a launch over them takes. N tokens, D columns."""

from itertools import accumulate
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, at_most_registers, next_power_of_2

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
_NARROW_BYTES = 2
#: Of grad_output, what a program reads of a token where pieces are summed in the order of their tokens: then fewer
#: tokens are in use at a time, and columns need not be fewer.
_SPAN_BYTES = 1024
#: Lookups a row, on average, from which that shortens the time.
_LONG_RUN = 256
#: Lookups a row, on average, below which fused updates take rows by windows.
_SELDOM = 4


class Slice(NamedTuple):
    """Columns that are taken in one pass: a power of two of them, of which the last may lie past the row's end."""

    first: int
    columns: int


def widest(grad_output: Tensor, num_ids: int, num_rows: int, *, needs_squares: bool = False) -> int:
    """Return the most columns of [N, D] that a warp takes at a time.

    Args:
        grad_output: [N, D].
        num_ids: lookups of all tokens.
        num_rows: R.
        needs_squares: those of whole rows are wanted before any is updated, and of more slices more sums are kept.
    """
    num_tokens, dim = grad_output.shape
    if needs_squares:
        return _COLUMNS_EACH if dim % _MOST_COLUMNS else _MOST_COLUMNS
    if is_by_token(num_tokens, num_ids, num_rows):
        return _SPAN_BYTES // grad_output.itemsize
    is_short = grad_output.itemsize > _NARROW_BYTES and num_ids < _SHORT_RUN * num_rows
    most = _COLUMNS_EACH if is_short or dim % _MOST_COLUMNS else _MOST_COLUMNS
    cached = _CACHED_BYTES // (num_tokens * grad_output.itemsize)
    return min(most, max(_LEAST_COLUMNS, 1 << max(0, cached.bit_length() - 1)))


def is_by_token(num_tokens: int, num_ids: int, num_rows: int) -> bool:
    """Return whether pieces of runs are summed in the order of their tokens, N of them."""
    return num_ids >= _LONG_RUN * num_rows and num_tokens * _SPAN_BYTES >= _CACHED_BYTES


def is_seldom(num_ids: int, num_rows: int) -> bool:
    """Return whether rows are looked up so seldom that a fused update takes them by windows; see `triton_windows`."""
    return num_ids < _SELDOM * num_rows


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
