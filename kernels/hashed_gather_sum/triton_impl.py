"""hashed_gather_sum on a GPU: for few tokens, every program hashes the chunks whose rows it is about to read.

That is the same work in each of a token's programs, but little of it, and it saves a launch: at decode a launch takes
about as long as a lookup. The norm before it is taken in where a program reads all of a token at once, and is a kernel
of its own where not. Codes made in place need no check. Many tokens are hashed once, and looked up after.
"""

import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.gather_sum.triton_impl import FEW_TOKENS, gather_sum
from mfdist.kernels.hashed_gather_sum.norm import Norm, normalised
from mfdist.kernels.hashed_gather_sum.triton_norm import normalise, prefetch_parts
from mfdist.kernels.sign_hash.triton_impl import codes_of, scores_of, sign_hash
from mfdist.kernels.triton_chain import start_next, wait_for_inputs
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
    (1 << 14, (512, 64, 8)),
    (3 << 13, (64, 64, 2)),
    (1 << 15, (128, 64, 4)),
    (1 << 16, (64, 64, 2)),
)
_LARGE_TILE = (32, 64, 2)


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
    out = table.new_empty(num_tokens, dim)
    lookups, columns, warps = tile(num_tokens, num_lookups, dim)
    is_one_round = lookups >= num_lookups
    if norm is not None and not is_one_round:
        x, norm = normalise(x, norm), None
    weight, shift = (None, None) if norm is None else (norm.weight, norm.shift)
    weight, shift = (each if each is None else each.contiguous() for each in (weight, shift))
    is_chained = can_chain(table)
    options = {"num_warps": warps, **LAUNCH_OPTIONS, **chain_options(is_chained=is_chained)}
    with device_of(table):
        _sum_hashed[(triton.cdiv(dim, columns), num_tokens)](
            table, x, weight, shift, bias, residual, out, num_lookups, dim, -2 / temperature, norm.eps if norm else 0.0,
            bits, next_power_of_2(bits), score == "released", lookups, columns,
            is_one_round, norm is not None, norm is not None and norm.is_centred, 32 * warps, is_chained, **options,
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
    IS_ONE_ROUND: tl.constexpr, HAS_NORM: tl.constexpr, IS_CENTRED: tl.constexpr,
    SECTORS: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum K rows for one token in COLUMNS columns, LOOKUPS of them hashed and read at a time, added up at the end.

    IS_ONE_ROUND: these are all there are; only then can there be a norm.
    """
    n = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = c < D
    if IS_CHAINED:
        if HAS_NORM:
            prefetch_parts(weight, shift, K * BITS, tl.program_id(0), SECTORS)
        wait_for_inputs()
    x += n * K * BITS
    if IS_ONE_ROUND:
        if IS_CHAINED:
            start_next()
        added = _addend(bias, residual, n, D, c, is_column, COLUMNS)
        rows, score = _read(
            table, x, weight, shift, 0, K, D, slope, eps, c, is_column,
            BITS, WIDTH, IS_RELEASED, LOOKUPS, HAS_NORM, IS_CENTRED,
        )  # fmt: skip
        totals = as_fp32(rows) * score[:, None]
    else:
        totals = tl.zeros([LOOKUPS, COLUMNS], tl.float32)
        for first in range(0, K, LOOKUPS):
            rows, score = _read(
                table, x, weight, shift, first, K, D, slope, eps, c, is_column,
                BITS, WIDTH, IS_RELEASED, LOOKUPS, HAS_NORM, IS_CENTRED,
            )  # fmt: skip
            totals += as_fp32(rows) * score[:, None]
        if IS_CHAINED:
            start_next()
        # Read last: registers decide how many programs run at a time, and those hide that it takes a while.
        added = _addend(bias, residual, n, D, c, is_column, COLUMNS)
    total = tl.sum(totals, axis=0) + added
    tl.store(out + n * D + c, total.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _addend(bias, residual, n, D, c, is_column, COLUMNS: tl.constexpr):
    """Return what is added to one token's sums, [COLUMNS]."""
    added = tl.zeros([COLUMNS], tl.float32)
    if bias is not None:
        added += tl.load(bias + c, mask=is_column, other=0.0).to(tl.float32)
    if residual is not None:
        added += tl.load(residual + n * D + c, mask=is_column, other=0.0).to(tl.float32)
    return added


@triton.jit
def _read(
    table, x, weight, shift, first, K, D, slope, eps, c, is_column,
    BITS: tl.constexpr, WIDTH: tl.constexpr, IS_RELEASED: tl.constexpr, LOOKUPS: tl.constexpr,
    HAS_NORM: tl.constexpr, IS_CENTRED: tl.constexpr,
):  # fmt: skip
    """Return the rows of the lookups from the first on, [LOOKUPS, COLUMNS], and their scores, 0 past the last."""
    i = tl.arange(0, WIDTH)
    k = first + tl.arange(0, LOOKUPS)
    is_lookup = k < K
    at = k[:, None] * BITS + i[None, :]
    is_wanted = is_lookup[:, None] & (i < BITS)[None, :]
    z = tl.load(x + at, mask=is_wanted, other=0.0).to(tl.float32)
    if HAS_NORM:
        # All that is read is asked for before a sum over the token makes the warps wait for each other.
        factor = 1.0 if weight is None else tl.load(weight + at, mask=is_wanted, other=0.0).to(tl.float32)
        offset = 0.0 if shift is None else tl.load(shift + at, mask=is_wanted, other=0.0).to(tl.float32)
        if IS_CENTRED:
            z = tl.where(is_wanted, z - tl.sum(z) / (K * BITS), 0.0)
        squares = z * z
        z *= factor
    # A scale changes no sign, so rows can be asked for before it is known; in fp16 it may make a value a zero.
    IS_SIGNED: tl.constexpr = not HAS_NORM or (shift is None and x.dtype.element_ty != tl.float16)
    if not IS_SIGNED:
        scale = 1.0 / tl.sqrt(tl.sum(squares) / (K * BITS) + eps)
        z = tl.where(is_wanted, (z * scale + offset).to(x.dtype.element_ty).to(tl.float32), 0.0)
    row = codes_of(z, BITS, WIDTH).to(tl.int64) + (k.to(tl.int64) << BITS)
    rows = tl.load(table + row[:, None] * D + c[None, :], mask=is_lookup[:, None] & is_column[None, :], other=0)
    if HAS_NORM and IS_SIGNED:
        scale = 1.0 / tl.sqrt(tl.sum(squares) / (K * BITS) + eps)
        z = (z * scale).to(x.dtype.element_ty).to(tl.float32)
    return rows, tl.where(is_lookup, scores_of(z, slope, BITS, WIDTH, IS_RELEASED), 0.0)
