"""The order of a table's lookups by row, and within a row by token: what makes sums over a row repeatable.

Codes that count from their lookup's own first row are sorted by counting, each lookup's tokens in chunks: 1. count the
codes of each chunk; 2. add the counts up over (row, chunk), which gives where each chunk's lookups of a row begin;
3. one program a chunk places them, a few tokens at a time. Other ids, and codes that are many, are sorted by torch.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.triton_ids import checked
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, next_power_of_2

_INT32_MAX: Final = torch.iinfo(torch.int32).max
#: Above it, counters outgrow the lookups, or a chunk its program.
_MAX_COUNTED: Final = 4096
_MIN_CHUNK: Final = 2048
_MIN_BINS: Final = 128
#: Tokens placed at a time: each is compared with each.
_PLACED_TOGETHER: Final = 64
_KEYS_TOGETHER: Final = 1024


class Order(NamedTuple):
    """Lookups n · K + k in order, and where each row's run ends: `ends_each` ends a row, of which the last counts.

    Without `rows` there is a run for each row of the table, empty or not. With it run i is of `rows[i]`, and those past
    the last are empty.
    """

    lookups: Tensor
    ends: Tensor
    ends_each: int
    rows: Tensor | None = None


def order_by_row(
    row_ids: Tensor,
    grad_scores: Tensor,
    error_word: Tensor,
    num_rows: int,
    code_stride: int,
    *,
    is_checked: bool,
    is_brief: bool = False,
) -> Order:
    """Return the order of all lookups with good ids.

    Args:
        row_ids: [N, K], contiguous, not empty.
        grad_scores: [N, K], in which a bad id's place is set to NaN.
        error_word: gets a bad id.
        num_rows: R.
        code_stride: see `mfdist.kernels.gather_sum`.
        is_checked: ids may be bad.
        is_brief: where the table has more rows than there are lookups, list the runs of those that are looked up.

    Returns:
        Lookups and ends in int32, or int64 where N · K needs it.
    """
    if 0 < code_stride <= _MAX_COUNTED:
        return _by_counting(row_ids, grad_scores, error_word, code_stride, is_checked=is_checked)
    num_lookups = row_ids.shape[1]
    keys = row_ids.new_empty(row_ids.numel(), dtype=_key_dtype(num_rows, is_checked=is_checked))
    _make_keys[(triton.cdiv(row_ids.numel(), _KEYS_TOGETHER),)](
        row_ids, keys, grad_scores, error_word,
        row_ids.numel(), num_lookups, code_stride, code_stride or num_rows, num_rows,
        _KEYS_TOGETHER, is_checked, **LAUNCH_OPTIONS,
    )  # fmt: skip
    by_row, lookups = torch.sort(keys, stable=True)
    is_narrow = row_ids.numel() <= _INT32_MAX
    if is_brief and num_rows > row_ids.numel():
        return _by_run(by_row, lookups.int() if is_narrow else lookups, num_rows)
    rows = torch.arange(num_rows, dtype=keys.dtype, device=keys.device)
    ends = torch.searchsorted(by_row, rows, right=True, out_int32=is_narrow)
    return Order(lookups.int() if is_narrow else lookups, ends, 1)


def _key_dtype(num_rows: int, *, is_checked: bool) -> torch.dtype:
    """Return the narrowest dtype, which sorts fastest, for all rows and, if ids are checked, the one past them."""
    largest = num_rows if is_checked else num_rows - 1
    return next(kind for kind in (torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(kind).max)


def _by_run(by_row: Tensor, lookups: Tensor, num_rows: int) -> Order:
    """Return the order with a run for each different key, of which there are at most as many as lookups."""
    num_lookups = lookups.numel()
    is_last = torch.ones(num_lookups, dtype=torch.bool, device=by_row.device)
    torch.ne(by_row[1:], by_row[:-1], out=is_last[:-1])
    places = torch.cumsum(is_last, 0, dtype=lookups.dtype)
    past = torch.tensor([num_rows], dtype=by_row.dtype, device=by_row.device)
    num_good = torch.searchsorted(by_row, past, out_int32=lookups.dtype == torch.int32)
    rows, ends = torch.empty_like(by_row), torch.empty_like(lookups)
    _list_runs[(triton.cdiv(num_lookups, _KEYS_TOGETHER),)](
        by_row, is_last, places, num_good, rows, ends, num_lookups, _KEYS_TOGETHER, **LAUNCH_OPTIONS
    )
    return Order(lookups, ends, 1, rows)


def _by_counting(
    row_ids: Tensor, grad_scores: Tensor, error_word: Tensor, code_stride: int, *, is_checked: bool
) -> Order:
    num_tokens, num_lookups = row_ids.shape
    bins = max(_MIN_BINS, next_power_of_2(code_stride))
    chunk = max(_MIN_CHUNK, bins)
    chunks = triton.cdiv(num_tokens, chunk)
    kind = torch.int32 if row_ids.numel() <= _INT32_MAX else torch.int64
    counts = row_ids.new_empty(num_lookups * code_stride * chunks + 1, dtype=torch.int32)
    sizes = (num_tokens, num_lookups, code_stride, chunks)
    _count[(num_lookups, chunks)](
        row_ids, counts, grad_scores, error_word, *sizes, chunk, bins, is_checked, **LAUNCH_OPTIONS
    )
    # The first count is 0, so that entry i of the sums is where part i begins; placing moves it on to where it ends.
    bounds = torch.cumsum(counts, 0, dtype=kind)
    lookups = row_ids.new_empty(row_ids.numel(), dtype=kind)
    _place[(num_lookups, chunks)](
        row_ids, bounds, lookups, *sizes, chunk, _PLACED_TOGETHER, is_checked, num_warps=1, **LAUNCH_OPTIONS
    )
    return Order(lookups, bounds[:-1], chunks)


@triton.jit
def _make_keys(
    row_ids, keys, grad_scores, error_word,
    num_ids, K, S, limit, R,
    IDS: tl.constexpr, IS_CHECKED: tl.constexpr,
):  # fmt: skip
    """Write each lookup's row, or R for one outside the table."""
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    is_id = at < num_ids
    ids = tl.load(row_ids + at, mask=is_id, other=0).to(tl.int64)
    row = at % K * S + ids
    if IS_CHECKED:
        is_good = checked(ids, is_id, limit, error_word)
        tl.store(grad_scores + at, float("nan"), mask=is_id & (is_good == 0))
        row = tl.where(is_good, row, R)
    tl.store(keys + at, row.to(keys.dtype.element_ty), mask=is_id)


