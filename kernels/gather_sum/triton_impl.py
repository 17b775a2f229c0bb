"""gather_sum on a GPU: one program sums a tile of tokens × columns in fp32 registers.

- Tables whose slice of columns fits the second-level cache: programs are ordered so that all tokens pass one slice
  before the next one starts, and most reads are cache hits. Ids and scores are first packed into one word a lookup,
  the words of one lookup k side by side: a tile then reads each of them with its neighbours, and one round ahead of
  its rows. Read as they come, [N, K], they take twice as many of the first-level cache's cycles as the rows do.
- Larger tables whose rows have scales: the same words, and whole rows or long parts of them.
- Other larger tables, and tokens that are not enough for tiles to fill a GPU: long contiguous reads of rows, or of
  parts of them that a warp has several of on their way.
- Few tokens: the lookups of one token are read side by side, because there is no other work to hide the latency.

Each output element is summed by one program in a fixed order, so results repeat bit for bit. Quantised rows have a
scale each, with which their scores are multiplied; their values are read as fp32 like all others.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_id_check import can_be_bad, error_word, note_bad_id
from mfdist.kernels.triton_chain import start_next, wait_for_inputs
from mfdist.kernels.triton_ids import checked
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, can_chain, chain_options, device_of, next_power_of_2
from mfdist.kernels.triton_rows import as_fp32, weighted

#: A row's part in one slice of columns: a line of the first-level cache.
_SLICE_ROW_BYTES = 128
#: A slice of this size stays in the second-level cache of an A100 or H100 while others stream through.
_SLICE_BYTES = 24 << 20
#: Elements of a tile, which a warp sums, and lookups taken at a time, by the bytes of each element.
_TILE = {1: (1024, 1), 2: (2048, 2), 4: (1024, 1)}
#: Elements of a warp's part of one row, and lookups taken at a time, where rows have scales and the table is too large
#: for a cache: words that hold the weight leave one read for another to wait for, where ids and scales leave two.
_SCALED = (512, 4)
#: Outputs whose tiles are enough warps to fill a GPU.
_MANY_SUMS = 1 << 22
_PACKED_TOKENS = 64
_PACKED_LOOKUPS = 32
#: Bytes of a row that a streaming program reads, its warps, and lookups taken at a time: for outputs at most so many,
#: and for more of them by the bytes of each element; measured on an H200.
_STREAMED_OF_FEW = ((1 << 18, (256, 1, 16)), (1 << 20, (512, 1, 16)), (_MANY_SUMS, (1024, 2, 8)))
_STREAMED = {1: (512, 1, 4), 2: (2048, 4, 4), 4: (4096, 4, 4)}
FEW_TOKENS = 64
_INT32_MAX = torch.iinfo(torch.int32).max
#: Outputs of few tokens → lookups and columns that a program reads at a time, and its warps.
_FEW_TILES = ((1 << 13, (512, 32, 8)), (1 << 14, (256, 32, 4)), (1 << 15, (128, 64, 4)))
_LARGE_FEW_TILE = (64, 64, 2)


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
    limit = code_stride or num_rows
    if not num_tokens * num_lookups * dim:
        note_bad_id(row_ids, limit, name, is_code=code_stride > 0)
        return table.new_zeros(num_tokens, dim, dtype=dtype)
    table, row_ids, scores = table.contiguous(), row_ids.contiguous(), scores.contiguous()
    out = table.new_empty(num_tokens, dim, dtype=dtype)
    word = error_word(name, limit, is_code=code_stride > 0)
    sizes: tuple[Any, ...] = (num_tokens, num_lookups, dim, code_stride, limit)
    is_checked = can_be_bad(row_ids, limit)
    offset = tl.int32 if limit * dim < 1 << 31 else tl.int64
    is_cached = num_rows * _SLICE_ROW_BYTES <= _SLICE_BYTES
    is_packed = num_tokens * dim >= _MANY_SUMS and (is_cached or (scales is not None and limit <= _INT32_MAX))
    with device_of(table):
        if num_tokens <= FEW_TOKENS:
            lookups, columns, warps = few_tile(num_tokens, num_lookups, dim)
            is_chained = can_chain(table)
            options = {"num_warps": warps, **LAUNCH_OPTIONS, **chain_options(is_chained=is_chained)}
            _sum_few[(num_tokens, triton.cdiv(dim, columns))](
                table, scales, row_ids, scores, out, word, *sizes,
                lookups, columns, is_checked, is_chained, **options,
            )  # fmt: skip
        elif is_packed:
            # One round more than there is, for a tile to read ahead of its last.
            packed = torch.empty(num_lookups + 1, num_tokens, dtype=torch.int64, device=table.device)
            _pack[(triton.cdiv(num_tokens, _PACKED_TOKENS), triton.cdiv(num_lookups, _PACKED_LOOKUPS))](
                table, scales, row_ids, scores, packed, word, *sizes,
                _PACKED_TOKENS, _PACKED_LOOKUPS, is_checked, **LAUNCH_OPTIONS,
            )  # fmt: skip
            elements, unrolled = _TILE[table.itemsize] if is_cached else _SCALED
            columns = min(_SLICE_ROW_BYTES // table.itemsize if is_cached else elements, next_power_of_2(dim))
            tokens = elements // columns
            _sum_slice[(triton.cdiv(num_tokens, tokens), triton.cdiv(dim, columns))](
                table, packed, out, num_tokens, num_lookups, dim, code_stride,
                tokens, columns, unrolled, offset, dim % columns == 0, num_warps=1, **LAUNCH_OPTIONS,
            )  # fmt: skip
        else:
            of_few = (how for most, how in _STREAMED_OF_FEW if num_tokens * dim <= most)
            row_bytes, warps, unrolled = next(of_few, _STREAMED[table.itemsize])
            elements = row_bytes // table.itemsize
            columns = min(elements, next_power_of_2(dim))
            tokens = elements // columns
            _stream_rows[(triton.cdiv(num_tokens, tokens), triton.cdiv(dim, columns))](
                table, scales, row_ids, scores, out, word, *sizes,
                tokens, columns, unrolled, offset, is_checked, num_warps=warps, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return out


def few_tile(num_tokens: int, num_lookups: int, dim: int) -> tuple[int, int, int]:
    """Return lookups and columns that a program for one token reads at a time, and its warps.

    With so little to sum that every multiprocessor has but a few warps, all lookups are read at once.
    """
    num_sums = num_tokens * dim
    most, columns, warps = next((sizes for limit, sizes in _FEW_TILES if num_sums <= limit), _LARGE_FEW_TILE)
    lookups = min(most, next_power_of_2(num_lookups))
    return lookups, min(columns, next_power_of_2(dim)), max(2, warps * lookups // most)


@triton.jit
def _pack(
    table, scales, row_ids, scores, packed, error_word,
    N, K, D, S, limit,
    TOKENS: tl.constexpr, LOOKUPS: tl.constexpr, IS_CHECKED: tl.constexpr,
):  # fmt: skip
    """Write id and weight of each lookup as halves of one int64, [K, N]; a bad id becomes 0 with a weight of NaN."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1) * LOOKUPS + tl.arange(0, LOOKUPS)
    is_lookup = (n < N)[:, None] & (k < K)[None, :]
    at = n[:, None] * K + k[None, :]
    ids = tl.load(row_ids + at, mask=is_lookup, other=0).to(tl.int64)
    score = tl.load(scores + at, mask=is_lookup, other=0.0)
    is_read = is_lookup
    if IS_CHECKED:
        is_read = checked(ids, is_lookup, limit, error_word)
        ids = tl.where(is_read, ids, 0)
    score = weighted(score, table, scales, ids + k.to(tl.int64)[None, :] * S, is_read)
    if IS_CHECKED:
        score = tl.where(is_read | (is_lookup == 0), score, float("nan"))
    word = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ids
    tl.store(packed + k.to(tl.int64)[None, :] * N + n[:, None], word, mask=is_lookup)


