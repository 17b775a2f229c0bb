"""sign_hash on a GPU: one pass over x forward, one backward; a program takes a block of chunks.

p is taken as 1 / Π (1 + exp(−2|z|/t)): with at most 24 factors between 1 and 2 the product is exact enough in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.sign_hash.codes import code_dtype
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, device_of, next_power_of_2

#: Bytes of activations a warp hashes, and activations of a program of the gradient: measured on an H200.
_HASHED_BYTES = 4096
_BLOCK = 1024


def sign_hash(x: Tensor, bits: int, score: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Return codes [N, K], in `code_dtype`, and fp32 scores [N, K]; see `mfdist.kernels.sign_hash`."""
    shape = (x.shape[0], x.shape[1] // bits)
    codes = x.new_empty(shape, dtype=code_dtype(bits))
    scores = x.new_empty(shape, dtype=torch.float32)
    if codes.numel():
        width = next_power_of_2(bits)
        chunks = _HASHED_BYTES // x.itemsize // width
        with device_of(x):
            _hash[(triton.cdiv(codes.numel(), chunks),)](
                x.contiguous(), codes, scores,
                codes.numel(), -2 / temperature,
                bits, width, chunks, score == "released", num_warps=1, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return codes, scores


def sign_hash_gradient(x: Tensor, grad_scores: Tensor, bits: int, score: str, temperature: float) -> Tensor:
    """Return the gradient of x [N, d], in its dtype, from that of the scores [N, K]."""
    grad_x = x.new_empty(x.shape)
    if grad_x.numel():
        width = next_power_of_2(bits)
        chunks = _BLOCK // width
        with device_of(x):
            _gradient[(triton.cdiv(grad_scores.numel(), chunks),)](
                x.contiguous(), grad_scores.contiguous(), grad_x,
                grad_scores.numel(), -2 / temperature,
                bits, width, chunks, score == "released", **LAUNCH_OPTIONS,
            )  # fmt: skip
    return grad_x


@triton.jit
def _times(one, other):
    return one * other


@triton.jit
def _hash(
    x, codes, scores, num_chunks, slope,
    BITS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, IS_RELEASED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    is_chunk = chunk < num_chunks
    i = tl.arange(0, WIDTH)
    is_wanted = is_chunk[:, None] & (i < BITS)[None, :]
    z = tl.load(x + chunk[:, None] * BITS + i[None, :], mask=is_wanted, other=0.0).to(tl.float32)
    tl.store(codes + chunk, codes_of(z, BITS, WIDTH).to(codes.dtype.element_ty), mask=is_chunk)
    tl.store(scores + chunk, scores_of(z, slope, BITS, WIDTH, IS_RELEASED), mask=is_chunk)


@triton.jit
def codes_of(z, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the codes, in int32, of chunks [CHUNKS, WIDTH]; what stands from BITS on does not count."""
    i = tl.arange(0, WIDTH)
    place = tl.where(i < BITS, 1 << tl.maximum(BITS - 1 - i, 0), 0)
    return tl.sum(tl.where(z >= 0, place[None, :], 0), axis=1)


@triton.jit
def scores_of(z, slope, BITS: tl.constexpr, WIDTH: tl.constexpr, IS_RELEASED: tl.constexpr):
    """Return the scores of chunks [CHUNKS, WIDTH] in fp32, 0 from BITS on."""
    tail = tl.exp(slope * tl.abs(z))
    score = 1.0 / tl.reduce(tl.where((tl.arange(0, WIDTH) < BITS)[None, :], 1.0 + tail, 1.0), 1, _times)
    if IS_RELEASED:
        score = score * tl.sum(tl.abs(z), axis=1)
    return score


@triton.jit
def _gradient(
    x, grad_scores, grad_x, num_chunks, slope,
    BITS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, IS_RELEASED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    i = tl.arange(0, WIDTH)
    is_chunk = chunk < num_chunks
    is_bit = (i < BITS)[None, :]
    at = chunk[:, None] * BITS + i[None, :]
    z = tl.load(x + at, mask=is_chunk[:, None] & is_bit, other=0.0).to(tl.float32)
    tail = tl.exp(slope * tl.abs(z))
    p = 1.0 / tl.reduce(tl.where(is_bit, 1.0 + tail, 1.0), 1, _times)[:, None]
    change = -slope * p * (tail / (1.0 + tail))
    if IS_RELEASED:
        change = p + tl.sum(tl.abs(z), axis=1)[:, None] * change
    incoming = tl.load(grad_scores + chunk, mask=is_chunk, other=0.0).to(tl.float32)[:, None]
    # At 0 the slope of |z| is 0; a NaN must come out as NaN.
    grad = incoming * change * tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, z))
    tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=is_chunk[:, None] & is_bit)
