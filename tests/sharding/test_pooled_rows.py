"""Sums of rows for runs of lookups, on one rank."""

import pytest
import torch

from mfdist.sharding.routes.pooled_rows import _ragged_sums


@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_without_columns_have_sums_without_columns(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)  # with two, torch's own sums are an error
    try:
        sums = _ragged_sums(torch.empty(1, 0), torch.zeros(2).long(), torch.tensor([1, 1]), torch.ones(2))
    finally:
        torch.set_num_threads(before)
    assert sums.shape == (2, 0)
