"""one_token_attention on a GPU: a program for each head of a sequence, or for each part of a long one.

Each program rotates its own query; the one that reads the last part rotates and writes the new key, too, and takes it
from its registers. Parts are summed by a second kernel in their order, so results repeat bit for bit.

Letters: B sequences, H heads, E head width, F half of the columns that are rotated.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.triton_chain import SECTOR_BYTES, prefetch, start_next, wait_for_inputs
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, can_chain, chain_options, device_of, next_power_of_2
from mfdist.kernels.triton_rows import as_fp32

#: Elements of keys, and as many of values, that a program reads at a time, and its warps.
_TILE = 8192
_WARPS = 4
#: Tokens that a program reads at least, if there are as many and heads are not wide; those of wide heads are as many
#: as make so many elements. Programs that a GPU is given at most.
_LEAST_TOKENS = 128
_LEAST_ELEMENTS = 16384
_MOST_PROGRAMS = 1024
#: Less than any score, and a number, so that differences of such are numbers.
_LEAST_SCORE = tl.constexpr(-1e30)


def one_token_attention(
    qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, length: int, residual: Tensor | None
) -> Tensor:
    """Return [B, 1, H·E] in qkv's dtype; see `mfdist.kernels.one_token_attention`."""
    num_sequences, num_heads, capacity, head_dim = keys.shape
    qkv, cosine, sine = qkv.contiguous(), cosine.contiguous(), sine.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = qkv.new_empty(num_sequences, 1, num_heads * head_dim)
    width = next_power_of_2(head_dim)
    part = part_tokens(num_sequences * num_heads, length + 1, width)
    num_parts = triton.cdiv(length + 1, part)
    tokens = max(1, _TILE // width)
    half, step = cosine.shape[-1], cosine.shape[-1] if len(cosine) > 1 else 0
    is_chained = can_chain(qkv)
    options = {"num_warps": _WARPS, **LAUNCH_OPTIONS, **chain_options(is_chained=is_chained)}
    is_whole = num_parts == 1
    sums = out if is_whole else qkv.new_empty(num_sequences, num_heads, num_parts, head_dim + 2, dtype=torch.float32)
    with device_of(qkv):
        _attend[(num_parts, num_heads, num_sequences)](
            qkv, cosine, sine, keys, values, residual if is_whole else None, sums,
            length, part, capacity, head_dim, half, step, math.log2(math.e) / math.sqrt(head_dim),
            width, tokens, max(1, tokens * width * keys.itemsize // SECTOR_BYTES), is_whole, is_chained, **options,
        )  # fmt: skip
        if not is_whole:
            _merge[(num_heads, num_sequences)](
                sums, residual, out, num_parts, head_dim, width, next_power_of_2(num_parts), is_chained, **options
            )
    return out


def part_tokens(num_heads: int, num_tokens: int, width: int) -> int:
    """Return how many of a sequence's tokens one program reads; `num_heads` are those of all sequences."""
    most_parts = max(1, _MOST_PROGRAMS // num_heads)
    least = min(_LEAST_TOKENS, _LEAST_ELEMENTS // width)
    return max(least, next_power_of_2(triton.cdiv(num_tokens, most_parts)))


@triton.jit(do_not_specialize=["length"])
def _attend(
    qkv, cosine, sine, keys, values, residual, out,
    length, part, capacity, E, F, step, slope,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, SECTORS: tl.constexpr, IS_WHOLE: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum the values of one part of a sequence for one head; the result, or where not IS_WHOLE what `_merge` takes."""
    p, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    e = tl.arange(0, WIDTH)
    is_column = e < E
    keys += (b * H + h) * capacity * E
    values += (b * H + h) * capacity * E
    begin = p * part
    end = tl.minimum(begin + part, length)
    if IS_CHAINED:
        for ahead in range(tl.cdiv(end - begin, TOKENS)):
            prefetch(keys + begin * E, (end - begin) * E, ahead, SECTORS)
            prefetch(values + begin * E, (end - begin) * E, ahead, SECTORS)
        wait_for_inputs()
        if IS_WHOLE:
            start_next()
    # All that is read is asked for before a sum makes the warps wait for each other.
    qkv += (b * 3 * H + h) * E
    is_rotated = e < 2 * F
    angle = b * step + tl.where(e < F, e, e - F)
    cosines = tl.load(cosine + angle, mask=is_rotated, other=1.0).to(tl.float32)
    sines = tl.load(sine + angle, mask=is_rotated, other=0.0).to(tl.float32)
    query = _rotated(qkv, cosines, sines, e, E, F) * slope
    new_key = _rotated(qkv + H * E, cosines, sines, e, E, F)
    new_value = tl.load(qkv + 2 * H * E + e, mask=is_column, other=0.0)
    added = tl.zeros([WIDTH], tl.float32)
    if residual is not None:
        added += tl.load(residual + (b * H + h) * E + e, mask=is_column, other=0.0).to(tl.float32)
    # Each of TOKENS slots has a sum of its own until the end, so that no round makes the warps wait for each other.
    best = tl.full([TOKENS], _LEAST_SCORE, tl.float32)
    weight = tl.zeros([TOKENS], tl.float32)
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for first in range(begin, end, TOKENS):
        t = first + tl.arange(0, TOKENS)
        is_token = t < end
        at = t[:, None] * E + e[None, :]
        is_read = is_token[:, None] & is_column[None, :]
        key = as_fp32(tl.load(keys + at, mask=is_read, other=0.0))
        value = as_fp32(tl.load(values + at, mask=is_read, other=0.0))
        score = tl.where(is_token, tl.sum(key * query[None, :], axis=1), _LEAST_SCORE)
        before = best
        best = tl.maximum(best, score)
        share = tl.where(is_token, tl.exp2(score - best), 0.0)
        kept = tl.exp2(before - best)
        weight = weight * kept + share
        total = total * kept[:, None] + share[:, None] * value
    is_last = begin + part > length
    new_score = tl.where(is_last, tl.sum(new_key * query, axis=0), _LEAST_SCORE)
    most = tl.maximum(tl.max(best, axis=0), new_score)
    kept = tl.exp2(best - most)
    new_share = tl.where(is_last, tl.exp2(new_score - most), 0.0)
    whole_weight = tl.sum(weight * kept, axis=0) + new_share
    whole = tl.sum(total * kept[:, None], axis=0) + new_share * new_value.to(tl.float32)
    if is_last:
        tl.store(keys + length * E + e, new_key.to(keys.dtype.element_ty), mask=is_column)
        tl.store(values + length * E + e, new_value, mask=is_column)
    if IS_CHAINED and not IS_WHOLE:
        start_next()
    if IS_WHOLE:
        tl.store(out + (b * H + h) * E + e, (whole / whole_weight + added).to(out.dtype.element_ty), mask=is_column)
    else:
        out += ((b * H + h) * tl.num_programs(0) + p) * (E + 2)
        tl.store(out + e, whole, mask=is_column)
        tl.store(out + E, most)
        tl.store(out + E + 1, whole_weight)


@triton.jit
def _merge(
    sums, residual, out, num_parts, E,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Add up what the parts of a sequence gave for one head."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = b * tl.num_programs(0) + h
    e, p = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    is_column, is_part = e < E, p < num_parts
    if IS_CHAINED:
        wait_for_inputs()
    each = sums + (head * num_parts + p) * (E + 2)
    best = tl.load(each + E, mask=is_part, other=float("-inf"))
    weight = tl.load(each + E + 1, mask=is_part, other=0.0)
    total = tl.load(each[:, None] + e[None, :], mask=is_part[:, None] & is_column[None, :], other=0.0)
    added = tl.zeros([WIDTH], tl.float32)
    if residual is not None:
        added += tl.load(residual + head * E + e, mask=is_column, other=0.0).to(tl.float32)
    kept = tl.exp2(best - tl.max(best, axis=0))
    if IS_CHAINED:
        start_next()
    result = tl.sum(total * kept[:, None], axis=0) / tl.sum(weight * kept, axis=0) + added
    tl.store(out + head * E + e, result.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _rotated(head, cosines, sines, e, E, F):
    """Return one head's query or key after its rotation, rounded to its dtype, as fp32."""
    one = tl.load(head + e, mask=e < E, other=0.0).to(tl.float32)
    partner = tl.where(e < F, e + F, e - F)
    other = tl.load(head + partner, mask=e < 2 * F, other=0.0).to(tl.float32)
    turned = one * cosines + tl.where(e < F, -other, other) * sines
    return turned.to(head.dtype.element_ty).to(tl.float32)
