"""The product of a matrix and one vector, against float64; what does not fit; what the model does with it."""

import numpy as np
import pytest
import torch

from mfdist.config import ModelConfig
from mfdist.errors import ConfigError
from mfdist.kernels import row_products
from mfdist.models import build_model
from mfdist.testing.tolerances import TOLERANCES, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 0), (63, 31), (100, 32), (7, 33), (1500, 1030)])
def test_it_is_the_product(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, x = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    expected = np.asarray(rows.double()) @ np.asarray(x.double())
    got = row_products(rows, x)
    assert (got.shape, got.dtype) == (shape[:1], dtype)
    assert relative_error(got.double().numpy(), expected) <= TOLERANCES[str(dtype).removeprefix("torch.")]
    strided = torch.randn(shape[0], 2 * shape[1] + 1).to(dtype)[:, 1::2]
    strided.copy_(rows)
    assert torch.equal(row_products(strided, x), got)


def test_a_nan_or_an_infinity_stays_in_its_row() -> None:
    rows = torch.ones(3, 70)
    rows[0, 69], rows[1, 0] = torch.nan, torch.inf
    assert torch.equal(row_products(rows, torch.ones(70)).isfinite(), torch.tensor([False, False, True]))


def test_threads_change_no_bit() -> None:
    rows, x = torch.randn(3001, 700), torch.randn(700)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(row_products(rows, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_the_operator_is_sound() -> None:
    rows, x = torch.randn(7, 9), torch.randn(9)
    torch.library.opcheck(torch.ops.mfdist.row_products.default, (rows, x))
    assert row_products(rows.to("meta"), x.to("meta")).shape == (7,)
    with pytest.raises(NotImplementedError, match=r"call torch\.nn\.functional\.linear"):
        row_products(rows.requires_grad_(), x).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("rows", "x", "message"),
    [
        (torch.ones(3, 4), torch.ones(5), r"got \[3, 4\] in torch.float32 on cpu and \[5\]"),
        (torch.ones(3, 4), torch.ones(4).double(), "torch.float64"),
        (torch.ones(4), torch.ones(4), r"rows \[R, D\]"),
        (torch.ones(3, 4).int(), torch.ones(4).int(), "floating-point rows; got torch.int32"),
    ],
)
def test_what_does_not_fit(rows: torch.Tensor, x: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        row_products(rows, x)


@pytest.mark.parametrize("kind", ["memory", "dense"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_models_next_logits_are_the_last_of_all(kind: str, dtype: torch.dtype) -> None:
    config = ModelConfig(kind=kind, num_layers=1, hidden_dim=48, num_heads=2, bits=4, max_seq_len=8, vocab_size=77)
    model, tokens = build_model(config).to(dtype), torch.randint(77, (1, 5))
    with torch.inference_mode():
        for count in (1, 5):
            got, expected = model.next_logits(tokens[:, :count]), model(tokens[:, :count])[:, -1]
            assert got.shape == (1, 77) and got.dtype == dtype
            error = relative_error(got.double().numpy(), expected.double().numpy())
            assert error <= TOLERANCES[str(dtype).removeprefix("torch.")]
        with torch.autocast("cpu", torch.bfloat16):
            assert model.next_logits(tokens).dtype == torch.bfloat16
    model.next_logits(tokens).sum().backward()  # with gradients it is the head's own product
    assert model.head.weight.grad is not None
