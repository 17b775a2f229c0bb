"""The rules and stochastic rounding inside Triton kernels: what one row's program does with the row's gradient."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.row_update.rule import RowRule
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS

SGD: tl.constexpr = tl.constexpr(0)
ROWWISE_ADAGRAD: tl.constexpr = tl.constexpr(1)
ADAM: tl.constexpr = tl.constexpr(2)
NUMBERS = {"sgd": 0, "rowwise_adagrad": 1, "adam": 2}
_LARGEST_NAN: tl.constexpr = tl.constexpr(0x7FFF0000)
#: Bits of fraction of states in a byte each, and as fp32 words the least value with a whole fraction, and the largest.
_MOMENTUM: tl.constexpr = tl.constexpr(2)
_ROOT: tl.constexpr = tl.constexpr(3)
_LEAST: tl.constexpr = tl.constexpr(0x31800000)  # 2^-28
_LARGEST: tl.constexpr = tl.constexpr(0x40600000)  # 3.5
_LEAST_LOG = -1e30  # stands for the logarithm of a beta of 0


def step_constants(lr: Tensor, step: Tensor, rule: RowRule) -> tuple[Tensor, Tensor]:
    """Return what all rows of a step share, as `update_row` takes it: fp32 [9] and keys, int64 [3].

    It is computed on the GPU, so that a captured graph follows `lr` and `step`.
    """
    shared = torch.empty(9, dtype=torch.float32, device=lr.device)
    keys = torch.empty(3, dtype=torch.int64, device=lr.device)
    betas = [(beta, 1 - beta, math.log(beta) if beta else _LEAST_LOG) for beta in rule.betas]
    if rule.kind == "rowwise_adagrad":
        betas[1] = (*rule.accumulation, 0.0)
    _prepare[(1,)](
        lr, step, shared, keys, rule.weight_decay, rule.eps, *betas[0], *betas[1], rule.seed,
        num_warps=1, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return shared, keys


@triton.jit
def _prepare(
    lr, step, shared, keys, weight_decay, eps, beta1, complement1, log_beta1, beta2, complement2, log_beta2, seed
):
    rate = tl.load(lr).to(tl.float32)
    t = tl.load(step).to(tl.int64)
    # 1 − βᵗ loses its digits in fp32 while t is small.
    correction1 = (1.0 - tl.exp(t.to(tl.float64) * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(t.to(tl.float64) * log_beta2)).to(tl.float32)
    tl.store(shared, rate)
    tl.store(shared + 1, 1.0 - rate * weight_decay)
    tl.store(shared + 2, eps)
    tl.store(shared + 3, rate / correction1)
    tl.store(shared + 4, 1.0 / correction2)
    tl.store(shared + 5, beta1)
    tl.store(shared + 6, complement1)
    tl.store(shared + 7, beta2)
    tl.store(shared + 8, complement2)
    base = _mix64(tl.cast(seed, tl.int64).to(tl.uint64, bitcast=True)) + t.to(tl.uint64, bitcast=True) * 4
    for stream in tl.static_range(3):
        tl.store(keys + stream, _mix64(base + stream).to(tl.int64, bitcast=True))


@triton.jit
def load_constants(shared, keys, RULE: tl.constexpr):
    """Return what `step_constants` wrote, as far as the rule needs it."""
    rate, keep, eps = tl.load(shared), tl.load(shared + 1), tl.load(shared + 2)
    key, corrected_rate, correction, beta1, complement1 = tl.load(keys), 0.0, 0.0, 0.0, 0.0
    beta2, complement2, key1, key2 = 0.0, 0.0, key, key
    if RULE == ROWWISE_ADAGRAD:
        beta2, complement2 = tl.load(shared + 7), tl.load(shared + 8)
    if RULE == ADAM:
        corrected_rate, correction, beta1 = tl.load(shared + 3), tl.load(shared + 4), tl.load(shared + 5)
        complement1, beta2, complement2 = tl.load(shared + 6), tl.load(shared + 7), tl.load(shared + 8)
        key1, key2 = tl.load(keys + 1), tl.load(keys + 2)
    return rate, keep, eps, corrected_rate, correction, beta1, complement1, beta2, complement2, key, key1, key2


@triton.jit
def accumulate(accumulated, mean_square, constants):
    """Return what row-wise Adagrad has accumulated for a row once the mean of a gradient's squares is added."""
    beta2, complement2 = constants[7], constants[8]
    return tl.where(accumulated > 0, accumulated * beta2 + complement2 * mean_square, mean_square)


