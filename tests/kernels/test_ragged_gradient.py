"""ragged_gradient on the CPU: against the oracle, and to the bit what row_gradient gives for the same lookups."""

import numpy as np
import pytest
import torch

from mfdist.errors import ConfigError, RowIdError
from mfdist.kernels import ragged_gradient, row_gradient
from tests.kernels.lookups import assert_is, make_lookup
from tests.kernels.ragged_lookups import expected_of_list, make_list


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (63, 9, 20, 40), (500, 100, 7, 100), (30, 30, 5000, 33)])
def test_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    listed = make_list(*shape, dtype=dtype)
    rows, grad_rows, grad_scores = ragged_gradient(*listed)
    expected = expected_of_list(*listed)
    assert rows.dtype == torch.int64 and np.array_equal(rows.numpy(), expected[0])
    assert_is(grad_rows, expected[1], dtype)
    assert_is(grad_scores, expected[2], torch.float32)
    if dtype != torch.float64:
        assert_is(ragged_gradient(*listed, dtype=torch.float32)[1], expected[1], torch.float32)


@pytest.mark.parametrize("rows_each", [16, 3000])
def test_the_same_bits_as_the_rectangular_gradient(rows_each: int) -> None:
    lookup = make_lookup(200, 4, rows_each, 100, is_compact=False, id_dtype=torch.int32)
    expected = row_gradient(lookup.table, lookup.row_ids, lookup.scores, lookup.grad_output)
    tokens = torch.arange(200).repeat_interleave(4)
    listed = (lookup.table, lookup.row_ids.reshape(-1), tokens, lookup.scores.reshape(-1), lookup.grad_output)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        rows, grad_rows, grad_scores = ragged_gradient(*listed)
        torch.set_num_threads(before)
        assert torch.equal(grad_rows, expected[0][rows])
        assert rows.numel() == expected[0].any(dim=1).sum()
        assert torch.equal(grad_scores, expected[1].reshape(-1))


def test_no_lookups() -> None:
    table, ids, tokens, scores, grads = make_list(0, 5, 8, 4)
    rows, grad_rows, grad_scores = ragged_gradient(table, ids, tokens, scores, grads)
    assert (rows.shape, grad_rows.shape, grad_scores.shape) == ((0,), (0, 4), (0,))


def test_what_does_not_fit() -> None:
    table, ids, tokens, scores, grads = make_list(6, 5, 8, 4)
    with pytest.raises(RowIdError, match=r'row id 8 .*outside table "t"'):
        ragged_gradient(table, ids.fill_(8), tokens, scores, grads, "t")
    with pytest.raises(ConfigError, match=r"row_ids, tokens and scores \[M\]"):
        ragged_gradient(table, ids[:3], tokens, scores, grads)
    with pytest.raises(ConfigError, match=r"grad_output must be \[T, D=4\]"):
        ragged_gradient(table, ids, tokens, scores, grads[:, :2])
