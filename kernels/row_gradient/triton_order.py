"""The order in which row_gradient sums lookups on a GPU: by row, and within a row by token, n · K + k.

Codes are counted and placed, lookup k by lookup k, because only the codes are unordered: chunks of tokens are counted,
each count becomes the place of the chunk's first token with that code, and every chunk places its tokens in their
order. All it takes beside the order are codes and scores, turned to [K, N], and the counts. Row ids, which may lie
anywhere, are sorted, as are codes so many that counters would outgrow the lookups.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels.row_gradient.triton_sort import sort_by_bits
from mfdist.kernels.triton_ids import checked
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, at_most_registers, next_power_of_2

_MAX_LOOKUPS: Final = 2**32 - 1
_INT32_MAX: Final = torch.iinfo(torch.int32).max
#: Places of so many lookups are counted in int32: who sums a run looks up to three blocks of 512 past its last place.
_MOST_INT32_PLACES: Final = _INT32_MAX - (1 << 12)
_WORD_BITS: Final = 63
#: Above it, counters outgrow the lookups.
_MAX_COUNTED: Final = 4096
_MIN_CHUNK: Final = 512
#: More tokens would not fit the registers of the program that counts them.
_MAX_CHUNK: Final = 8192
#: All chunks' counts of a block of codes are summed by one program; there are more chunks where tokens are very many.
_WANTED_CHUNKS: Final = 64
_CODES_TOGETHER: Final = 1024
_MIN_BINS: Final = 128
#: Tokens placed at a time, each compared with each.
_PLACED_TOGETHER: Final = 32
#: Registers to a thread that places tokens: all programs of a usual layer run at once.
_PLACING_REGISTERS: Final = 64
_TURNED_TOKENS: Final = 128
_TURNED_LOOKUPS: Final = 32
_KEYS_TOGETHER: Final = 1024


class Order(NamedTuple):
    """A word for each lookup, in order, and where each row's run of them starts and ends.

    The low half of a word is the lookup's number n · K + k, the high half the bits of its score: they are read
    together, and writing two numbers to scattered places would take twice as long as writing one. A lookup with a bad
    id is in no run; where counting leaves its place empty, there is a -1.
    """

    words: Tensor
    starts: Tensor
    ends: Tensor


class SortedLookups(NamedTuple):
    """The rows of all lookups in order, of which a bad id's is R, and their words."""

    rows: Tensor
    words: Tensor


def order_by_row(
    row_ids: Tensor,
    scores: Tensor,
    grad_scores: Tensor,
    error_word: Tensor,
    num_rows: int,
    code_stride: int,
    *,
    is_checked: bool,
) -> Order:
    """Return the order of all lookups with good ids.

    Args:
        row_ids: [N, K], contiguous, not empty.
        scores: [N, K], contiguous.
        grad_scores: [N, K], in which a bad id's place is set to NaN.
        error_word: gets a bad id.
        num_rows: R.
        code_stride: see `mfdist.kernels.gather_sum`.
        is_checked: ids may be bad.

    Returns:
        Starts and ends are in `place_dtype`.

    Raises:
        ConfigError: there are 2**32 lookups or more.
    """
    if 0 < code_stride <= _MAX_COUNTED:
        return _by_counting(row_ids, scores, grad_scores, error_word, code_stride, is_checked=is_checked)
    lookups = (row_ids, scores, grad_scores, error_word)
    return bounded(sort_by_row(*lookups, num_rows, code_stride, is_checked=is_checked), num_rows)


def bounded(lookups: SortedLookups, num_rows: int) -> Order:
    """Return sorted lookups with the bounds of each of R rows' runs."""
    kind = place_dtype(lookups.rows.numel())
    bounds = lookups.words.new_zeros(num_rows + 1, dtype=kind)
    rows = torch.arange(num_rows, dtype=lookups.rows.dtype, device=bounds.device)
    torch.searchsorted(lookups.rows, rows, right=True, out_int32=kind == torch.int32, out=bounds[1:])
    return Order(lookups.words, bounds[:-1], bounds[1:])