@triton.jit
def _sum_slice(
    table, packed, out,
    N, K, D, S,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr,
    OFFSET: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Sum K rows for TOKENS tokens in COLUMNS columns, in the order k = 0..K-1; an OFFSET holds any id · D.

    IS_WHOLE: the last slice has as many columns as the others. Tokens past the last read row 0 with a weight of 0.
    """
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token = n < N
    is_column = c < D
    part = table
    words = packed + n
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    word = tl.load(words, mask=is_token, other=0)
    for _ in tl.range(0, K, loop_unroll_factor=UNROLLED):
        words += N
        next_word = tl.load(words, mask=is_token, other=0)
        at = word.to(tl.int32).to(OFFSET)[:, None] * D + c[None, :]
        rows = tl.load(part + at) if IS_WHOLE else tl.load(part + at, mask=is_column[None, :], other=0)
        total += as_fp32(rows) * (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)[:, None]
        part += tl.cast(S, tl.int64) * D
        word = next_word
    tl.store(
        out + n.to(tl.int64)[:, None] * D + c[None, :],
        total.to(out.dtype.element_ty),
        mask=is_token[:, None] & is_column[None, :],
    )


@triton.jit
def _stream_rows(
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
    LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, IS_CHECKED: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum K rows for one token in COLUMNS columns, LOOKUPS of them read at a time and added up at the end."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = c < D
    worst = tl.zeros([LOOKUPS], tl.int64)
    totals = tl.zeros([LOOKUPS, COLUMNS], tl.float32)
    if IS_CHAINED:
        wait_for_inputs()
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
    if IS_CHAINED:
        start_next()
    total = tl.sum(totals, axis=0)
    if IS_CHECKED:
        is_clean = checked(worst, worst == worst, limit, error_word)
        total = tl.where(tl.sum((is_clean == 0).to(tl.int32), axis=0) == 0, total, float("nan"))
    tl.store(out + n * D + c, total.to(out.dtype.element_ty), mask=is_column)