@triton.jit
def _list_runs(by_row, is_last, places, num_good, rows, ends, num_lookups, KEYS: tl.constexpr):
    """Write the row and the end of each run of good keys, and give what is past the last run the end of all."""
    i = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    good = tl.load(num_good)
    num_runs = tl.load(places + good - 1, mask=good > 0, other=0)
    is_end = (i < good) & tl.load(is_last + i, mask=i < good, other=0).to(tl.int1)
    place = tl.load(places + i, mask=is_end, other=1) - 1
    tl.store(rows + place, tl.load(by_row + i, mask=is_end, other=0), mask=is_end)
    tl.store(ends + place, (i + 1).to(ends.dtype.element_ty), mask=is_end)
    tl.store(ends + i, good, mask=(i >= num_runs) & (i < num_lookups))


@triton.jit
def _count(
    row_ids, counts, grad_scores, error_word,
    N, K, S, CHUNKS,
    CHUNK: tl.constexpr, BINS: tl.constexpr, IS_CHECKED: tl.constexpr,
):  # fmt: skip
    """Count the codes of lookup k in one chunk of tokens."""
    k = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    n = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    is_code = n < N
    codes = tl.load(row_ids + n * K + k, mask=is_code, other=0)
    if IS_CHECKED:
        is_token = is_code
        is_code = checked(codes.to(tl.int64), is_token, S, error_word)
        tl.store(grad_scores + n * K + k, float("nan"), mask=is_token & (is_code == 0))
    found = tl.histogram(tl.where(is_code, codes, 0).to(tl.int32), BINS, mask=is_code)
    bins = tl.arange(0, BINS)
    tl.store(counts + 1 + (k * S + bins) * CHUNKS + chunk, found, mask=bins < S)
    tl.store(counts, 0, mask=(k == 0) & (chunk == 0))


@triton.jit
def _place(
    row_ids, bounds, lookups,
    N, K, S, CHUNKS,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr, IS_CHECKED: tl.constexpr,
):  # fmt: skip
    """Write the lookups k of one chunk of tokens to their places, TOKENS at a time, counting up the bounds.

    This program alone uses the chunk's bounds; the barriers keep its own threads in step.
    """
    k = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, TOKENS)
    n = chunk * CHUNK + i
    upcoming = tl.load(row_ids + n * K + k, mask=n < N, other=0)
    for _ in range(0, tl.minimum(CHUNK, N - chunk * CHUNK), TOKENS):
        lookup = n * K + k
        is_code = n < N
        codes = upcoming.to(tl.int64)
        if IS_CHECKED:
            is_code = is_code & (codes >= 0) & (codes < S)
        codes = tl.where(is_code, codes, -1).to(tl.int32)
        # The next codes are under way while these are placed.
        n += TOKENS
        upcoming = tl.load(row_ids + n * K + k, mask=n < N, other=0)
        # How many of these tokens have the token's code, and, in the high half, how many of them come earlier.
        is_same = codes[:, None] == codes[None, :]
        weight = tl.where(i[:, None] < i[None, :], 65537, 1)
        found = tl.sum(tl.where(is_same, weight, 0), axis=0)
        before = found >> 16
        same = found & 65535
        bound = bounds + (k * S + codes) * CHUNKS + chunk
        begin = tl.load(bound, mask=is_code, other=0)
        tl.debug_barrier()
        tl.store(lookups + begin + before, lookup.to(lookups.dtype.element_ty), mask=is_code)
        tl.store(bound, begin + same, mask=is_code & (before == same - 1))
        tl.debug_barrier()
