"""hashed_gather_sum on a GPU: for few tokens, every program hashes the chunks whose rows it is about to read.

That, and the norm before it, is the same work in each of a token's programs, but little of it, and it saves launches:
at decode a launch takes about as long as a lookup. Codes made in place need no check. Many tokens are hashed once, and
looked up after.
"""

import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.gather_sum.triton_impl import FEW_TOKENS, gather_sum
from mfdist.kernels.hashed_gather_sum.norm import Norm, normalised
from mfdist.kernels.hashed_gather_sum.triton_norm import apply_norm, statistics
from mfdist.kernels.sign_hash.triton_impl import hash_chunks, sign_hash
from mfdist.kernels.triton_chain import prefetch, start_next, wait_for_inputs
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, can_chain, chain_options, device_of, next_power_of_2
from mfdist.kernels.triton_rows import as_fp32

#: Outputs → lookups and columns that a program reads at a time, and its warps: measured on an H100.
_TILES = (
    (1 << 10, (128, 16, 4)),
    (1 << 12, (512, 32, 8)),
    (1 << 13, (512, 32, 4)),
    (1 << 14, (256, 32, 4)),
    (3 << 13, (64, 64, 2)),
    (1 << 16, (128, 64, 4)),
)
#: The same where a token has at least so many lookups: measured on an H200.
_MANY_LOOKUPS = 512
_TILES_OF_MANY = (
    (1 << 12, (512, 64, 16)),
    (1 << 13, (512, 64, 8)),
    (1 << 14, (256, 32, 4)),
    (3 << 13, (64, 64, 2)),
    (1 << 15, (128, 64, 4)),
    (1 << 16, (64, 64, 2)),
)
_LARGE_TILE = (32, 64, 2)
#: Activations read at a time for a norm's statistics, at most.
_NORM_BLOCK = 8192


def hashed_gather_sum(
    table: Tensor,
    x: Tensor,
    bits: int,
    score: str,
    temperature: float,
    name: str,
    *,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return [N, D] in table.dtype; see `mfdist.kernels.hashed_gather_sum`."""
    num_tokens, num_lookups, dim = x.shape[0], x.shape[1] // bits, table.shape[1]
    if not 0 < num_tokens <= FEW_TOKENS or not num_lookups * dim:
        codes, scores = sign_hash(x if norm is None else normalised(x, norm), bits, score, temperature)
        out = gather_sum(table, codes, scores, 1 << bits, name)
        for addend in (bias, residual):
            out = out if addend is None else out.add_(addend)
        return out
    table, x = table.contiguous(), x.contiguous()
    bias, residual = (each if each is None else each.contiguous() for each in (bias, residual))
    weight, shift = (None, None) if norm is None else (norm.weight, norm.shift)
    weight, shift = (each if each is None else each.contiguous() for each in (weight, shift))
    out = table.new_empty(num_tokens, dim)
    lookups, columns, warps = tile(num_tokens, num_lookups, dim)
    is_chained = can_chain(table)
    options = {"num_warps": warps, **LAUNCH_OPTIONS, **chain_options(is_chained=is_chained)}
    with device_of(table):
        _sum_hashed[(triton.cdiv(dim, columns), num_tokens)](
            table, x, weight, shift, bias, residual, out, num_lookups, dim, -2 / temperature, norm.eps if norm else 0.0,
            bits, next_power_of_2(bits), score == "released", lookups, columns,
            norm is not None, norm is not None and norm.is_centred, min(_NORM_BLOCK, next_power_of_2(x.shape[1])),
            32 * warps, is_chained, **options,
        )  # fmt: skip
    return out


def tile(num_tokens: int, num_lookups: int, dim: int) -> tuple[int, int, int]:
    """Return lookups and columns that a program reads at a time, and its warps."""
    num_sums = num_tokens * dim
    tiles = _TILES if num_lookups < _MANY_LOOKUPS else _TILES_OF_MANY
    most, columns, warps = next((sizes for limit, sizes in tiles if num_sums <= limit), _LARGE_TILE)
    lookups = min(most, next_power_of_2(num_lookups))
    return lookups, min(columns, next_power_of_2(dim)), min(warps, max(2, lookups // 32))


@triton.jit
def _sum_hashed(
    table, x, weight, shift, bias, residual, out, K, D, slope, eps,
    BITS: tl.constexpr, WIDTH: tl.constexpr, IS_RELEASED: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_NORM: tl.constexpr, IS_CENTRED: tl.constexpr, NORM_BLOCK: tl.constexpr,
    SECTORS: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum K rows for one token in COLUMNS columns, LOOKUPS of them hashed and read at a time, added up at the end."""
    n = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = c < D
    if IS_CHAINED:
        if weight is not None:
            prefetch(weight, K * BITS, tl.program_id(0), SECTORS)
        if shift is not None:
            prefetch(shift, K * BITS, tl.program_id(0), SECTORS)
        wait_for_inputs()
    total = tl.zeros([COLUMNS], tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=is_column, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + n * D + c, mask=is_column, other=0.0).to(tl.float32)
    x += n * K * BITS
    mean, scale = 0.0, 1.0
    if HAS_NORM:
        mean, scale = statistics(x, K * BITS, eps, IS_CENTRED, NORM_BLOCK)
    i = tl.arange(0, WIDTH)
    totals = tl.zeros([LOOKUPS, COLUMNS], tl.float32)
    for first in range(0, K, LOOKUPS):
        k = first + tl.arange(0, LOOKUPS)
        is_lookup = k < K
        at = k[:, None] * BITS + i[None, :]
        is_wanted = is_lookup[:, None] & (i < BITS)[None, :]
        z = tl.load(x + at, mask=is_wanted, other=0.0).to(tl.float32)
        if HAS_NORM:
            z = apply_norm(z, mean, scale, weight, shift, at, is_wanted, x.dtype.element_ty)
        code, score = hash_chunks(z, slope, BITS, WIDTH, IS_RELEASED)
        row = code.to(tl.int64) + (k.to(tl.int64) << BITS)
        rows = tl.load(table + row[:, None] * D + c[None, :], mask=is_lookup[:, None] & is_column[None, :], other=0)
        totals += as_fp32(rows) * tl.where(is_lookup, score, 0.0)[:, None]
    if IS_CHAINED:
        start_next()
    total += tl.sum(totals, axis=0)
    tl.store(out + n * D + c, total.to(out.dtype.element_ty), mask=is_column)
