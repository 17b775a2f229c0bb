"""MemoryLayer as a drop-in for nn.Linear: values and gradients against numpy, shapes, dtypes, autocast, misuse."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from mfdist.errors import ConfigError
from mfdist.layers import MemoryLayer
from mfdist.spec import TableSpec
from mfdist.tables.local import LocalTable

from .models import numpy_memoryformer


def layer(in_features=12, out_features=7, bits=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = MemoryLayer(in_features, out_features, bits, dtype=dtype, std=0.7, **options)
    if made.bias is not None:
        nn.init.normal_(made.bias)
    return made


def inputs(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected(made, x, score="paper", temperature=1.0):
    bias = None if made.bias is None else made.bias.detach().double().numpy()
    table = made.table.weight.detach().double().numpy()
    return numpy_memoryformer.memory_layer(x.double().numpy(), table, bias, made.hash.bits, score, temperature)


@pytest.mark.parametrize("score", ["paper", "released"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("bits", [1, 3, 6])
def test_output_is_equation_11(score, temperature, bits):
    made, x = layer(bits=bits, score=score, temperature=temperature), inputs(5, 12)
    np.testing.assert_allclose(made(x).detach().numpy(), expected(made, x, score, temperature), rtol=1e-10)


@pytest.mark.parametrize("score", ["paper", "released"])
def test_every_gradient_by_finite_differences(score):
    made, x, weight = layer(score=score), inputs(4, 12), inputs(4, 7, seed=2)
    x.requires_grad_()
    (made(x) * weight).sum().backward()

    def loss():
        return (expected(made, x.detach(), score) * weight.numpy()).sum()

    step = 1e-6
    for tensor in (x, made.table.weight, made.bias):
        values, gradient = tensor.detach().view(-1), tensor.grad.view(-1)
        for i in range(values.numel()):
            kept = values[i].item()
            values[i] = kept + step
            above = loss()
            values[i] = kept - step
            below = loss()
            values[i] = kept
            assert gradient[i].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-7)


def test_zero_and_minus_zero_count_as_positive():
    made = layer(in_features=3, bits=3, bias=False)
    for zero in (0.0, -0.0):
        x = torch.tensor([[zero, -1.0, zero]], dtype=torch.float64)
        p = 1 / (2 * (1 + np.exp(-2.0)) * 2)
        np.testing.assert_allclose(made(x).detach()[0], p * made.table.weight[0b101].detach(), rtol=1e-12)


def test_what_is_not_finite_shows_and_stays_in_its_row():
    made, x = layer(dtype=torch.float32), inputs(3, 12, dtype=torch.float32)
    x[1, 4], x[2, 5] = torch.nan, torch.inf
    out = made(x)
    assert out[0].isfinite().all() and out[1].isnan().all() and out[2].isfinite().all()


@pytest.mark.parametrize("shape", [(12,), (0, 12), (1, 12), (2, 3, 12), (2, 0, 12), (2, 1, 3, 12)])
def test_any_leading_shape(shape):
    made, x = layer(), inputs(*shape)
    out = made(x)
    assert out.shape == (*shape[:-1], 7)
    torch.testing.assert_close(out.reshape(-1, 7), made(x.reshape(-1, 12)), rtol=0, atol=0)


def test_strided_inputs():
    made, wide = layer(dtype=torch.float32), inputs(24, 6, dtype=torch.float32)
    torch.testing.assert_close(made(wide.t()[:, ::2]), made(wide.t()[:, ::2].contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precisions(dtype, rtol):
    made, x = layer(dtype=dtype), inputs(9, 12, dtype=dtype)
    out = made(x)
    assert out.dtype == dtype
    want = expected(made, x)
    assert np.linalg.norm(out.detach().double().numpy() - want) <= rtol * np.linalg.norm(want)


def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients():
    made, x = layer(dtype=torch.float32), inputs(9, 12, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert made.table.weight.grad.dtype == x.grad.dtype == torch.float32
    plain = layer(dtype=torch.float32)
    y = x.detach().clone().requires_grad_()
    plain(y).square().sum().backward()
    for got, want in ((made.table.weight.grad, plain.table.weight.grad), (x.grad, y.grad)):
        assert (got - want).norm() <= 3e-2 * want.norm()


def test_autocast_rounds_the_input_as_in_a_linear_layer_and_reads_the_same_rows():
    made, x = layer(dtype=torch.float32), inputs(63, 12, dtype=torch.float32)
    x[0, :3] = torch.tensor([1e-30, -1e-30, -0.0])
    rounded = x.bfloat16()
    assert torch.equal(made.hash(x)[0], made.hash(rounded)[0])
    for is_trained in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(is_trained):
            assert torch.equal(made(x), made(rounded))


def test_it_stands_where_a_linear_layer_stood():
    net = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 7))
    net[1] = MemoryLayer(12, 7, bits=4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    # 24 tokens have 24 free values a column and meet about 36 different rows: they can be learnt by heart.
    x, goal = inputs(24, 12, dtype=torch.float32), inputs(24, 7, dtype=torch.float32, seed=3)
    losses = []
    for _ in range(60):
        loss = (net(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_copies_and_state_dicts_hold_the_same_layer():
    made, x = layer(dtype=torch.float32), inputs(4, 12, dtype=torch.float32)
    stream = io.BytesIO()
    torch.save(made.state_dict(), stream)
    stream.seek(0)
    again = layer(dtype=torch.float32)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(torch.load(stream))
    assert sorted(again.state_dict()) == ["bias", "table.weight"]
    assert torch.equal(made(x), again(x)) and torch.equal(made(x), copy.deepcopy(made)(x))


def test_an_injected_table_is_used_and_checked():
    table = LocalTable(TableSpec(name="mine", num_rows=32, row_dim=7))
    assert MemoryLayer(12, 7, bits=3, table=table).table is table
    with pytest.raises(ConfigError, match=r'got 32 × 7 in "mine"; needed 48 × 7'):
        MemoryLayer(12, 7, bits=4, table=table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"multiple of bits; got in_features=12, bits=5; nearest that fit: 10 and 15"),
        ({"bits": 0}, r"bits must lie in 1\.\.24; got 0"),
        ({"bits": 25}, r"bits must lie in 1\.\.24; got 25"),
        ({"score": "papr"}, r'score must be one of paper, released; got "papr"'),
        ({"temperature": 0.0}, r"temperature must be positive; got 0\.0"),
        ({"out_features": 0}, r"at least one row of one column; got num_rows=32, row_dim=0"),
        ({"dtype": torch.int32}, r"rows must be floating point; got torch\.int32"),
    ],
)
def test_misuse_is_told_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        MemoryLayer(**({"in_features": 12, "out_features": 7, "bits": 3} | options))
    assert "\n" not in str(caught.value)


def test_an_input_of_the_wrong_width_names_both():
    with pytest.raises(ConfigError, match=r"in_features=12; got x of shape \(2, 9\)"):
        layer()(inputs(2, 9))


def test_an_input_that_has_no_width_or_is_of_the_wrong_kind_says_what_to_do():
    made = layer(dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"in_features=12; got x of shape \(\)"):
        made(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"got \[2, 12\] in torch\.int64; cast them"):
        made(torch.zeros(2, 12, dtype=torch.int64))
    for is_trained in (True, False):
        with torch.set_grad_enabled(is_trained), pytest.raises(ConfigError) as caught:
            made(inputs(2, 12))
        assert "fp64" in str(caught.value) and "torch.float32" in str(caught.value)
        assert str(caught.value).endswith("cast one")


@pytest.mark.parametrize("is_trained", [True, False])
def test_autocast_leaves_fp64_alone_as_it_does_in_a_linear_layer(is_trained):
    made, x = layer(), inputs(5, 12)
    wanted = made(x)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(is_trained):
        assert nn.Linear(12, 7, dtype=torch.float64)(x).dtype == torch.float64
        assert torch.equal(made(x), wanted)
