"""gather_sum on a GPU: one program sums a tile of tokens × columns in fp32 registers.

- Tables whose slice of columns fits the second-level cache: programs are ordered so that all tokens pass one slice
  before the next one starts, and most reads are cache hits.
- Larger tables: whole rows, a long contiguous read each.
- Few tokens: the lookups of one token are read side by side, because there is no other work to hide the latency.

Each output element is summed by one program in a fixed order, so results repeat bit for bit. Quantised rows have a
scale each, with which their scores are multiplied; their values are read as fp32 like all others.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_id_check import error_word
from mfdist.kernels.triton_ids import checked
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, device_of, must_check, next_power_of_2
from mfdist.kernels.triton_rows import as_fp32, weighted

_SLICE_COLUMNS = 64
#: A slice of this size stays in the second-level cache of an A100 or H100 while others stream through.
_SLICE_BYTES = 24 << 20
#: One lookup's part of a slice, if no larger, is found in the first-level cache now and then: more tokens a program.
_NEAR_BYTES = 64 << 10
_UNROLLED = 4
_FEW_TOKENS = 64
_FEW_LOOKUPS = 64
_FEW_COLUMNS = 32
_FEW_WARPS = 2


def gather_sum(
    table: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    code_stride: int,
    name: str,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return [N, D] in `dtype`, or else table.dtype; see `mfdist.kernels.gather_sum`.

    A table of int8, or of the bits of e4m3 as uint8, needs both: `scales` [R] in fp32, and the dtype.
    """
    num_rows, dim = table.shape
    num_tokens, num_lookups = row_ids.shape
    dtype = dtype or table.dtype
    if not num_tokens * num_lookups * dim:
        return table.new_zeros(num_tokens, dim, dtype=dtype)
    table, row_ids, scores = table.contiguous(), row_ids.contiguous(), scores.contiguous()
    out = table.new_empty(num_tokens, dim, dtype=dtype)
    limit = code_stride or num_rows
    word = error_word(name, limit, is_code=code_stride > 0)
    sizes: tuple[Any, ...] = (num_tokens, num_lookups, dim, code_stride, limit)
    is_checked = must_check(row_ids, limit)
    with device_of(table):
        if num_tokens <= _FEW_TOKENS:
            columns = min(_FEW_COLUMNS, next_power_of_2(dim))
            lookups = min(_FEW_LOOKUPS, next_power_of_2(num_lookups))
            _sum_few[(num_tokens, triton.cdiv(dim, columns))](
                table, scales, row_ids, scores, out, word, *sizes,
                lookups, columns, is_checked, num_warps=_FEW_WARPS, **LAUNCH_OPTIONS,
            )  # fmt: skip
        else:
            tokens, columns, warps = tile(num_rows, limit, dim, table.itemsize)
            offset = tl.int32 if limit * dim < 1 << 31 else tl.int64
            _sum_tile[(triton.cdiv(num_tokens, tokens), triton.cdiv(dim, columns))](
                table, scales, row_ids, scores, out, word, *sizes,
                tokens, columns, _UNROLLED, offset, is_checked, num_warps=warps, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return out


def tile(num_rows: int, limit: int, dim: int, itemsize: int) -> tuple[int, int, int]:
    """Return tokens and columns of a program's tile, and its warps."""
    columns = min(_SLICE_COLUMNS, next_power_of_2(dim))
    if num_rows * columns * itemsize <= _SLICE_BYTES:
        return 8 if limit * columns * itemsize <= _NEAR_BYTES else 4, columns, 1
    columns = min(1024, next_power_of_2(dim))
    return max(1, 1024 // columns), columns, 4


@triton.jit
def _sum_tile(
    table, scales, row_ids, scores, out, error_word,
    N, K, D, S, limit,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr,
    OFFSET: tl.constexpr, IS_CHECKED: tl.constexpr,
):  # fmt: skip
    """Sum K rows for TOKENS tokens in COLUMNS columns, in the order k = 0..K-1; an OFFSET holds limit · D."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token = n < N
    is_column = c < D
    part = table
    part_scales = scales
    # A store inside the loop would keep later loads from starting before it, so the worst id waits.
    worst = tl.zeros([TOKENS], tl.int64)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for k in tl.range(0, K, loop_unroll_factor=UNROLLED):
        ids = tl.load(row_ids + n * K + k, mask=is_token, other=0)
        score = tl.load(scores + n * K + k, mask=is_token, other=0.0)
        is_read = is_token
        if IS_CHECKED:
            is_read = is_token & (ids >= 0) & (ids < limit)
            worst = tl.where(is_token & (is_read == 0), ids.to(tl.int64), worst)
        at = ids.to(OFFSET)[:, None] * D + c[None, :]
        score = weighted(score, table, part_scales, ids.to(OFFSET), is_read)
        rows = tl.load(part + at, mask=is_read[:, None] & is_column[None, :], other=0)
        total += as_fp32(rows) * score[:, None]
        part += tl.cast(S, tl.int64) * D
        if scales is not None:
            part_scales += S
    if IS_CHECKED:
        is_clean = checked(worst, is_token, limit, error_word)
        total = tl.where(is_clean[:, None], total, float("nan"))
    tl.store(
        out + n[:, None] * D + c[None, :], total.to(out.dtype.element_ty), mask=is_token[:, None] & is_column[None, :]
    )


@triton.jit
def _sum_few(
    table, scales, row_ids, scores, out, error_word,
    N, K, D, S, limit,
    LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, IS_CHECKED: tl.constexpr,
):  # fmt: skip
    """Sum K rows for one token in COLUMNS columns, LOOKUPS of them read at a time and added up at the end."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = c < D
    worst = tl.zeros([LOOKUPS], tl.int64)
    totals = tl.zeros([LOOKUPS, COLUMNS], tl.float32)
    for first in range(0, K, LOOKUPS):
        k = first + tl.arange(0, LOOKUPS)
        is_lookup = k < K
        ids = tl.load(row_ids + n * K + k, mask=is_lookup, other=0).to(tl.int64)
        score = tl.load(scores + n * K + k, mask=is_lookup, other=0.0)
        is_read = is_lookup
        if IS_CHECKED:
            is_read = is_lookup & (ids >= 0) & (ids < limit)
            worst = tl.where(is_lookup & (is_read == 0), ids, worst)
        row = ids + k.to(tl.int64) * S
        score = weighted(score, table, scales, row, is_read)
        rows = tl.load(table + row[:, None] * D + c[None, :], mask=is_read[:, None] & is_column[None, :], other=0)
        totals += as_fp32(rows) * score[:, None]
    total = tl.sum(totals, axis=0)
    if IS_CHECKED:
        is_clean = checked(worst, worst == worst, limit, error_word)
        total = tl.where(tl.sum((is_clean == 0).to(tl.int32), axis=0) == 0, total, float("nan"))
    tl.store(out + n * D + c, total.to(out.dtype.element_ty), mask=is_column)
