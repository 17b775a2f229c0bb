"""sparse_row_gradient against the oracle and the dense gradient."""

import pytest
import torch

from mfdist.errors import RowIdError
from mfdist.kernels import row_gradient, sparse_row_gradient
from tests.kernels.lookups import assert_is, expected_gradients, make_lookup


@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
@pytest.mark.parametrize("sizes", [(0, 3, 8, 8), (5, 0, 8, 8), (1, 1, 8, 1), (63, 3, 40, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_that_are_read_have_the_dense_gradient(
    sizes: tuple[int, ...], is_compact: bool, dtype: torch.dtype
) -> None:
    lookup = make_lookup(*sizes, dtype=dtype, is_compact=is_compact, id_dtype=torch.int32)
    scores = lookup.scores.double() if dtype == torch.float64 else lookup.scores
    arguments = (lookup.table, lookup.row_ids, scores, lookup.grad_output, lookup.code_stride)
    rows, grads, grad_scores = sparse_row_gradient(*arguments)
    expected, expected_scores = expected_gradients(lookup)
    ids = lookup.row_ids.long() + lookup.code_stride * torch.arange(sizes[1])
    assert torch.equal(rows, torch.unique(ids))
    assert_is(grads, expected[rows.numpy()], dtype)
    assert_is(grad_scores, expected_scores, scores.dtype)
    if dtype != torch.float64:
        assert torch.equal(grads, row_gradient(*arguments)[0][rows])


def test_an_id_outside_is_told_before_anything_is_read() -> None:
    for bad in (-1, 24):
        lookup = make_lookup(9, 3, 8, 8, is_compact=False, id_dtype=torch.int64)
        lookup.row_ids[4, 2] = bad
        with pytest.raises(RowIdError, match=rf'row id {bad} at lookup 2 is outside table "t" \(num_rows=24\)'):
            sparse_row_gradient(lookup.table, lookup.row_ids, lookup.scores, lookup.grad_output, 0, "t")
