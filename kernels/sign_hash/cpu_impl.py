"""sign_hash on the CPU: one pass over x forward, one backward, tokens in parallel.

exp is a polynomial of its own because LLVM vectorises it; calls of the C library's it does not.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mfdist.kernels.cpu_rows import flat
from mfdist.kernels.cpu_threads import call, jit, jit_part, num_threads
from mfdist.kernels.sign_hash.codes import code_dtype

_PARALLEL_WORK = 1 << 16
_TOKENS_TOGETHER = 64

# exp(y) = 2^n · exp(r), n the integer nearest y / ln 2 and r = y − n ln 2, ln 2 in two parts so that r is exact.
_LOWEST = np.float32(-87.0)
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693145751953125)
_LN2_LOW = np.float32(1.428606765330187e-06)
_ROUNDER = np.float32(12582912.0)  # 1.5 · 2^23: adding it leaves no bits for a fraction
_C6, _C5, _C4, _C3 = np.float32(1 / 720), np.float32(1 / 120), np.float32(1 / 24), np.float32(1 / 6)
_HALF, _ONE = np.float32(0.5), np.float32(1.0)
_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)


def sign_hash(x: Tensor, bits: int, score: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Return codes [N, K], in `code_dtype`, and fp32 scores [N, K]; see `mfdist.kernels.sign_hash`."""
    num_tokens, dim = x.shape
    num_lookups = dim // bits
    codes = torch.empty(num_tokens, num_lookups, dtype=code_dtype(bits))
    scores = torch.empty(num_tokens, num_lookups)
    if x.numel():
        arrays = (flat(x.float()), codes.numpy().reshape(-1), scores.numpy().reshape(-1))
        shape = (num_tokens, num_lookups, bits, score == "released", np.float32(-2 / temperature))
        threads = num_threads(x.numel(), worth=_PARALLEL_WORK)
        if threads == 1:
            _hash_tokens(*arrays, *shape, 0, num_tokens)
        else:
            call(_hash, threads, *arrays, *shape)
    return codes, scores


def sign_hash_gradient(x: Tensor, grad_scores: Tensor, bits: int, score: str, temperature: float) -> Tensor:
    """Return the gradient of x [N, d], in its dtype, from that of the scores [N, K]."""
    num_tokens, dim = x.shape
    grad_x = torch.empty(num_tokens, dim)
    if x.numel():
        arrays = (flat(x.float()), flat(grad_scores.float()), grad_x.numpy().reshape(-1))
        shape = (num_tokens, dim // bits, bits, score == "released", np.float32(-2 / temperature))
        threads = num_threads(x.numel(), worth=_PARALLEL_WORK)
        if threads == 1:
            _gradient_tokens(*arrays, *shape, 0, num_tokens)
        else:
            call(_gradient, threads, *arrays, *shape)
    return grad_x.to(x.dtype)


@jit(parallel=True)
def _hash(x: Any, codes: Any, scores: Any, N: Any, K: Any, bits: Any, is_released: Any, slope: Any) -> None:
    for part in numba.prange(-(-N // _TOKENS_TOGETHER)):
        low = part * _TOKENS_TOGETHER
        _hash_tokens(x, codes, scores, N, K, bits, is_released, slope, low, min(N, low + _TOKENS_TOGETHER))


@jit(fastmath={"contract"})
def _hash_tokens(
    x: Any, codes: Any, scores: Any, N: Any, K: Any, bits: Any, is_released: Any, slope: Any, low: Any, high: Any
) -> None:
    d = K * bits
    factors = np.empty(d, np.float32)
    for n in range(low, high):
        token = x[n * d : n * d + d]
        for i in range(d):
            factors[i] = _ONE + _exp(slope * abs(token[i]))
        for k in range(K):
            code = np.int32(0)
            inverse = _ONE
            norm = np.float32(0)
            for i in range(k * bits, k * bits + bits):
                code = code + code + np.int32(token[i] >= 0)
                inverse *= factors[i]
                norm += abs(token[i])
            codes[n * K + k] = code
            scores[n * K + k] = (norm if is_released else _ONE) / inverse


@jit(parallel=True)
def _gradient(x: Any, grad: Any, grad_x: Any, N: Any, K: Any, bits: Any, is_released: Any, slope: Any) -> None:
    for part in numba.prange(-(-N // _TOKENS_TOGETHER)):
        low = part * _TOKENS_TOGETHER
        _gradient_tokens(x, grad, grad_x, N, K, bits, is_released, slope, low, min(N, low + _TOKENS_TOGETHER))


@jit(fastmath={"contract"})
def _gradient_tokens(
    x: Any, grad: Any, grad_x: Any, N: Any, K: Any, bits: Any, is_released: Any, slope: Any, low: Any, high: Any
) -> None:
    d = K * bits
    tails = np.empty(d, np.float32)
    for n in range(low, high):
        token = x[n * d : n * d + d]
        out = grad_x[n * d : n * d + d]
        for i in range(d):
            tails[i] = _exp(slope * abs(token[i]))
        for k in range(K):
            inverse = _ONE
            norm = np.float32(0)
            for i in range(k * bits, k * bits + bits):
                inverse *= _ONE + tails[i]
                norm += abs(token[i])
            p = grad[n * K + k] / inverse
            shared = p if is_released else np.float32(0)
            weight = -slope * (norm * p if is_released else p)
            for i in range(k * bits, k * bits + bits):
                out[i] = shared + weight * (tails[i] / (_ONE + tails[i]))
        for i in range(d):
            value = token[i]
            out[i] = out[i] if value > 0 else (-out[i] if value < 0 else value * out[i])


@jit_part(fastmath={"contract"})
def _exp(y: Any) -> Any:
    """Return exp(y) for y ≤ 0, at least exp(−87), to one or two units in the last place; NaN for NaN."""
    y = _LOWEST if y < _LOWEST else y
    n = (y * _LOG2_E + _ROUNDER) - _ROUNDER
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    series = ((((_C6 * r + _C5) * r + _C4) * r + _C3) * r + _HALF) * r + _ONE
    power = np.int32((np.int32(n) + _BIAS) << _MANTISSA_BITS).view(np.float32)
    return (series * r + _ONE) * power