@triton.jit
def update_row(
    table, first, second, row, c, is_column, values, gradient, mean_square,
    accumulated, constants, D, row_offset, column_offset,
    RULE: tl.constexpr,
):  # fmt: skip
    """Update one row of the table and its state.

    Args:
        table: pointer to rows, D apart.
        first: pointer to the rule's first state, or anything where it has none.
        second: pointer to its second state, or anything.
        row: int64, this table's row.
        c: [COLUMNS] columns.
        is_column: [COLUMNS], c < D.
        values: [COLUMNS] fp32, the row as it is.
        gradient: [COLUMNS] fp32, 0 past the last column.
        mean_square: mean of the gradient's squares over the whole row; not finite leaves the row as it is.
        accumulated: what row-wise Adagrad has accumulated for the row, with this gradient; see `accumulate`. The other
            rules do not look at it.
        constants: from `load_constants`.
        D: the row's width here.
        row_offset: row of the whole table that is row 0 here.
        column_offset: column of the whole table that is column 0 here.
        RULE: which rule.
    """
    rate, keep, eps, corrected_rate, correction, beta1, complement1, beta2, complement2, key, key1, key2 = constants
    if mean_square < float("inf"):
        kept = values * keep
        at = row * D + c
        if RULE == ADAM:
            momentum = beta1 * _load_moment(first, at, is_column, _MOMENTUM) + complement1 * gradient
            variance = beta2 * _load_moment(second, at, is_column, _ROOT) + complement2 * gradient * gradient
            root = tl.sqrt(variance * correction) + eps
            updated = kept - corrected_rate * momentum / root
            _store_moment(first, at, momentum, is_column, key1, row + row_offset, c + column_offset, _MOMENTUM)
            _store_moment(second, at, variance, is_column, key2, row + row_offset, c + column_offset, _ROOT)
        elif RULE == ROWWISE_ADAGRAD:
            tl.store(first + row, accumulated)
            updated = kept - rate / (tl.sqrt(accumulated) + eps) * gradient
        else:
            updated = kept - rate * gradient
        _store_rounded(table, at, updated, is_column, key, row + row_offset, c + column_offset)


@triton.jit
def _store_rounded(to, at, value, mask, key, row, column):
    """Write fp32 values in the pointer's dtype: bf16 rounded stochastically, others to the nearest."""
    if to.dtype.element_ty == tl.bfloat16:
        random = _random_words(key, row, column) >> 16
        # A NaN whose bits are all set would be carried past the sign; the largest that is not stays one.
        words = tl.minimum(value.to(tl.int32, bitcast=True), _LARGEST_NAN).to(tl.uint32, bitcast=True)
        rounded = ((words + random) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(to + at, rounded, mask=mask, eviction_policy="evict_first")
    else:
        tl.store(to + at, value.to(to.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _load_moment(kept, at, mask, FRACTION: tl.constexpr):
    """Return m or v in fp32, from a byte too."""
    value = tl.load(kept + at, mask=mask, other=0)
    if kept.dtype.element_ty == tl.uint8:
        half = (value.to(tl.uint16) << (10 - FRACTION)).to(tl.float16, bitcast=True)
        exact = half.to(tl.float32) * 0.00006103515625  # 2^-14
        moment = exact * exact if FRACTION == _ROOT else exact
    else:
        moment = value.to(tl.float32)
    return moment


@triton.jit
def _store_moment(to, at, value, mask, key, row, column, FRACTION: tl.constexpr):
    """Write m or v in the pointer's dtype, rounded stochastically where that is bf16 or a byte."""
    if to.dtype.element_ty == tl.uint8:
        exact = tl.sqrt_rn(value) if FRACTION == _ROOT else value
        bits = exact.to(tl.uint32, bitcast=True)
        size = tl.minimum(bits & 0x7FFFFFFF, _LARGEST)
        # Added to the least value with a whole fraction, a smaller one has as many bits below the point as bytes' have.
        added = (size.to(tl.float32, bitcast=True) + 3.7252902984619140625e-09).to(tl.uint32, bitcast=True)  # 2^-28
        place = tl.where(size < _LEAST, added, size + 0x800000) - _LEAST
        place += _random_words(key, row, column) >> (9 + FRACTION)
        made = (place >> (23 - FRACTION)) | ((bits >> 31) << 7)
        tl.store(to + at, made.to(tl.uint8), mask=mask, eviction_policy="evict_first")
    else:
        _store_rounded(to, at, value, mask, key, row, column)


@triton.jit
def _random_words(key, row, column):
    row_key = (_mix64(key.to(tl.uint64, bitcast=True) + row.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 32).to(tl.uint32)
    return _mix32(row_key + column.to(tl.uint32) * 0x9E3779B9)


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