def sort_list(row_ids: Tensor, scores: Tensor, numbers: Tensor, num_rows: int) -> SortedLookups:
    """Return listed lookups in order; see `order_by_row`.

    Args:
        row_ids: [M], in [0, R), contiguous, not empty.
        scores: [M], contiguous.
        numbers: [M] int64, rising: n · K + k, which words have then.
        num_rows: R.
    """
    # Nothing is checked, and so no score's gradient is set.
    return sort_by_row(row_ids[:, None], scores, scores, scores, num_rows, 0, is_checked=False, numbers=numbers)


def sort_by_row(
    row_ids: Tensor,
    scores: Tensor,
    grad_scores: Tensor,
    error_word: Tensor,
    num_rows: int,
    code_stride: int,
    *,
    is_checked: bool,
    numbers: Tensor | None = None,
) -> SortedLookups:
    """Return all lookups in order, without going over the rows that are not looked up; see `order_by_row`.

    Words have the lookups' `numbers`, where they are given.
    """
    num_ids, (num_tokens, num_lookups) = _checked_count(*row_ids.shape), row_ids.shape
    largest = num_rows if is_checked else num_rows - 1
    lookup_bits, row_bits = num_ids.bit_length(), max(1, largest.bit_length())
    if lookup_bits + row_bits > _WORD_BITS:
        raise ConfigError(
            f"the numbers of a lookup and a row must fit {_WORD_BITS} bits together; got {num_ids} lookups and "
            f"{num_rows} rows; split the tokens"
        )
    # Of codes that cannot be bad the lookup is known, and only they are unordered, where lookups k lie together.
    is_turned = code_stride > 0 and not is_checked
    sizes = (num_tokens, num_lookups, code_stride)
    keys = row_ids.new_empty((num_lookups, num_tokens) if is_turned else (1, num_ids), dtype=torch.int64)
    lookups = min(_TURNED_LOOKUPS, next_power_of_2(num_lookups))
    tokens = _TURNED_TOKENS * _TURNED_LOOKUPS // lookups
    _make_keys[(triton.cdiv(num_tokens, tokens), triton.cdiv(num_lookups, lookups))](
        row_ids, keys, grad_scores, error_word, *sizes, code_stride or num_rows, num_rows, lookup_bits,
        tokens, lookups, is_checked, is_turned, **LAUNCH_OPTIONS,
    )  # fmt: skip
    keys = sort_by_bits(keys, lookup_bits, code_stride.bit_length() - 1 if is_turned else row_bits).view(-1)
    rows = keys.new_empty(num_ids, dtype=torch.int32 if largest <= _INT32_MAX else torch.int64)
    _split_keys[(triton.cdiv(num_ids, _KEYS_TOGETHER),)](
        keys, rows, scores, numbers, num_ids, lookup_bits, _KEYS_TOGETHER, **LAUNCH_OPTIONS
    )
    return SortedLookups(rows, keys)


def _checked_count(num_tokens: int, num_lookups: int) -> int:
    """Return N · K.

    Raises:
        ConfigError: it does not fit half a word.
    """
    if num_tokens * num_lookups > _MAX_LOOKUPS:
        raise ConfigError(
            f"gradients on a GPU take at most {_MAX_LOOKUPS} lookups; got N · K = {num_tokens * num_lookups} from "
            f"{[num_tokens, num_lookups]}; split the tokens"
        )
    return num_tokens * num_lookups


def place_dtype(num_ids: int) -> torch.dtype:
    """Return int32, or int64 where so many lookups need it, for places in their order."""
    return torch.int32 if num_ids <= _MOST_INT32_PLACES else torch.int64


