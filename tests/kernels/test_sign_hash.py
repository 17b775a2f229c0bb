"""sign_hash on the CPU against the float64 oracle, and its rules at 0, NaN and infinity."""

import math

import numpy as np
import pytest
import torch

from mfdist.errors import ConfigError
from mfdist.kernels import sign_hash
from mfdist.kernels.sign_hash import cpu_impl
from mfdist.testing import oracles
from mfdist.testing.tolerances import relative_error
from tests.kernels.lookups import assert_is

SCORES = ("paper", "released")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bits", [1, 3, 8, 9, 16, 24])
@pytest.mark.parametrize("num_tokens", [0, 1, 100])
def test_forward_and_gradient(num_tokens: int, bits: int, score: str) -> None:
    x = (2 * torch.randn(num_tokens, 3 * bits)).requires_grad_()
    codes, scores = sign_hash(x, bits, score)
    assert codes.dtype == (torch.uint8 if bits <= 8 else torch.uint16 if bits <= 16 else torch.int32)
    expected_codes, expected = oracles.sign_hash(x.detach().double().numpy(), bits, score)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert_is(scores, expected, torch.float32)
    grad = torch.randn(num_tokens, 3)
    scores.backward(grad)  # type: ignore[no-untyped-call]
    assert_is(
        x.grad,
        oracles.sign_hash_gradient(x.detach().double().numpy(), grad.double().numpy(), bits, score),
        torch.float32,
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations(dtype: torch.dtype, score: str) -> None:
    x = torch.randn(40, 32).to(dtype).requires_grad_()
    codes, scores = sign_hash(x, 8, score, 0.5)
    expected_codes, expected = oracles.sign_hash(x.detach().double().numpy(), 8, score, 0.5)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert_is(scores, expected, torch.float32)
    scores.sum().backward()  # type: ignore[no-untyped-call]
    ones = np.ones(scores.shape)
    assert_is(x.grad, oracles.sign_hash_gradient(x.detach().double().numpy(), ones, 8, score, 0.5), dtype)


@pytest.mark.parametrize("score", SCORES)
def test_the_oracle_by_finite_differences(score: str) -> None:
    rng = np.random.default_rng(0)
    x, grad = rng.normal(size=(3, 8)), rng.normal(size=(3, 2))
    numeric = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        kept, sides = x[index], []
        for step in (1e-6, -1e-6):
            x[index] = kept + step
            sides.append((oracles.sign_hash(x, 4, score, 0.7)[1] * grad).sum())
        x[index] = kept
        numeric[index] = (sides[0] - sides[1]) / 2e-6
    assert relative_error(oracles.sign_hash_gradient(x, grad, 4, score, 0.7), numeric) < 1e-7


@pytest.mark.parametrize("score", SCORES)
def test_float64_by_finite_differences(score: str) -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sign_hash(x, 4, score, 1.5)[1], (x,))


def test_the_first_activation_is_the_highest_bit() -> None:
    codes, _ = sign_hash(torch.tensor([[1.0, -1.0, -1.0, -1.0, -1.0, 1.0]]), 3)
    assert codes.tolist() == [[4, 1]]


@pytest.mark.parametrize("score", SCORES)
def test_zero_of_either_sign_is_a_one_with_no_slope(score: str) -> None:
    x = torch.tensor([[0.0, -0.0, -1.0]], requires_grad=True)
    codes, scores = sign_hash(x, 3, score)
    assert codes.item() == 0b110
    scores.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad[0, :2].tolist() == [0.0, 0.0]
    assert x.grad[0, 2] < 0  # a larger |z| makes either score larger


@pytest.mark.parametrize("score", SCORES)
def test_nan_gives_bit_0_and_shows_in_its_own_chunk(score: str) -> None:
    x = torch.tensor([[math.nan, 1.0, 1.0, 1.0]], requires_grad=True)
    codes, scores = sign_hash(x, 2, score)
    assert codes.tolist() == [[0b01, 0b11]]
    assert scores.isnan().tolist() == [[True, False]]
    scores.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.isnan().tolist() == [[True, True, False, False]]


def test_infinity_is_certain() -> None:
    x = torch.tensor([[math.inf, -math.inf, 0.5, 0.5]], requires_grad=True)
    codes, scores = sign_hash(x, 4)
    assert codes.item() == 0b1011
    assert_is(scores, [[1 / (1 + math.exp(-1)) ** 2]], torch.float32)
    scores.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad[0, :2].abs().max() < 1e-30
    assert x.grad[0, 2:].min() > 0
    assert sign_hash(x, 4, "released")[1].item() == math.inf


def test_large_activations_neither_overflow_nor_lose_their_gradient_rule() -> None:
    x = torch.tensor([[3e38, -3e38], [1e-45, -1e-45]], requires_grad=True)
    codes, scores = sign_hash(x, 2)
    assert codes.tolist() == [[0b10], [0b10]]
    assert scores[0].item() == 1.0
    assert scores[1].item() == pytest.approx(0.25)
    scores.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("view", ["columns", "transposed", "expanded"])
def test_strided_activations(view: str) -> None:
    base = torch.randn(30, 30)
    x = {"columns": base[::2, 3:27], "transposed": base[:24].t(), "expanded": base[:1, :24].expand(5, 24)}[view]
    assert not x.is_contiguous()
    x = x.detach().requires_grad_()
    codes, scores = sign_hash(x, 8)
    again_codes, again = sign_hash(x.detach().contiguous(), 8)
    assert torch.equal(codes, again_codes) and torch.equal(scores, again)
    scores.sum().backward()  # type: ignore[no-untyped-call]
    ones = np.ones(scores.shape)
    assert_is(x.grad, oracles.sign_hash_gradient(x.detach().double().numpy(), ones, 8, "paper"), torch.float32)


def test_threads_and_repeats_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_impl, "_PARALLEL_WORK", 0)
    x, results = torch.randn(500, 96), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            codes, scores = sign_hash(leaf, 8, "released")
            scores.sum().backward()  # type: ignore[no-untyped-call]
            results.append((codes, scores.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8), 0), "bits=0"),
        ((torch.zeros(2, 50), 25), "bits=25"),
        ((torch.zeros(2, 8), 3), "bits=3, d=8"),
        ((torch.zeros(8), 4), r"\[8\]"),
        ((torch.zeros(2, 8, dtype=torch.int32), 4), "int32"),
        ((torch.zeros(2, 8), 4, "papers"), 'score must be one of paper, released; got "papers"'),
        ((torch.zeros(2, 8), 4, "paper", 0.0), "temperature must be positive; got 0.0"),
        ((torch.zeros(2, 8), 4, "paper", math.nan), "temperature must be positive; got nan"),
    ],
)
def test_arguments_that_do_not_fit(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sign_hash(*arguments)  # type: ignore[arg-type]
