"""Holdings: the classes of ranks are what each rank holds."""

import numpy as np
from hypothesis import given

from mfdist.sharding.holdings import Holdings
from tests.sharding.plans import WORLD_SIZE, table_plans


@given(table_plans())
def test_each_rank_is_in_the_class_of_what_it_holds(plan):
    held = Holdings.of(plan, WORLD_SIZE)
    regions = [plan.region_of(rank) for rank in range(WORLD_SIZE)]
    shapes = [region.shape for region in regions]
    assert list(zip(held.on_ranks(held.rows), held.on_ranks(held.columns), strict=True)) == shapes
    assert held.mean(held.rows * held.columns) == np.mean([rows * columns for rows, columns in shapes])
    assert held.counts.sum() == WORLD_SIZE
    assert len(set(zip(held.rows, held.columns, strict=True))) == len(held.rows)
