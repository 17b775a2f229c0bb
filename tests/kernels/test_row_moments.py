"""Adam's moments in a byte each: how they are rounded, that updates too small for them count, and where all agree."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels.row_update import RowRule, fused_row_update, reference, row_update
from tests.kernels.lookups import make_lookup
from tests.kernels.row_moments import assert_rounds_as_the_reference, momentum_of, root_of
from tests.kernels.updates import LR, RULES, STEP, Updated, assert_close, make_updated, reference_update

ADAM = RULES[2]
FLOATS = st.floats(width=32, allow_nan=False)
#: What the bytes can stand for, without a sign.
MOMENTA = momentum_of(torch.arange(0x7C, dtype=torch.uint8))
ROOTS = root_of(torch.arange(30 * 8 + 7, dtype=torch.uint8))


def updated(grads: Tensor, rule: RowRule, step: int = 1, offsets: tuple[int, int] = (0, 0)) -> list[Tensor]:
    """Return the bytes that gradients of any size leave in states that began as zeros."""
    state = [torch.zeros(grads.shape, dtype=torch.uint8, device=grads.device) for _ in range(2)]
    device = grads.device
    row_update(
        torch.zeros(grads.shape, device=device), state, grads, rule,
        torch.tensor(0.0, device=device), torch.tensor(step, device=device),
        mean_squares=torch.zeros(grads.shape[0], device=device), row_offset=offsets[0], column_offset=offsets[1],
    )  # fmt: skip
    return state


def kept(values: Tensor, seed: int = 0, step: int = 1) -> list[Tensor]:
    """Return what becomes of values as first moments, and of their sizes as roots of second ones, in float64."""
    made = updated(values, RowRule(kind="adam", betas=(0.0, 0.0), seed=seed), step)
    rows = torch.arange(values.shape[0])
    roots = reference.rounded(values.double().square(), torch.uint8, seed, step, 2, rows, (0, 0))
    return [momentum_of(made[0]), root_of(roots)]


def test_the_cpu_rounds_to_the_references_bytes() -> None:
    assert_rounds_as_the_reference(updated)


@given(st.lists(FLOATS, min_size=1, max_size=40), st.integers(0, 2**63 - 1), st.integers(1, 2**40))
def test_a_value_becomes_a_neighbour_with_its_sign_or_the_largest(values: list[float], seed: int, step: int) -> None:
    x = torch.tensor([values]).nan_to_num(posinf=3e38, neginf=-3e38)
    for got, grid, bits in zip(kept(x, seed, step), (MOMENTA, ROOTS), (2, 3), strict=True):
        size, found = x.double().abs().clamp(max=3.5), got.abs()
        if bits == 2:
            assert (got * x.double() >= 0).all()
        below = grid[torch.searchsorted(grid, size, right=True) - 1]
        above = grid[torch.searchsorted(grid, size).clamp(max=len(grid) - 1)]
        # What is next to nothing beside the grid's first steps is rounded away or up to them first.
        assert ((found == below) | (found == above) | ((size - found).abs() <= 2.0**-51)).all()


def test_what_bytes_can_stand_for_stays_as_it_is() -> None:
    for step in (1, 2, 3):
        both = torch.cat([MOMENTA, -MOMENTA]).float().unsqueeze(0)
        assert torch.equal(kept(both, step=step)[0], both.double())
        assert torch.equal(kept(ROOTS.float().unsqueeze(0), step=step)[1], ROOTS.unsqueeze(0))


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=40), st.integers(1, 2**40))
def test_of_two_values_the_larger_never_becomes_less(pairs: list[tuple[float, float]], step: int) -> None:
    low, high = torch.tensor(pairs).nan_to_num(posinf=3e38, neginf=-3e38).sort(dim=1).values.T.unsqueeze(1)
    assert (kept(low, step=step)[0] <= kept(high, step=step)[0]).all()
    small, large = torch.minimum(low.abs(), high.abs()), torch.maximum(low.abs(), high.abs())
    assert (kept(small, step=step)[1] <= kept(large, step=step)[1]).all()


@pytest.mark.parametrize("value", [1.01, -0.3337, 3.49, 2.0**-28 * 1.01, 3e-9, -1e-9, 2e-10, 1e-12])
def test_rounding_is_right_on_average(value: float) -> None:
    """Within five standard deviations, above the least whole value, below it, and below the least there is."""
    exact = float(np.float32(value))
    for got, wanted in zip(kept(torch.full((400, 500), value), seed=5), (exact, abs(exact)), strict=True):
        assert len(got.unique()) == 2
        assert abs(float(got.mean()) - wanted) <= 5 * float(got.std()) / math.sqrt(got.numel())


@pytest.mark.parametrize("beta", [0.95, 0.999, 0.9999])
def test_decay_counts_on_average(beta: float) -> None:
    """Without gradients √v falls by √β a step, of which a byte's step is as much as 2 500 times."""
    state = updated(torch.full((64, 256), 0.0123), RowRule(kind="adam", betas=(0.0, 0.0)))
    rule, num_steps = RowRule(kind="adam", betas=(0.9, beta), seed=9), 60
    none, start = torch.zeros(64, 256), float(root_of(state[1]).mean())
    for step in range(2, num_steps + 2):
        row_update(torch.zeros(64, 256), state, none, rule, torch.tensor(0.0), torch.tensor(step))
    roots = root_of(state[1])
    assert abs(float(roots.mean()) - start * beta ** (num_steps / 2)) <= 5 * float(roots.std()) / math.sqrt(
        roots.numel()
    )


