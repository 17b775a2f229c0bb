"""What rows travel as: never wider than asked or than they are, and as exact as the format."""

import pytest
import torch

from mfdist.sharding.wire import Wire
from mfdist.testing.tolerances import relative_error

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def there_and_back(rows, dtype):
    wire = Wire(rows.dtype, dtype)
    payload = wire.encode(rows)
    assert payload.shape == (rows.shape[0], wire.width(rows.shape[1])) and payload.dtype == wire.payload_dtype
    arrived = torch.cat((payload.new_zeros(3), payload.reshape(-1)))[3:]  # a part of what came, at an odd address
    decoded = wire.decode(arrived.view(payload.shape))
    assert decoded.shape == rows.shape and decoded.dtype == rows.dtype
    return decoded, payload.nbytes


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 23), (7, 40), (3, 0)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (FP8[0], 0.04), (FP8[1], 0.08)])
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_arrive_up_to_the_formats_rounding(shape, dtype, bound, rows_dtype):
    rows = (torch.randn(shape) * torch.logspace(-6, 6, max(1, shape[0]))[: shape[0], None]).to(rows_dtype)
    got, num_bytes = there_and_back(rows, dtype)
    for one, other in zip(got, rows, strict=True):
        assert relative_error(one.double(), other.double()) <= bound
    scales = 4 * shape[0] if dtype in FP8 else 0
    assert num_bytes == rows.numel() * min(dtype.itemsize, rows_dtype.itemsize) + scales


def test_nothing_is_copied_or_widened_where_rows_are_as_narrow():
    rows = torch.randn(4, 5, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Wire(torch.bfloat16, dtype).encode(rows) is rows


@pytest.mark.parametrize("dtype", FP8)
def test_a_row_that_is_not_finite_arrives_as_nan_and_zeros_as_zeros(dtype):
    rows = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0], [0.0, 0.0], [1e-30, -1e-30]])
    got, _ = there_and_back(rows, dtype)
    assert got[:2].isnan().all()
    assert torch.equal(got[2], rows[2])
    assert torch.allclose(got[3], rows[3], rtol=0.1, atol=0)
