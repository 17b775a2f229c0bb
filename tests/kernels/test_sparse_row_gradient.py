"""sparse_row_gradient and marked_row_gradient against the oracle and the dense gradient."""

from collections.abc import Callable

import pytest
import torch

from mfdist.errors import RowIdError
from mfdist.kernels import check_errors, marked_row_gradient, row_gradient, sparse_row_gradient
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


@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
@pytest.mark.parametrize("sizes", [(0, 3, 8, 8), (5, 0, 8, 8), (1, 1, 8, 1), (63, 3, 40, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_rows_have_their_gradient_in_full_precision_and_those_read_are_marked(
    sizes: tuple[int, ...], is_compact: bool, dtype: torch.dtype
) -> None:
    lookup = make_lookup(*sizes, dtype=dtype, is_compact=is_compact, id_dtype=torch.int32)
    scores = lookup.scores.double() if dtype == torch.float64 else lookup.scores
    grads, is_read, grad_scores = marked_row_gradient(
        lookup.table, lookup.row_ids, scores, lookup.grad_output, lookup.code_stride
    )
    expected, expected_scores = expected_gradients(lookup)
    ids = lookup.row_ids.long() + lookup.code_stride * torch.arange(sizes[1])
    assert torch.equal(is_read.nonzero().squeeze(1), torch.unique(ids))
    assert grads.dtype == torch.promote_types(dtype, torch.float32)
    assert_is(grads, expected, grads.dtype)
    assert_is(grad_scores, expected_scores, scores.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_marked_on_a_gpu(is_compact: bool, dtype: torch.dtype) -> None:
    for sizes in ((0, 3, 8, 8), (63, 3, 40, 100), (700, 2, 64, 1536), (70_000, 2, 40, 600)):
        lookup = make_lookup(*sizes, dtype=dtype, is_compact=is_compact, id_dtype=torch.int32)
        arguments = (lookup.table, lookup.row_ids, lookup.scores, lookup.grad_output)
        got = marked_row_gradient(*(each.cuda() for each in arguments), lookup.code_stride)
        check_errors()
        wanted = marked_row_gradient(*arguments, lookup.code_stride)
        assert torch.equal(got[1].cpu(), wanted[1])
        assert_is(got[0].cpu(), wanted[0].double().numpy(), torch.float32)
        assert_is(got[2].cpu(), wanted[2].double().numpy(), torch.float32)


@pytest.mark.parametrize("gradient", [sparse_row_gradient, marked_row_gradient])
def test_an_id_outside_is_told_before_anything_is_read(gradient: Callable[..., object]) -> None:
    for bad in (-1, 24):
        lookup = make_lookup(9, 3, 8, 8, is_compact=False, id_dtype=torch.int64)
        lookup.row_ids[4, 2] = bad
        with pytest.raises(RowIdError, match=rf'row id {bad} at lookup 2 is outside table "t" \(num_rows=24\)'):
            gradient(lookup.table, lookup.row_ids, lookup.scores, lookup.grad_output, 0, "t")
