"""row_gradient on a GPU: lookups are sorted by row, then one program a row reads its tokens' grad_output once for both.

1. The order of the lookups, by row and within a row by token: see `triton_order`.
2. Runs of one row twice as long as a piece or longer are cut into pieces, which a program each sums.
3. Each row's program sums what is left of its run and adds the pieces. The row itself stays in registers, so the same
   read of grad_output gives score · grad_output for the row and ⟨grad_output, row⟩ for the lookup's score.

Rows wider than a warp's registers, or far from a power of two, are taken one slice of columns after the other.
No atomics: every sum has one program and a fixed order, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_gradient.triton_ordered import Ordered, ordered_lookups
from mfdist.kernels.row_gradient.triton_pieces import add_pieces, cut_pieces, sum_piece
from mfdist.kernels.row_gradient.triton_slices import is_seldom, reach, slices, warp_options, widest
from mfdist.kernels.row_gradient.triton_sums import sum_lookups
from mfdist.kernels.triton_launch import device_of
from mfdist.kernels.triton_rows import as_fp32


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
    ordered: Ordered | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ([R, D] in `dtype`, [R] bool, [N, K] fp32); see `mfdist.kernels.row_gradient.marked_row_gradient`."""
    grads, made, grad_scores = _row_gradient(table, row_ids, scores, grad_output, code_stride, name, dtype, ordered)
    is_read = grads.new_zeros(grads.shape[0], dtype=torch.bool) if made is None else made.order.ends > made.order.starts
    return grads, is_read, grad_scores


def order_lookups(row_ids: Tensor, scores: Tensor, num_rows: int, code_stride: int, name: str) -> Ordered | None:
    """Return the lookups in order, if that is how they are taken; see `mfdist.kernels.row_gradient.order_lookups`."""
    is_later = is_seldom(row_ids.numel(), num_rows)
    return None if is_later else ordered_lookups(row_ids, scores, num_rows, code_stride, name)


def _row_gradient(
    table: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    code_stride: int,
    name: str,
    dtype: torch.dtype,
    ordered: Ordered | None = None,
) -> tuple[Tensor, Ordered | None, Tensor]:
    """Return both gradients, and between them the lookups in order, if there are any."""
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    if not num_tokens * num_lookups * dim:
        no_grad_scores = torch.zeros_like(scores, memory_format=torch.contiguous_format)
        return table.new_zeros(num_rows, dim, dtype=dtype), None, no_grad_scores
    table, row_ids, grad_output = table.contiguous(), row_ids.contiguous(), grad_output.contiguous()
    grad_table = table.new_empty(num_rows, dim, dtype=dtype)
    with device_of(table):
        ordered = ordered or ordered_lookups(row_ids, scores, num_rows, code_stride, name)
        _sum(table, grad_output, ordered, grad_table)
    return grad_table, ordered, ordered.grad_scores


def _sum(table: Tensor, grad_output: Tensor, ordered: Ordered, grad_table: Tensor) -> None:
    """Fill both gradients, one slice of columns after the other."""
    num_rows, dim = table.shape
    order, cut, grad_scores = ordered
    parts = slices(dim, widest(grad_output, order.words.numel(), num_rows))
    pieces = grad_scores.new_empty(cut.num_windows * max(part.columns for part in parts))
    for first, columns in parts:
        options = warp_options(columns, grad_output)
        constants = (grad_scores.shape[1], cut.length, columns, first > 0, True, *reach(grad_output, first + columns))
        if cut.num_windows:
            sum_piece[(cut.num_windows,)](
                table, cut.row_ids, grad_output, *order, cut.windows, pieces, grad_scores,
                dim, cut.code_stride, first, num_rows, *constants, **options,
            )  # fmt: skip
        _sum_row[(num_rows,)](
            table, grad_output, *order, pieces, grad_table, grad_scores, dim, first, *constants, **options
        )


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
    if end > start:
        values = as_fp32(tl.load(table + row * D + c, mask=is_column, other=0.0, eviction_policy="evict_first"))
        cut = cut_pieces(start, end, PIECE)
        total = sum_lookups(
            grad_output, words, grad_scores, values, first_column, is_column,
            cut, end, D, K, COLUMNS, IS_ADDED, HAS_PRODUCTS, IS_WHOLE, OFFSET,
        )  # fmt: skip
        _store(grad_table + row * D + c, add_pieces(total, pieces, start, cut, PIECE, COLUMNS), is_column)
    else:
        _store(grad_table + row * D + c, tl.zeros([COLUMNS], tl.float32), is_column)


@triton.jit
def _store(at, total, is_column):
    """Write a row's sum, from either branch of a condition.

    Handed from both to one place, the compiler would take fewer registers for it (128 of 168 for 1024 columns in fp32)
    and read less at a time: half as long again.
    """
    tl.store(at, total.to(at.dtype.element_ty), mask=is_column, eviction_policy="evict_first")
