"""The lookup of activations: what sign_hash and gather_sum give one after the other."""

import pytest
import torch
from torch import Tensor

from mfdist import MemoryLayer
from mfdist.errors import ConfigError
from mfdist.kernels import gather_sum, hashed_gather_sum, sign_hash


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


def test_the_operator_is_sound() -> None:
    table, x = arguments(7, 4, 9, torch.float32)
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
        (torch.ones(32, 3), torch.ones(2, 8).double(), "got torch.float32 and torch.float64"),
        (torch.ones(32, 3), torch.ones(2, 9), "divide d; got bits=4, d=9"),
    ],
)
def test_what_does_not_fit(table: Tensor, x: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hashed_gather_sum(table, x, 4)


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
