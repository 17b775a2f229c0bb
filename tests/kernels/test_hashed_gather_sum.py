"""The lookup of activations: what sign_hash and gather_sum give one after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mfdist import MemoryLayer
from mfdist.errors import ConfigError
from mfdist.kernels import Norm, gather_sum, hashed_gather_sum, sign_hash
from mfdist.testing import oracles
from mfdist.testing.tolerances import TOLERANCES, relative_error


def arguments(num_tokens: int, bits: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(5 << bits, dim).to(dtype), torch.randn(num_tokens, 5 * bits).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
@pytest.mark.parametrize("bits", [1, 8, 10])
def test_what_the_two_give(num_tokens: int, bits: int, dtype: torch.dtype) -> None:
    table, x = arguments(num_tokens, bits, 40, dtype)
    for score in ("paper", "released"):
        expected = gather_sum(table, *sign_hash(x, bits, score, 0.7), 1 << bits)
        assert torch.equal(hashed_gather_sum(table, x, bits, score, 0.7), expected)


def norm_of(x: Tensor, *, is_centred: bool) -> Norm:
    weight = torch.randn(x.shape[1]).to(x)
    return Norm(is_centred, 1e-5, weight, torch.randn(x.shape[1]).to(x) if is_centred else None)


def expected_after(norm: Norm, table: Tensor, x: Tensor, bits: int, bias: Tensor, residual: Tensor) -> Tensor:
    """Return norm, hash, lookup and sums by numpy in float64; what is hashed is rounded to x's dtype."""
    weight, shift = (None if each is None else each.double().cpu().numpy() for each in (norm.weight, norm.shift))
    z = torch.from_numpy(oracles.norm(x.double().cpu().numpy(), norm.is_centred, norm.eps, weight, shift)).to(x.dtype)
    codes, scores = oracles.sign_hash(z.double().numpy(), bits, "paper", 1.0)
    expected = oracles.gather_sum(table.double().cpu().numpy(), codes, scores, 1 << bits)
    return torch.from_numpy(expected) + bias.double().cpu() + residual.double().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 1, 63])
@pytest.mark.parametrize("is_centred", [False, True])
def test_a_norm_before_and_sums_after(num_tokens: int, is_centred: bool, dtype: torch.dtype) -> None:
    table, x = arguments(num_tokens, 8, 40, dtype)
    norm = norm_of(x, is_centred=is_centred)
    bias, residual = torch.randn(40).to(dtype), torch.randn(num_tokens, 40).to(dtype)
    got = hashed_gather_sum(table, x, 8, norm=norm, bias=bias, residual=residual)
    assert got.dtype == dtype
    error = relative_error(got.double().numpy(), expected_after(norm, table, x, 8, bias, residual).numpy())
    assert error <= TOLERANCES[str(dtype).removeprefix("torch.")]
    plain = Norm(is_centred, 1e-5)
    ones = Norm(is_centred, 1e-5, torch.ones(40).to(dtype), torch.zeros(40).to(dtype))
    assert torch.equal(hashed_gather_sum(table, x, 8, norm=plain), hashed_gather_sum(table, x, 8, norm=ones))


def test_the_operator_is_sound() -> None:
    table, x = arguments(7, 4, 9, torch.float32)
    norm, sums = norm_of(x, is_centred=True), (torch.randn(9), torch.randn(7, 9))
    torch.library.opcheck(
        torch.ops.mfdist.hashed_gather_sum.default,
        (table, x, 4, "paper", 1.0, "t", True, 1e-5, norm.weight, norm.shift, *sums),
    )
    torch.library.opcheck(torch.ops.mfdist.hashed_gather_sum.default, (table, x, 4, "paper", 1.0, "t"))
    meta = hashed_gather_sum(table.to("meta"), x.to("meta"), 4)
    assert (meta.shape, meta.dtype) == ((7, 9), torch.float32)
    with pytest.raises(NotImplementedError, match="call sign_hash and gather_sum"):
        hashed_gather_sum(table.requires_grad_(), x, 4).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("table", "x", "message"),
    [
        (torch.ones(31, 3), torch.ones(2, 8), r"must be \[K · 2\^bits, D\] = \[32, D\] on cpu; got \[31, 3\]"),
        (torch.ones(32, 3).int(), torch.ones(2, 8), "rows must be in fp32"),
        (torch.ones(32, 3), torch.ones(2, 8).double(), "got rows in torch.float32 and activations in torch.float64"),
        (torch.ones(32, 3), torch.ones(2, 9), "divide d; got bits=4, d=9"),
    ],
)
def test_what_does_not_fit(table: Tensor, x: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hashed_gather_sum(table, x, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bias": torch.ones(4)}, r'the bias must be \[3\] in torch.float32 on cpu; got \[4\] .* for table "t"'),
        (
            {"residual": torch.ones(2, 3).half()},
            r"the residual must be \[2, 3\] in torch.float32 .*; got .* torch.float16",
        ),
        ({"norm": Norm(True, 1e-5, torch.ones(7))}, r"the norm's weight must be \[8\]"),
        ({"norm": Norm(True, 1e-5, None, torch.ones(8).double())}, "the norm's shift must be .* got .* torch.float64"),
    ],
)
def test_what_does_not_fit_around_it(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hashed_gather_sum(torch.ones(32, 3), torch.ones(2, 8), 4, name="t", **given)


def test_a_layer_gives_the_same_with_and_without_gradients() -> None:
    layer, x = MemoryLayer(24, 40, bits=8, bias=True), torch.randn(2, 3, 24)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow, layer(x)) and narrow.dtype == torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "dim"), [(1, 1000), (1, 5120), (8, 4096), (100, 64)])
def test_on_a_gpu(num_tokens: int, dim: int, dtype: torch.dtype) -> None:
    for bits in (8, 10):
        table, x = (each.cuda() for each in arguments(num_tokens, bits, dim, dtype))
        expected = gather_sum(table.double().cpu(), *sign_hash(x.double().cpu(), bits), 1 << bits)
        got = hashed_gather_sum(table, x, bits).double().cpu()
        assert (got - expected).norm() <= expected.norm() * (1e-5 if dtype == torch.float32 else 4e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = hashed_gather_sum(table, x, bits)
        x.neg_()
        graph.replay()
        assert torch.equal(out, hashed_gather_sum(table, x, bits))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "width", "dim"), [(1, 512, 1000), (3, 4096, 512), (8, 12288, 40), (100, 64, 64)]
)
def test_a_norm_and_sums_on_a_gpu(num_tokens: int, width: int, dim: int, is_centred: bool, dtype: torch.dtype) -> None:
    table, x = torch.randn(width // 8 << 8, dim).to(dtype).cuda(), torch.randn(num_tokens, width).to(dtype).cuda()
    norm = norm_of(x, is_centred=is_centred)
    bias, residual = torch.randn(dim).to(x), torch.randn(num_tokens, dim).to(x)
    expected = expected_after(norm, table, x, 8, bias, residual)
    graph = torch.cuda.CUDAGraph()
    got = hashed_gather_sum(table, x, 8, norm=norm, bias=bias, residual=residual)
    with torch.cuda.graph(graph):
        out = hashed_gather_sum(table, x, 8, norm=norm, bias=bias, residual=residual)
    graph.replay()
    assert torch.equal(out, got)
    bound = 1e-5 if dtype == torch.float32 else TOLERANCES[str(dtype).removeprefix("torch.")]
    assert (got.double().cpu() - expected).norm() <= expected.norm() * bound