def test_a_moment_that_comes_and_goes_is_adams_on_average() -> None:
    """Gradients of many sizes, 300 steps: the means of both moments over many columns are those in float64."""
    rule, size = RowRule(kind="adam", betas=(0.9, 0.95), seed=2), (200, 100)
    state = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    momentum, variance = torch.zeros(size).double(), torch.zeros(size).double()
    for step in range(1, 301):
        grads = (torch.randn(size) + 0.5) * 1e-4
        momentum = 0.9 * momentum + 0.1 * grads.double()
        variance = 0.95 * variance + 0.05 * grads.double().square()
        row_update(torch.zeros(size), state, grads, rule, torch.tensor(0.0), torch.tensor(step))
    apart = momentum_of(state[0]) - momentum
    assert abs(float(apart.mean())) <= 5 * float(apart.std()) / math.sqrt(apart.numel())
    assert float(apart.std()) < 0.35 * float(momentum.square().mean().sqrt())
    # Rounding is fair to √v, so that v is a few hundredths more than without it.
    assert 0 < float((root_of(state[1]).square() - variance).mean()) < 0.1 * float(variance.mean())


@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
@pytest.mark.parametrize("row_dim", [1, 40, 300])
def test_a_fused_update_is_the_references(row_dim: int, is_compact: bool) -> None:
    lookup = make_lookup(63, 4, 32, row_dim, dtype=torch.bfloat16, is_compact=is_compact)
    before = make_updated(lookup.table, ADAM, torch.uint8)
    got = before.copy()
    fused_row_update(
        got.table, got.state, lookup.row_ids, lookup.scores, lookup.grad_output, ADAM, LR, STEP,
        code_stride=lookup.code_stride,
    )  # fmt: skip
    _, expected = reference_update(before, lookup, ADAM)
    assert_close(got, expected)
    assert not torch.equal(got.state[0], before.state[0])


def test_a_part_is_rounded_as_in_the_whole_table() -> None:
    grads = torch.randn(40, 100)
    whole = updated(grads, ADAM, 3)
    part = updated(grads[25:, 33:].contiguous(), ADAM, 3, (25, 33))
    assert all(torch.equal(one[25:, 33:], two) for one, two in zip(whole, part, strict=True))


def test_a_gradient_that_is_not_finite_leaves_the_bytes() -> None:
    got = make_updated(torch.randn(4, 40), ADAM, torch.uint8)
    before, grads = got.copy(), torch.full((4, 40), 9.0)
    grads[1, 3], grads[2, 0] = torch.nan, -torch.inf
    row_update(got.table, got.state, grads, ADAM, LR, STEP)
    for one, other in zip([got.table, *got.state], [before.table, *before.state], strict=True):
        assert torch.equal(one[1:3], other[1:3]) and not torch.equal(one[0], other[0])


def test_bytes_are_for_adam_alone() -> None:
    with pytest.raises(ConfigError, match="rowwise_adagrad keeps 1 states"):
        row_update(torch.zeros(2, 3), [torch.zeros(2, dtype=torch.uint8)], torch.ones(2, 3), RULES[1], LR, STEP)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    def on_gpu(grads: Tensor, rule: RowRule, step: int, offsets: tuple[int, int]) -> list[Tensor]:
        return [each.cpu() for each in updated(grads.cuda(), rule, step, offsets)]

    assert_rounds_as_the_reference(on_gpu)
    for sizes in ((100, 5, 64, 300), (20, 3, 64, 1024), (100, 2, 8, 1536), (7, 1, 300, 12288)):
        lookup = make_lookup(*sizes, dtype=torch.bfloat16, id_dtype=torch.int32)
        before = make_updated(lookup.table, ADAM, torch.uint8)
        got = Updated(before.table.cuda(), [each.cuda() for each in before.state])
        fused_row_update(
            got.table, got.state, lookup.row_ids.cuda(), lookup.scores.cuda(), lookup.grad_output.cuda(), ADAM,
            LR.cuda(), STEP.cuda(), code_stride=lookup.code_stride,
        )  # fmt: skip
        _, expected = reference_update(before, lookup, ADAM)
        assert_close(got, expected)
