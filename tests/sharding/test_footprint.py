"""Footprints: every byte of rows, gradients and states is on some rank, once for each that holds it."""

import pytest
import torch
from hypothesis import given

from mfdist.sharding.footprint import footprint
from mfdist.sharding.holdings import Holdings
from mfdist.sharding.kinds import column_wise, replicated, row_wise, table_wise
from mfdist.sharding.traffic import transfers
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec
from tests.sharding.plans import WORLD_SIZE, table_plans

SPEC = TableSpec(name="t", num_rows=96, row_dim=16)
LOAD = TableLoad(num_lookups=6, code_stride=16, id_bytes=1)


def of(plan, world_size=WORLD_SIZE, load=LOAD, num_tokens=10, **changes):
    workload = Workload(**{"batch_tokens": 1, "loads": {"t": load}, **changes})
    held = Holdings.of(plan, world_size)
    found = footprint(plan, held, load, workload, transfers(plan, held, workload, num_tokens, 3), num_tokens, 3)
    return held, found


@given(table_plans())
def test_rows_gradients_and_states_add_up_to_the_table(plan):
    ranks_per_host = plan.num_column_parts if plan.kind == "grid" else WORLD_SIZE
    if plan.kind == "grid" and WORLD_SIZE % ranks_per_host:
        return
    load = TableLoad(num_lookups=3)
    held = Holdings.of(plan, WORLD_SIZE)
    workload = Workload(batch_tokens=1, loads={}, state_dtype=torch.bfloat16)
    found = footprint(plan, held, load, workload, [], 5, ranks_per_host)
    copies = WORLD_SIZE if plan.kind == "replicated" else 1
    cells = plan.num_rows * plan.row_dim * copies
    assert found.weights @ held.counts == cells * plan.dtype.itemsize
    assert found.gradients @ held.counts == cells * plan.dtype.itemsize
    assert found.states @ held.counts == cells * 2 * 2
    assert (found.saved >= 0).all()


@pytest.mark.parametrize(("rule", "expected"), [("sgd", 0), ("rowwise_adagrad", 96 * 4), ("adam", 96 * 16 * 8)])
def test_states_by_rule(rule, expected):
    _, found = of(replicated(SPEC), rule=rule)
    assert found.states.tolist() == [expected]


def test_states_in_a_byte_each_take_as_many_bytes_as_numbers():
    _, found = of(replicated(SPEC), rule="adam", state_dtype=torch.uint8)
    assert found.states.tolist() == [96 * 16 * 2]


def test_a_fused_update_keeps_no_gradient():
    _, found = of(replicated(SPEC), is_fused=True)
    assert found.gradients.tolist() == [0]


def test_rows_that_are_looked_up_often_cost_their_lookups_order_when_fused():
    asked = {"load": TableLoad(num_lookups=6), "num_tokens": 1000}
    listed, ordered = (of(row_wise(SPEC, 4), 4, is_fused=is_fused, **asked)[1].transient for is_fused in (False, True))
    shares = 4000 * (1 - 0.75**6) * 6 * 4  # of every token that looked up a row here, scores' gradients
    assert ordered - listed == pytest.approx(shares + 4000 * 6 / 4 * 28 - 24 * 16 * 4, rel=1e-6)


def test_row_wise_states_of_columns_are_kept_by_each_owner():
    held, found = of(column_wise(SPEC, 4, cuts=(0, 0, 4, 8, 16)), 4, rule="rowwise_adagrad")
    assert held.on_ranks(found.states).tolist() == [0, 384, 384, 384]


def test_what_backward_needs_is_kept_where_it_sums():
    lookup = 1 + 4
    assert of(replicated(SPEC))[1].saved.tolist() == [10 * 6 * lookup]
    assert of(column_wise(SPEC, 2), 2)[1].saved.tolist() == [2 * 10 * 6 * lookup]
    held, found = of(table_wise(SPEC, 2, 16, cuts=(0, 16, 96)), 2)
    assert held.on_ranks(found.saved).tolist() == [2 * 10 * 1 * lookup, 2 * 10 * 5 * lookup]
    asked, own, pairs = 2 * 60 / 2 * 4, 60 * (4 + 4 + 8), 2 * 10 * (8 + 4)
    assert of(row_wise(SPEC, 2, deduplicate=False), 2)[1].saved.tolist() == [asked + own + pairs]


def test_buffers_are_those_of_the_largest_exchange():
    _, found = of(table_wise(SPEC, 2, 16), 2)
    own = 10 * (16 + 6) * 4  # the gradient as it is sent, and that of the scores
    assert found.transient.tolist() == [2 * 2 * 10 * 16 * 4 + own]  # sums made and received, for both ranks' tokens


@pytest.mark.parametrize("is_fused", [False, True])
def test_copies_are_summed_beside_what_arrives(is_fused):
    _, found = of(replicated(SPEC), 2, is_fused=is_fused)
    table, own, marks = 96 * 16 * 4, 10 * (16 + 6) * 4, 2 * 96 * is_fused
    assert (found.transient + found.gradients).tolist() == [3 * table + own + marks]


def test_rows_read_narrower_than_they_are_kept_are_copied():
    autocast = {"lookup_dtype": torch.bfloat16}
    codes = 10 * 6 * 5
    assert of(replicated(SPEC), **autocast)[1].saved.tolist() == [codes + 96 * 16 * 2]
    assert of(replicated(SPEC), is_fused=True, **autocast)[1].saved.tolist() == [codes]
    narrow = TableSpec(name="t", num_rows=96, row_dim=16, dtype=torch.bfloat16)
    assert of(replicated(narrow), **autocast)[1].saved.tolist() == [codes]
