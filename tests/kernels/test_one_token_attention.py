"""Attention of one new token over a cache, against numpy in float64."""

from typing import Any

import pytest
import torch

from mfdist.errors import ConfigError
from mfdist.kernels import one_token_attention
from tests.kernels.attentions import Attention, expected_attention, make_attention
from tests.kernels.lookups import assert_is

SHAPES = [(3, 2, 5, 8, 2), (1, 3, 0, 40, 20), (2, 1, 17, 1, 0), (1, 2, 130, 80, 8), (0, 2, 5, 8, 2)]


def assert_attends(made: Attention) -> None:
    expected = expected_attention(made)
    num_seen = made.length + 1
    assert_is(one_token_attention(*made), expected.out, made.qkv.dtype)
    assert_is(made.keys[:, :, :num_seen], expected.keys, made.qkv.dtype)
    assert_is(made.values[:, :, :num_seen], expected.values, made.qkv.dtype)
    assert made.keys[:, :, num_seen:].isnan().all() and made.values[:, :, num_seen:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_it_gives_and_stores(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    for has_residual in (False, True):
        assert_attends(make_attention(*shape, dtype, has_residual=has_residual, has_own_angles=has_residual))


def test_the_operator_is_sound() -> None:
    made = make_attention(2, 2, 5, 8, 2, torch.float32, has_residual=True)
    torch.library.opcheck(torch.ops.mfdist.one_token_attention.default, tuple(made))
    meta = one_token_attention(*(each.to("meta") if isinstance(each, torch.Tensor) else each for each in made))
    assert (meta.shape, meta.dtype) == ((2, 1, 16), torch.float32)


def test_compiled_it_fills_the_cache_it_was_given() -> None:
    made, again = (make_attention(2, 2, 5, 8, 2, torch.float32, has_residual=True) for _ in range(2))
    for one, two in zip(made, again, strict=True):
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            two.copy_(one)
    compiled = torch.compile(lambda *each: one_token_attention(*each) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*made), one_token_attention(*again) * 2)
    assert torch.equal(made.keys[:, :, :6], again.keys[:, :, :6])
    assert torch.equal(made.values[:, :, :6], again.values[:, :, :6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qkv": torch.ones(2, 1, 40)},
            r"qkv must be \[B, 1, 3 · H · E\] = \[2, 1, 48\] as the cache is; got \[2, 1, 40\]",
        ),
        ({"keys": torch.ones(2, 2, 9, 8)}, r"contiguous keys and values .*; got \[2, 2, 9, 8\] and \[2, 2, 8, 8\]"),
        ({"keys": torch.ones(2, 8, 2, 8).mT.reshape(2, 2, 8, 8).transpose(0, 1)}, "a cache must be contiguous"),
        (
            {"cosine": torch.ones(3, 1, 1, 2)},
            r"must be \[2 or 1, 1, 1, at most 4\]; got \[3, 1, 1, 2\] and \[2, 1, 1, 2\]",
        ),
        ({"cosine": torch.ones(1, 1, 1, 5), "sine": torch.ones(1, 1, 1, 5)}, r"at most 4\]; got \[1, 1, 1, 5\]"),
        ({"residual": torch.ones(2, 1, 8)}, r"the residual must be \[2, 1, 16\]; got \[2, 1, 8\]"),
        ({"residual": torch.ones(2, 1, 16).half()}, "must be as qkv is; .* and torch.float16 on cpu"),
        ({"length": 8}, "must fit the cache; got 9 tokens, capacity 8"),
        ({"length": -1}, "must fit the cache"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    made = make_attention(2, 2, 5, 8, 2, torch.float32)
    before = made.keys.clone()
    with pytest.raises(ConfigError, match=message):
        one_token_attention(*made._replace(**change))
    torch.testing.assert_close(made.keys, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 16, 100, 256, 32), (8, 16, 2047, 64, 8), (1, 4, 300, 300, 10)])
def test_on_a_gpu(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    for has_residual in (False, True):
        made = make_attention(*shape, dtype, has_residual=has_residual, device="cuda")
        assert_attends(made)
        if not shape[0]:  # a graph of no kernels is warned of
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = one_token_attention(*made)
        made.qkv.neg_()
        made.keys[:, :, made.length] = torch.nan
        graph.replay()
        stored = made.keys[:, :, made.length].clone()
        assert torch.equal(out, one_token_attention(*made)) and torch.equal(made.keys[:, :, made.length], stored)
