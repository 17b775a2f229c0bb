"""Plans: every cell of a table has one owner, and what does not fit a model or a mesh is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

from mfdist.errors import ConfigError
from mfdist.sharding.kinds import column_wise, grid, replicated, row_wise, table_wise
from mfdist.sharding.plan import ShardingPlan
from mfdist.spec import Region, TableSpec
from tests.sharding.plans import WORLD_SIZE, sharding_plans, table_plans

SPEC = TableSpec(name="t", num_rows=12, row_dim=8)
OTHER = TableSpec(name="u", num_rows=4, row_dim=2)


def owned(plan, regions):
    """Return how often each cell is owned."""
    cells = np.zeros((plan.num_rows, plan.row_dim), dtype=int)
    for region in regions:
        cells[slice(*region.rows), slice(*region.columns)] += 1
    return cells


@given(table_plans())
def test_every_cell_has_one_owner(plan):
    regions = [plan.region_of(rank) for rank in range(WORLD_SIZE)]
    each = WORLD_SIZE if plan.kind == "replicated" else 1
    assert (owned(plan, regions) == each).all()
    assert {shard.owner: shard.region for shard in plan.shards} == {rank: regions[rank] for rank in plan.owners}
    for rank in set(range(WORLD_SIZE)) - set(plan.owners):
        assert plan.region_of(rank).is_empty or plan.kind == "replicated"


@given(table_plans())
def test_slots_are_never_cut(plan):
    if plan.code_stride:
        assert all(cut % plan.code_stride == 0 for cut in plan.row_cuts)


def test_kinds_cut_as_they_say():
    assert row_wise(SPEC, 5).row_cuts == (0, 2, 4, 7, 9, 12)
    assert column_wise(SPEC, [3, 1], cuts=(0, 2, 8)).region_of(1) == Region(rows=(0, 12), columns=(2, 8))
    assert table_wise(SPEC, 3, 2).row_cuts == (0, 4, 8, 12)
    assert table_wise(SPEC, [5], 0).region_of(5) == SPEC.region
    assert grid(SPEC, 2, 2).region_of(3) == Region(rows=(6, 12), columns=(4, 8))
    assert grid(SPEC, 3, 2, code_stride=6).row_cuts == (0, 0, 6, 12)
    assert replicated(SPEC).region_of(17) == SPEC.region


def test_traffic_has_the_tables_dtype_unless_said():
    plan = row_wise(replace(SPEC, dtype=torch.bfloat16), 2, backward_dtype=torch.float8_e5m2)
    assert (plan.forward_dtype, plan.backward_dtype) == (torch.bfloat16, torch.float8_e5m2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: row_wise(SPEC, 2, cuts=(0, 8, 6)), r'table "t" rows \[6, 8\) have two owners'),
        (lambda: row_wise(SPEC, 2, cuts=(0, 6, 11)), r"rows \[11, 12\) have no owner"),
        (lambda: row_wise(SPEC, 3, cuts=(0, 6, 12)), "got 3 owners for 2 parts"),
        (lambda: row_wise(SPEC, [1, 2, 1]), "rank 1 owns two"),
        (lambda: row_wise(SPEC, [-1]), "got -1"),
        (lambda: row_wise(SPEC, 0), "at least one owner"),
        (lambda: table_wise(SPEC, 2, 5), "code_stride must divide num_rows"),
        (lambda: table_wise(SPEC, 2, 4, cuts=(0, 6, 12)), "nearest that fit: 4 and 8"),
        (lambda: replace(row_wise(SPEC, 2), code_stride=4), "leave it out"),
        (lambda: replace(row_wise(SPEC, 2), kind="column_wise"), "keeps its rows whole"),
        (lambda: replace(column_wise(SPEC, 2), kind="table_wise"), "keeps its columns whole"),
        (lambda: replace(row_wise(SPEC, 2), kind="rowwise"), 'got "rowwise"'),
        (lambda: replace(replicated(SPEC), owners=(0,)), "got 1 owners for 0 parts"),
        (lambda: row_wise(SPEC, 2, forward_dtype=torch.int8), "got int8"),
        (lambda: replace(row_wise(SPEC, 2), num_rows=0), "at least one row"),
        (lambda: ShardingPlan(2, (row_wise(SPEC, 4),)), r"ranks in \[0, 2\); got 3"),
        (lambda: ShardingPlan(2, (row_wise(SPEC, 2), replicated(SPEC))), '"t" is there twice'),
        (lambda: ShardingPlan(0, ()), "world_size=0"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_plan_for_this_model_and_mesh_is_valid():
    plan = ShardingPlan(2, (row_wise(SPEC, 2), replicated(OTHER)))
    plan.validate([OTHER, SPEC], 2)
    assert plan.table("u").kind == "replicated"
    with pytest.raises(ConfigError, match='no table "v"; it has "t", "u"'):
        plan.table("v")


@pytest.mark.parametrize(
    ("specs", "world_size", "message"),
    [
        ([SPEC, OTHER], 4, "it is for 2 ranks, the mesh has 4"),
        ([SPEC, OTHER, replace(SPEC, name="v")], 2, 'it lacks "v"'),
        ([SPEC], 2, 'it has "u", the model has "t"'),
        ([replace(SPEC, row_dim=9), OTHER], 2, '"t" is 12 × 8 float32 in the plan, 12 × 9 float32 in the model'),
        ([replace(SPEC, dtype=torch.float16), OTHER], 2, "float16 in the model"),
    ],
)
def test_a_plan_for_another_model_or_mesh_is_refused_with_the_difference(specs, world_size, message):
    plan = ShardingPlan(2, (row_wise(SPEC, 2), replicated(OTHER)))
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan.validate(specs, world_size)


@given(sharding_plans)
def test_json_gives_the_plan_back(plan):
    text = plan.to_json()
    again = ShardingPlan.from_json(text)
    assert again == plan
    assert again.to_json() == text


def test_thousands_of_tables_over_thousands_of_ranks_are_cheap():
    """Work quadratic in shards would take hours here, and end at the suite's time limit."""
    specs = [TableSpec(name=f"t{index}", num_rows=1 << 24, row_dim=4096) for index in range(2000)]
    plan = ShardingPlan(4096, tuple((row_wise, column_wise)[index % 2](spec, 4096) for index, spec in enumerate(specs)))
    again = ShardingPlan.from_json(plan.to_json())
    again.validate(specs, 4096)
    assert again.table("t7").region_of(4095).columns == (4095, 4096)
