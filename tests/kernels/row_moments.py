"""Adam's moments in a byte each, to test with: what bytes stand for, and values that all have exactly."""

from collections.abc import Callable

import torch
from torch import Tensor

from mfdist.kernels.row_update import RowRule, reference

#: (gradients, rule, step, offsets) → the two states of bytes after an update from zeros.
Update = Callable[[Tensor, RowRule, int, tuple[int, int]], list[Tensor]]


def momentum_of(state: Tensor) -> Tensor:
    """Return what bytes of the first moment stand for, in float64, by torch's own e5m2."""
    return state.view(torch.float8_e5m2).double() * 2.0**-14


def root_of(state: Tensor) -> Tensor:
    """Return the root of the second moment that bytes stand for, from 5 bits of exponent, 3 of fraction."""
    exponent, fraction = state.int() // 8, (state % 8).double() / 8
    whole = torch.ldexp(1 + fraction, exponent - 29)
    return torch.where(exponent > 0, whole, fraction * 2.0**-28)


def assert_rounds_as_the_reference(update: Update) -> None:
    """Round values that an update computes exactly: with betas of 0, m is the gradient, and √v its size."""
    offsets, rule = (2**45, 2**20 + 1), RowRule(kind="adam", betas=(0.0, 0.0), seed=2**62 + 3)
    for step, columns in ((1, 1), (2**33 + 1, 300)):
        exponents = torch.randint(-36, 4, (20, columns)).float()
        halves = torch.randint(-4000, 4000, (20, columns)).float() / 1024  # whose squares fp32 has exactly
        grads = torch.cat([torch.randn(20, columns) * 2**exponents, halves * 2**exponents])
        grads[:, :1] = torch.tensor([3.4e38, -3.4e38, 3.5, 3.49, -3.49, 0.0, 1e-9, 1e-40] * 5).unsqueeze(1)
        state = update(grads, rule, step, offsets)
        rows = torch.arange(40)
        expected = reference.rounded(grads, torch.uint8, rule.seed, step, 1, rows, offsets)
        assert torch.equal(state[0] & 0x7F, expected & 0x7F)  # a zero's sign is nobody's
        assert torch.equal(momentum_of(state[0]), momentum_of(expected))
        squares = grads[20:].double().square()
        expected = reference.rounded(squares, torch.uint8, rule.seed, step, 2, rows[20:], offsets)
        assert torch.equal(state[1][20:, 1:], expected[:, 1:])
        assert len(expected.unique()) > 15 or columns == 1
