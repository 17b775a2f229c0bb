"""Updates whose contributions come in different forms, against sums in float64."""

import numpy as np
import pytest
import torch

from mfdist.optim import RowSGD
from mfdist.spec import TableSpec
from mfdist.table_server.messages import ShardSpec
from mfdist.table_server.shard import Contribution, Lookups, Shard

SPEC = TableSpec(name="a", num_rows=64, row_dim=12, dtype=torch.float32)


def dense(num_slots: int) -> Contribution:
    ids = torch.randint(0, SPEC.num_rows, (24, num_slots))
    return Contribution(Lookups(ids, torch.randn(24, num_slots)), torch.randn(24, SPEC.row_dim))


def rows() -> Contribution:
    ids = torch.arange(5)
    return Contribution(Lookups(ids, torch.ones(5), ids.int(), 5), torch.randn(5, SPEC.row_dim))


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("other", [rows, lambda: dense(3)])
def test_contributions_of_two_forms_are_one_update(other, is_reversed: bool) -> None:
    torch.manual_seed(0)
    shard = Shard(ShardSpec(table=SPEC, region=SPEC.region, optimizer=RowSGD(lr=0.5), std=1.0, seed=1))
    contributions = [dense(4), other()]
    if is_reversed:
        contributions.reverse()
    before, expected = shard.rows.double().numpy(), shard.rows.double().numpy().copy()
    for one in contributions:
        lookups, grad = one.lookups, one.grad_output.double().numpy()
        ids, scores = lookups.row_ids.numpy(), lookups.scores.double().numpy()
        for at in np.ndindex(ids.shape):
            expected[ids[at]] -= 0.5 * scores[at] * grad[at[0]]
    made = shard.update(contributions, 0.5)
    assert np.allclose(shard.rows.numpy(), expected, atol=1e-5)
    for one, gradients in zip(contributions, made, strict=True):
        ids, grad = one.lookups.row_ids.numpy(), one.grad_output.double().numpy()
        of_scores = [before[ids[at]] @ grad[at[0]] for at in np.ndindex(ids.shape)]
        assert gradients.shape == one.lookups.scores.shape
        assert np.allclose(gradients.numpy().ravel(), of_scores, atol=1e-5)