def _by_counting(
    row_ids: Tensor,
    scores: Tensor,
    grad_scores: Tensor,
    error_word: Tensor,
    code_stride: int,
    *,
    is_checked: bool,
) -> Order:
    num_tokens, num_lookups = row_ids.shape
    kind = place_dtype(_checked_count(num_tokens, num_lookups))
    bins = max(_MIN_BINS, next_power_of_2(code_stride))
    chunk = min(_MAX_CHUNK, next_power_of_2(triton.cdiv(num_tokens, _WANTED_CHUNKS)))
    chunk = max(_MIN_CHUNK, bins, chunk)
    chunks = triton.cdiv(num_tokens, chunk)
    sizes = (num_tokens, num_lookups, code_stride)
    codes = row_ids.new_empty(num_lookups, num_tokens, dtype=torch.int16)
    turned = scores.new_empty(num_lookups, num_tokens)
    _turn[(triton.cdiv(num_tokens, _TURNED_TOKENS), triton.cdiv(num_lookups, _TURNED_LOOKUPS))](
        row_ids, scores, codes, turned, grad_scores, error_word, *sizes,
        _TURNED_TOKENS, _TURNED_LOOKUPS, is_checked, **LAUNCH_OPTIONS,
    )  # fmt: skip
    counts = row_ids.new_empty(num_lookups, chunks, code_stride, dtype=kind)
    _count[(num_lookups, chunks)](
        codes, counts, num_tokens, code_stride, chunks, chunk, bins, num_warps=2, **LAUNCH_OPTIONS
    )
    starts, ends = row_ids.new_empty(2, num_lookups * code_stride, dtype=kind).unbind()
    chunks_up = next_power_of_2(chunks)
    together = min(bins, max(1, _CODES_TOGETHER * _WANTED_CHUNKS // max(chunks_up, _WANTED_CHUNKS)))
    _bound[(num_lookups,)](
        counts, starts, ends, num_tokens, code_stride, chunks, chunks_up, together, num_warps=8, **LAUNCH_OPTIONS
    )
    words = row_ids.new_empty(row_ids.numel(), dtype=torch.int64)
    if is_checked:
        words.fill_(-1)
    _place[(chunks * num_lookups,)](
        codes, counts, turned, words, *sizes, chunks,
        chunk, _PLACED_TOGETHER, num_warps=1, **at_most_registers(_PLACING_REGISTERS), **LAUNCH_OPTIONS,
    )  # fmt: skip
    return Order(words, starts, ends)


@triton.jit
def _make_keys(
    row_ids, keys, grad_scores, error_word,
    N, K, S, limit, R, LOOKUP_BITS,
    TOKENS: tl.constexpr, LOOKUPS: tl.constexpr, IS_CHECKED: tl.constexpr, IS_TURNED: tl.constexpr,
):  # fmt: skip
    """Write each lookup's row, or R for one outside the table, and in the low bits its number; IS_TURNED: as [K, N]."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1).to(tl.int64) * LOOKUPS + tl.arange(0, LOOKUPS)
    is_id = (n < N)[:, None] & (k < K)[None, :]
    at = n[:, None] * K + k[None, :]
    ids = tl.load(row_ids + at, mask=is_id, other=0).to(tl.int64)
    row = ids + k[None, :] * S
    if IS_CHECKED:
        is_good = checked(ids, is_id, limit, error_word)
        tl.store(grad_scores + at, float("nan"), mask=is_id & (is_good == 0))
        row = tl.where(is_good, row, R)
    to = k[None, :] * N + n[:, None] if IS_TURNED else at
    tl.store(keys + to, (row << LOOKUP_BITS) | at, mask=is_id)


@triton.jit
def _split_keys(keys, rows, scores, numbers, num_ids, LOOKUP_BITS, IDS: tl.constexpr):
    """Write the rows of sorted keys, and turn the keys into words where they lie; numbers: of the lookups, or None."""
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    is_id = at < num_ids
    key = tl.load(keys + at, mask=is_id, other=0)
    row = key >> LOOKUP_BITS
    lookup = key - (row << LOOKUP_BITS)
    tl.store(rows + at, row.to(rows.dtype.element_ty), mask=is_id)
    score = tl.load(scores + lookup, mask=is_id, other=0.0)
    number = lookup if numbers is None else tl.load(numbers + lookup, mask=is_id, other=0)
    tl.store(keys + at, _word_of(number, score), mask=is_id)


@triton.jit
def _word_of(lookup, score):
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | lookup


@triton.jit
def lookup_of(word):
    """Return the lookup's number, in uint32: from it, other integers follow by cheaper operations than from int64."""
    return word.to(tl.uint32)


@triton.jit
def score_of(word):
    """Return the lookup's score."""
    return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _turn(
    row_ids, scores, codes, turned, grad_scores, error_word,
    N, K, S,
    TOKENS: tl.constexpr, LOOKUPS: tl.constexpr, IS_CHECKED: tl.constexpr,
):  # fmt: skip
    """Write the codes as int16 [K, N], a bad one as -1, and the scores in the same order."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1).to(tl.int64) * LOOKUPS + tl.arange(0, LOOKUPS)
    is_code = (n < N)[:, None] & (k < K)[None, :]
    at = n[:, None] * K + k[None, :]
    ids = tl.load(row_ids + at, mask=is_code, other=0).to(tl.int64)
    if IS_CHECKED:
        is_good = checked(ids, is_code, S, error_word)
        tl.store(grad_scores + at, float("nan"), mask=is_code & (is_good == 0))
        ids = tl.where(is_good, ids, -1)
    to = k[None, :] * N + n[:, None]
    tl.store(codes + to, ids.to(tl.int16), mask=is_code)
    tl.store(turned + to, tl.load(scores + at, mask=is_code, other=0.0), mask=is_code)


@triton.jit
def _count(codes, counts, N, S, CHUNKS, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """Count the codes of lookup k in one chunk of tokens."""
    k = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    code = tl.load(codes + k * N + n, mask=n < N, other=-1).to(tl.int32)
    found = tl.histogram(tl.maximum(code, 0), BINS, mask=code >= 0)
    bins = tl.arange(0, BINS)
    tl.store(counts + (k * CHUNKS + chunk) * S + bins, found.to(counts.dtype.element_ty), mask=bins < S)


@triton.jit
def _bound(counts, starts, ends, N, S, CHUNKS, CHUNKS_UP: tl.constexpr, CODES: tl.constexpr):
    """Turn the counts of lookup k into where each chunk's tokens of a code begin, and write the bounds of its rows."""
    k = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_UP)
    begin = (k * N).to(counts.dtype.element_ty)
    for first in range(0, S, CODES):
        code = first + tl.arange(0, CODES)
        at = (k * CHUNKS + chunk)[:, None] * S + code[None, :]
        mask = (chunk < CHUNKS)[:, None] & (code < S)[None, :]
        found = tl.load(counts + at, mask=mask, other=0)
        total = tl.sum(found, axis=0)
        end = begin + tl.cumsum(total, axis=0)
        tl.store(starts + k * S + code, end - total, mask=code < S)
        tl.store(ends + k * S + code, end, mask=code < S)
        tl.store(counts + at, tl.cumsum(found, axis=0) - found + (end - total)[None, :], mask=mask)
        begin += tl.sum(total, axis=0)


@triton.jit
def _place(
    codes, counts, turned, words,
    N, K, S, CHUNKS,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the words of lookups k of one chunk of tokens to their places, counting up from where codes begin.

    The counters lie in memory, where this program alone uses them and barriers keep its own threads in step. All chunks
    of a lookup k, whose places lie among each other, are at work together, so that the cache gathers whole lines.
    """
    chunk = tl.program_id(0) % CHUNKS
    k = (tl.program_id(0) // CHUNKS).to(tl.int64)
    counters = counts + (k * CHUNKS + chunk) * S
    i = tl.arange(0, TOKENS)
    n = chunk * CHUNK + i
    upcoming = tl.load(codes + k * N + n, mask=n < N, other=-1)
    upcoming_score = tl.load(turned + k * N + n, mask=n < N, other=0.0)
    for _ in range(0, tl.minimum(CHUNK, N - chunk * CHUNK), TOKENS):
        lookup = n.to(tl.int64) * K + k
        code = upcoming.to(tl.int32)
        score = upcoming_score
        is_code = code >= 0
        # The next ones are under way while these are placed.
        n += TOKENS
        upcoming = tl.load(codes + k * N + n, mask=n < N, other=-1)
        upcoming_score = tl.load(turned + k * N + n, mask=n < N, other=0.0)
        is_same = code[:, None] == code[None, :]
        # How many of these tokens have the token's code, and, in the high half, how many of them come earlier.
        weight = tl.where(i[:, None] < i[None, :], 65537, 1)
        found = tl.sum(tl.where(is_same, weight, 0), axis=0)
        before = found >> 16
        same = found & 65535
        begin = tl.load(counters + code, mask=is_code, other=0)
        tl.debug_barrier()
        tl.store(counters + code, begin + same, mask=is_code & (before == same - 1))
        tl.debug_barrier()
        place = begin + before
        tl.store(words + place, _word_of(lookup, score), mask=is_code)
