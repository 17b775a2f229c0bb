"""A stable sort of words by a few of their bits, in two arrays of them: torch's own takes three times as much.

From the lowest bits up, a digit a pass: chunks of words are counted by digit, each count becomes the place of the
chunk's first word with that digit, and every chunk places its words in their order. Nothing depends on an order of
threads.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.triton_launch import LAUNCH_OPTIONS

#: So many counters, one a digit, a warp keeps in its registers.
_MAX_DIGIT_BITS: Final = 8
_MIN_DIGIT_BITS: Final = 5
#: Words of a chunk, and those placed at a time, each compared with each.
_CHUNK: Final = 1024
_PLACED_TOGETHER: Final = 32
_INT32_MAX: Final = torch.iinfo(torch.int32).max


def sort_by_bits(words: Tensor, first_bit: int, num_bits: int) -> Tensor:
    """Return int64 words, each segment in the order of `num_bits` from `first_bit` on; equal ones stay as they were.

    Args:
        words: contiguous [segments, M]; its memory is used, so that what it held is lost.
        first_bit: the lowest of them.
        num_bits: how many; all bits below the highest one, which is a sign.

    Cost: 16 bytes a word, `words` included, and a few for counters; a read and a write of all words a digit.
    """
    segments, num_words = words.shape
    digit_bits = max(_MIN_DIGIT_BITS, triton.cdiv(num_bits, triton.cdiv(num_bits, _MAX_DIGIT_BITS)))
    bins, chunks = 1 << digit_bits, triton.cdiv(num_words, _CHUNK)
    kind = torch.int32 if words.numel() <= _INT32_MAX else torch.int64
    sorted_words = torch.empty_like(words)
    counts = words.new_empty(segments * bins * chunks, dtype=kind)
    for bit in range(first_bit, first_bit + num_bits, digit_bits):
        sizes = (num_words, bit, chunks, _CHUNK, bins)
        _count[(chunks, segments)](words, counts, *sizes, **LAUNCH_OPTIONS)
        ends = torch.cumsum(counts, 0, dtype=kind)
        _place[(chunks, segments)](words, ends, sorted_words, *sizes, _PLACED_TOGETHER, num_warps=1, **LAUNCH_OPTIONS)
        words, sorted_words = sorted_words, words
    return words


@triton.jit
def _count(words, counts, M, BIT, CHUNKS, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """Count the digits of one chunk, into [segments, BINS, CHUNKS]."""
    chunk = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1).to(tl.int64)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    word = tl.load(words + segment * M + i, mask=i < M, other=0)
    found = tl.histogram(_digit_of(word, BIT, BINS), BINS, mask=i < M)
    counter = (segment * BINS + tl.arange(0, BINS)) * CHUNKS + chunk
    tl.store(counts + counter, found.to(counts.dtype.element_ty))


@triton.jit
def _place(
    words, ends, sorted_words,
    M, BIT, CHUNKS,
    CHUNK: tl.constexpr, BINS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Write the words of one chunk to their places; ends: the sums of all counts up to each."""
    chunk = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1).to(tl.int64)
    counter = (segment * BINS + tl.arange(0, BINS)) * CHUNKS + chunk
    begins = tl.load(ends + counter - 1, mask=counter > 0, other=0)
    i = chunk * CHUNK + tl.arange(0, TOGETHER)
    upcoming = tl.load(words + segment * M + i, mask=i < M, other=0)
    for _ in range(0, tl.minimum(CHUNK, M - chunk * CHUNK), TOGETHER):
        word = upcoming
        is_word = i < M
        # The next ones are under way while these are placed.
        i += TOGETHER
        upcoming = tl.load(words + segment * M + i, mask=i < M, other=0)
        place, begins = _take_places(begins, tl.where(is_word, _digit_of(word, BIT, BINS), -1), BINS, TOGETHER)
        tl.store(sorted_words + place, word, mask=is_word)


@triton.jit
def _digit_of(words, BIT, BINS: tl.constexpr):
    return ((words >> BIT) & (BINS - 1)).to(tl.int32)


@triton.jit
def _take_places(begins, digits, BINS: tl.constexpr, TOGETHER: tl.constexpr):
    """Return where a block of items goes, in their order, and where the next ones of each digit begin.

    Args:
        begins: [BINS], where those of each digit begin.
        digits: [TOGETHER] in int32, in [0, BINS), or negative for an item that gets no place.
    """
    i = tl.arange(0, TOGETHER)
    # No bit is left for an earlier item of the same digit.
    others = (digits[:, None] ^ digits[None, :]) | tl.where(i[:, None] < i[None, :], 0, 1)
    known = tl.maximum(digits, 0)
    place = tl.gather(begins, known, 0) + tl.sum((others == 0).to(tl.int32), axis=0)
    return place, begins + tl.histogram(known, BINS, mask=digits >= 0).to(begins.dtype)
