"""ragged_gradient on a GPU: lookups sorted by row, one program a row and slice of columns, no atomics.

A program walks its row's run in the order of the list, so sums repeat bit for bit. A run twice as long as a piece or
longer is cut into pieces, counted from its start, which a program each sums: of words, the most frequent is a tenth of
all. A lookup's score gradient has a program of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, device_of, next_power_of_2
from mfdist.kernels.triton_rows import as_fp32

_COLUMNS = 512
#: Lookups of a run whose grad_output is read together.
_ENTRIES = 4
#: Lookups of a piece.
_PIECE = 256


def ragged_gradient(
    table: Tensor,
    row_ids: Tensor,
    tokens: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    dtype: torch.dtype,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ([U] int64, [U, D] in `dtype`, [M] fp32); see `mfdist.kernels.ragged_gradient`."""
    dim = table.shape[1]
    table, grad_output, scores = table.contiguous(), grad_output.contiguous(), scores.contiguous()
    by_row, order = torch.sort(row_ids, stable=True)
    rows, counts = torch.unique_consecutive(by_row, return_counts=True)
    ends = counts.cumsum(0)
    grad_rows = table.new_empty(rows.numel(), dim, dtype=dtype)
    grad_scores = scores.new_empty(scores.numel())
    if dim:
        columns = min(_COLUMNS, next_power_of_2(dim))
        slices = triton.cdiv(dim, columns)
        tokens, num_pieces = tokens.contiguous(), scores.numel() // _PIECE
        pieces = scores.new_empty(num_pieces, dim)
        lists = (scores, grad_output, tokens, order, ends)
        tile = (dim, _ENTRIES, columns, _PIECE)
        with device_of(table):
            if num_pieces:
                lasts = torch.arange(_PIECE - 1, num_pieces * _PIECE, _PIECE, device=ends.device)
                runs = torch.searchsorted(ends, lasts, right=True)
                _sum_piece[(num_pieces, slices)](*lists, runs, pieces, *tile, num_warps=1, **LAUNCH_OPTIONS)
            _sum_row[(rows.numel(), slices)](*lists, pieces, grad_rows, *tile, num_warps=1, **LAUNCH_OPTIONS)
            _multiply[(scores.numel(),)](
                table, row_ids.contiguous(), tokens, grad_output, grad_scores,
                dim, columns, num_warps=1, **LAUNCH_OPTIONS,
            )  # fmt: skip
    else:
        grad_scores.zero_()
    return rows.long(), grad_rows, grad_scores


@triton.jit
def _sum_piece(
    scores, grad_output, tokens, order, ends, runs, pieces,
    D, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Sum the piece of a long run that has the last lookup of one window of PIECE lookups; no other window has it."""
    window = tl.program_id(0).to(tl.int64)
    run = tl.load(runs + window)
    start = tl.load(ends + run - 1, mask=run > 0, other=0)
    end = tl.load(ends + run)
    first = start + (window * PIECE + PIECE - 1 - start) // PIECE * PIECE
    if (end - start >= 2 * PIECE) & (first + PIECE <= end):
        c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
        total = _with_lookups(total, scores, grad_output, tokens, order, first, first + PIECE, c, D, ENTRIES)
        tl.store(pieces + window * D + c, tl.sum(total, axis=0), mask=c < D)


@triton.jit
def _sum_row(
    scores, grad_output, tokens, order, ends, pieces, grad_rows,
    D, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Sum score · grad_output over one row's run, its pieces and what they leave, in ENTRIES interleaved parts."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends + row - 1, mask=row > 0, other=0)
    end = tl.load(ends + row)
    total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
    if end - start >= 2 * PIECE:
        window = start // PIECE  # its pieces are those of successive windows
        num_pieces = (end - start) // PIECE
        for first in range(0, num_pieces, ENTRIES):
            piece = first + tl.arange(0, ENTRIES)
            is_value = (piece < num_pieces)[:, None] & (c < D)[None, :]
            total += tl.load(pieces + (window + piece)[:, None] * D + c[None, :], mask=is_value, other=0.0)
        start += num_pieces * PIECE
    total = _with_lookups(total, scores, grad_output, tokens, order, start, end, c, D, ENTRIES)
    tl.store(grad_rows + row * D + c, tl.sum(total, axis=0).to(grad_rows.dtype.element_ty), mask=c < D)


@triton.jit
def _with_lookups(total, scores, grad_output, tokens, order, start, end, c, D, ENTRIES: tl.constexpr):
    """Return [ENTRIES, COLUMNS] with score · grad_output of the lookups at [start, end) added."""
    for first in range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        lookup = tl.load(order + entry, mask=entry < end, other=0)
        score = tl.load(scores + lookup, mask=entry < end, other=0.0)
        token = tl.load(tokens + lookup, mask=entry < end, other=0).to(tl.int64)
        is_value = (entry < end)[:, None] & (c < D)[None, :]
        grads = tl.load(grad_output + token[:, None] * D + c[None, :], mask=is_value, other=0.0)
        total += as_fp32(grads) * score[:, None]
    return total


@triton.jit
def _multiply(table, row_ids, tokens, grad_output, grad_scores, D, COLUMNS: tl.constexpr):
    """Write ⟨grad_output, row⟩ of one lookup."""
    lookup = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ids + lookup).to(tl.int64) * D
    token = tl.load(tokens + lookup).to(tl.int64) * D
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, D, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        values = as_fp32(tl.load(table + row + c, mask=c < D, other=0.0))
        total += values * as_fp32(tl.load(grad_output + token + c, mask=c < D, other=0.0))
    tl.store(grad_scores + lookup, tl.sum(total))
