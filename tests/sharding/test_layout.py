"""Layout: ranks are filled alike, whatever the tables' sizes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mfdist.sharding.holdings import Holdings
from mfdist.sharding.kinds import column_wise, grid, replicated, row_wise, table_wise
from mfdist.sharding.layout import candidates, lay_out
from mfdist.sharding.topology import h100
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec

WORLD, HOSTS = 6, 2


def piece_bytes(plan):
    rows = (plan.code_stride or 1) * plan.row_dim
    columns = plan.num_rows * (4 if plan.row_dim % 4 == 0 else 1)
    cells = {"row_wise": rows, "table_wise": rows, "column_wise": columns, "grid": rows + columns, "replicated": 0}
    return cells[plan.kind] * plan.dtype.itemsize


@st.composite
def models(draw):
    plans = []
    for index in range(draw(st.integers(1, 8))):
        stride = draw(st.integers(1, 6))
        spec = TableSpec(name=f"t{index}", num_rows=stride * draw(st.integers(1, 30)), row_dim=draw(st.integers(1, 40)))
        make = draw(st.sampled_from([row_wise, column_wise, table_wise, replicated]))
        if make is table_wise:
            plans.append(table_wise(spec, WORLD, stride))
        elif make is replicated:
            plans.append(replicated(spec))
        else:
            plans.append(make(spec, WORLD))
    return plans


def filled(plans):
    total = np.zeros(WORLD)
    for plan in plans:
        held = Holdings.of(plan, WORLD)
        total += held.on_ranks(held.rows * held.columns) * plan.dtype.itemsize
    return total


@given(models())
def test_ranks_differ_by_no_more_than_the_largest_piece(plans):
    laid = lay_out(plans, h100(WORLD))
    assert [(plan.spec, plan.kind, plan.owners) for plan in laid] == [
        (plan.spec, plan.kind, plan.owners) for plan in plans
    ]
    total = filled(laid)
    assert total.max() - total.min() <= max(piece_bytes(plan) for plan in plans)
    assert total.sum() == filled(plans).sum()


def test_a_grids_pieces_go_round_hosts_and_places():
    spec = TableSpec(name="t", num_rows=7, row_dim=4)
    plans = [grid(TableSpec(name=f"t{index}", num_rows=7, row_dim=4), 2, 3) for index in range(6)]
    total = filled(lay_out(plans, h100(WORLD, HOSTS)))
    assert total.max() - total.min() <= piece_bytes(plans[0])
    assert total.sum() == 6 * spec.num_bytes


def test_every_kind_that_there_is_is_a_candidate():
    spec = TableSpec(name="t", num_rows=48, row_dim=8)

    def kinds(topology, load, **changes):
        workload = Workload(**{"batch_tokens": 8, "loads": {"t": load}, **changes})
        found = candidates(spec, topology, workload)
        return [(plan.kind, plan.code_stride, "pooled" if plan.pooled else plan.deduplicate) for plan in found]

    slots, ids = TableLoad(num_lookups=3, code_stride=16), TableLoad(num_lookups=3)
    assert kinds(h100(1), slots) == [("replicated", 0, True)]
    assert kinds(h100(4), ids) == [
        ("replicated", 0, True),
        ("column_wise", 0, True),
        ("row_wise", 0, True),
        ("row_wise", 0, False),
        ("row_wise", 0, "pooled"),
    ]
    assert ("grid", 0, "pooled") in kinds(h100(4, 2), ids)
    assert {("table_wise", 16, True)} == set(kinds(h100(4), slots)) - set(kinds(h100(4), ids))
    assert {("grid", 0, True), ("grid", 0, False), ("grid", 16, True)} == set(kinds(h100(4, 2), slots)) - set(
        kinds(h100(4), slots)
    )
    assert all(once is not True or kind != "row_wise" for kind, _, once in kinds(h100(4), ids, deduplicate=False))
