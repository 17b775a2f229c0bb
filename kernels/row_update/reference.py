"""What row_update computes, in plain torch: slow, in float64, and obviously right."""

import torch
from torch import Tensor

from mfdist.kernels.row_gradient import reference as gradients
from mfdist.kernels.row_update.rule import RowRule

_GOLDEN_64 = 0x9E3779B97F4A7C15
_GOLDEN_32 = 0x9E3779B9
_ALL_64 = 2**64 - 1
#: Of states in a byte each: stream → bits of fraction.
_FRACTION_BITS = {1: 2, 2: 3}
_LEAST_EXPONENT, _LARGEST = -28, 3.5


def fused_row_update(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    lr: float,
    step: int,
    rule: RowRule,
    offsets: tuple[int, int] = (0, 0),
    code_stride: int = 0,
) -> Tensor:
    """Update the rows of all lookups in place and return the scores' gradient; ids are taken to be in range."""
    wide = (table.double(), row_ids, scores.double(), grad_output.double(), code_stride)
    grads, grad_scores = gradients.row_gradient(*wide)
    ids = row_ids.long() + code_stride * torch.arange(row_ids.shape[1])
    row_update(table, state, grads, torch.unique(ids), None, lr, step, rule, offsets)
    return grad_scores.to(scores.dtype)


def row_update(
    table: Tensor,
    state: list[Tensor],
    grads: Tensor,
    rows: Tensor | None,
    mean_squares: Tensor | None,
    lr: float,
    step: int,
    rule: RowRule,
    offsets: tuple[int, int] = (0, 0),
) -> None:
    """Update `rows`, or all, in place by their gradients [U, D] or [R, D]; each is taken to be there once."""
    rows = torch.arange(table.shape[0]) if rows is None else rows.long()
    g = (grads if grads.shape[0] == rows.numel() else grads[rows]).double()
    squares = g.square().mean(1) if mean_squares is None else mean_squares.double()
    is_finite = squares < torch.inf
    rows, g, squares = rows[is_finite], g[is_finite], squares[is_finite]
    w = table[rows].double() * (1 - lr * rule.weight_decay)
    if rule.kind == "sgd":
        w -= lr * g
    elif rule.kind == "rowwise_adagrad":
        keep, gain = rule.accumulation
        before = state[0][rows].double()
        accumulated = torch.where(before > 0, keep * before + gain * squares, squares)
        state[0][rows] = accumulated.to(state[0].dtype)
        w -= lr * g / (accumulated.sqrt() + rule.eps).unsqueeze(1)
    else:
        beta1, beta2 = rule.betas
        momentum = beta1 * read_moment(state[0][rows], 1) + (1 - beta1) * g
        variance = beta2 * read_moment(state[1][rows], 2) + (1 - beta2) * g.square()
        w -= lr * momentum / (1 - beta1**step) / ((variance / (1 - beta2**step)).sqrt() + rule.eps)
        for stream, (kept, value) in enumerate(zip(state, (momentum, variance), strict=True), start=1):
            kept[rows] = rounded(value, kept.dtype, rule.seed, step, stream, rows, offsets)
    table[rows] = rounded(w, table.dtype, rule.seed, step, 0, rows, offsets)


def rounded(
    values: Tensor, dtype: torch.dtype, seed: int, step: int, stream: int, rows: Tensor, offsets: tuple[int, int]
) -> Tensor:
    """Return values [U, D] in a dtype: bf16 and bytes rounded stochastically from fp32, others to the nearest."""
    if dtype == torch.uint8:
        return _bytes_of(values, seed, step, stream, rows, offsets)
    if dtype != torch.bfloat16:
        return values.to(dtype)
    words = values.float().view(torch.int32).long() & 0xFFFFFFFF
    words += random_bits(seed, step, stream, rows + offsets[0], values.shape[1], offsets[1])
    high = (words >> 16).to(torch.int32)
    stochastic = (high - ((high & 0x8000) << 1)).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.float().isfinite(), stochastic, values.to(torch.bfloat16))


def read_moment(kept: Tensor, stream: int) -> Tensor:
    """Return m (stream 1) or v (stream 2) in float64 from what a state has kept of it."""
    if kept.dtype != torch.uint8:
        return kept.double()
    words = kept.int() << (10 - _FRACTION_BITS[stream])
    values = words.to(torch.uint16).view(torch.float16).double() * 2.0**-14
    return values.square() if stream == 2 else values


def _bytes_of(values: Tensor, seed: int, step: int, stream: int, rows: Tensor, offsets: tuple[int, int]) -> Tensor:
    """Return m (stream 1) or v (stream 2) in a byte each, by the distance of neighbouring bytes in place of words."""
    fraction_bits = _FRACTION_BITS[stream]
    dropped = 23 - fraction_bits
    exact = (values.sqrt() if stream == 2 else values).float().double()
    sizes = exact.abs().clamp(max=_LARGEST)
    exponents = (torch.frexp(sizes).exponent - 1).clamp(min=_LEAST_EXPONENT)
    spacing = torch.ldexp(torch.ones_like(sizes), exponents - fraction_bits)
    random = random_bits(seed, step, stream, rows + offsets[0], values.shape[1], offsets[1], dropped)
    steps = ((sizes / spacing * 2.0**dropped).round() + random).div(2.0**dropped).floor()
    words = torch.copysign(steps * spacing * 2.0**14, exact).half().view(torch.int16).int()
    return ((words >> (10 - fraction_bits)) & 0xFF).to(torch.uint8)


def random_bits(
    seed: int, step: int, stream: int, rows: Tensor, num_columns: int, column_offset: int, num_bits: int = 16
) -> Tensor:
    """Return the random bits of each row [U] and column, int64 [U, num_columns]; see `rule`."""
    key = mix64((mix64(seed) + 4 * step + stream) & _ALL_64)
    row_keys = [mix64((key + row * _GOLDEN_64) & _ALL_64) >> 32 for row in rows.tolist()]
    columns = (torch.arange(num_columns) + column_offset) * _GOLDEN_32
    x = (torch.tensor(row_keys, dtype=torch.int64).unsqueeze(1) + columns) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = _product32(x ^ (x >> shift), factor)
    return (x ^ (x >> 16)) >> (32 - num_bits)


def mix64(x: int) -> int:
    """Return a 64-bit integer well mixed; see `rule`."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _ALL_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _ALL_64
    return x ^ (x >> 31)


def _product32(x: Tensor, factor: int) -> Tensor:
    """Return the low 32 bits of a product, from halves that fit int64."""
    return (x * (factor & 0xFFFF) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & 0xFFFFFFFF
