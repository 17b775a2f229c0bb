"""row_gradient on a GPU: the lookups are sorted by row, and one program sums a tile of columns of one row. No atomics.

1. Keys: every lookup's row, with a bad id's sent past the end. 2. A stable sort keeps the tokens of a row in order.
3. A binary search finds where each row's run ends. 4. Each row is summed over its run. 5. The scores' gradients are a
pass of their own over the tokens. Every sum has one program and a fixed order, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_id_check import error_word
from mfdist.kernels.triton_ids import checked
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, device_of, must_check, next_power_of_2

_KEYS_TOGETHER = 1024
_ROW_COLUMNS = 128
_PRODUCT_COLUMNS = 128
_PRODUCT_LOOKUPS = 16


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
    is_checked = must_check(row_ids, limit)
    with device_of(table):
        keys = row_ids.new_empty(row_ids.numel(), dtype=_key_dtype(num_rows, is_checked=is_checked))
        _make_keys[(triton.cdiv(row_ids.numel(), _KEYS_TOGETHER),)](
            row_ids, keys, word,
            row_ids.numel(), num_lookups, code_stride, limit, num_rows,
            _KEYS_TOGETHER, is_checked, **LAUNCH_OPTIONS,
        )  # fmt: skip
        by_row, order = torch.sort(keys, stable=True)
        ends = torch.searchsorted(by_row, torch.arange(num_rows, dtype=keys.dtype, device=keys.device), right=True)
        columns = min(_ROW_COLUMNS, next_power_of_2(dim))
        entries = max(2, min(16, next_power_of_2(row_ids.numel() // num_rows + 1)))
        _sum_row[(num_rows, triton.cdiv(dim, columns))](
            scores,
            grad_output,
            order,
            ends,
            grad_table,
            num_lookups,
            dim,
            entries,
            columns,
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
        columns = min(_PRODUCT_COLUMNS, next_power_of_2(dim))
        lookups = min(_PRODUCT_LOOKUPS, next_power_of_2(num_lookups))
        _multiply_rows[(num_tokens, triton.cdiv(num_lookups, lookups))](
            table, row_ids, grad_output, grad_scores, word,
            num_lookups, dim, code_stride, limit,
            lookups, columns, is_checked, num_warps=4, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return grad_table, grad_scores


def _key_dtype(num_rows: int, *, is_checked: bool) -> torch.dtype:
    """Return the narrowest dtype, which sorts fastest, for all rows and, if ids are checked, the one past them."""
    largest = num_rows if is_checked else num_rows - 1
    return next(kind for kind in (torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(kind).max)


@triton.jit
def _make_keys(
    row_ids, keys, error_word,
    num_ids, K, S, limit, R,
    IDS: tl.constexpr, IS_CHECKED: tl.constexpr,
):  # fmt: skip
    """Write each lookup's row, or R for one outside the table."""
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    is_id = at < num_ids
    ids = tl.load(row_ids + at, mask=is_id, other=0).to(tl.int64)
    row = at % K * S + ids
    if IS_CHECKED:
        row = tl.where(checked(ids, is_id, limit, error_word), row, R)
    tl.store(keys + at, row.to(keys.dtype.element_ty), mask=is_id)


@triton.jit
def _sum_row(
    scores, grad_output, order, ends, grad_table, K, D, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum score · grad_output over one row's run of lookups, ENTRIES at a time; a row without any gets zeros."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = c < D
    start = tl.load(ends + row - 1, mask=row > 0, other=0)
    end = tl.load(ends + row)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        is_entry = entry < end
        lookup = tl.load(order + entry, mask=is_entry, other=0)
        score = tl.load(scores + lookup, mask=is_entry, other=0.0)
        at = (lookup // K)[:, None] * D + c[None, :]
        grads = tl.load(grad_output + at, mask=is_entry[:, None] & is_column[None, :], other=0.0)
        total += tl.sum(grads.to(tl.float32) * score[:, None], axis=0)
    tl.store(grad_table + row * D + c, total.to(grad_table.dtype.element_ty), mask=is_column)


@triton.jit
def _multiply_rows(
    table, row_ids, grad_output, grad_scores, error_word,
    K, D, S, limit,
    LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, IS_CHECKED: tl.constexpr,
):  # fmt: skip
    """Write ⟨grad_output[n], row⟩ for LOOKUPS lookups of one token, NaN where the id is bad."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * LOOKUPS + tl.arange(0, LOOKUPS)
    is_lookup = k < K
    ids = tl.load(row_ids + n * K + k, mask=is_lookup, other=0).to(tl.int64)
    is_read = is_lookup
    if IS_CHECKED:
        is_read = checked(ids, is_lookup, limit, error_word)
    start = (ids + k.to(tl.int64) * S) * D
    totals = tl.zeros([LOOKUPS, COLUMNS], tl.float32)
    for first in range(0, D, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        is_column = c < D
        grads = tl.load(grad_output + n * D + c, mask=is_column, other=0.0).to(tl.float32)
        rows = tl.load(table + start[:, None] + c[None, :], mask=is_read[:, None] & is_column[None, :], other=0.0)
        totals += rows.to(tl.float32) * grads[None, :]
    products = tl.where(is_read, tl.sum(totals, axis=1), float("nan"))
    tl.store(grad_scores + n * K + k, products, mask=is_lookup)
