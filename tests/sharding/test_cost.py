"""Costs: the α–β model in numbers small enough to work out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mfdist.sharding.cost import dense_s, price, price_table, transfer_s
from mfdist.sharding.kinds import column_wise, replicated, row_wise, table_wise
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.topology import Link, Topology
from mfdist.sharding.traffic import Transfer
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec

#: Copies cost nothing, so that the links' times stand alone.
PLAIN = Topology(
    name="plain",
    world_size=4,
    num_hosts=2,
    memory_bytes=1 << 30,
    inside=Link(bytes_per_s=100.0, latency_s=0.5),
    between=Link(bytes_per_s=10.0, latency_s=2.0),
    collective_s=1.0,
    control=Link(bytes_per_s=10.0, latency_s=0.25),
    copy_bytes_per_s=1e30,
    fresh_bytes_per_s=0.0,
    lookup_bytes_per_s=100.0,
    cached_lookup_bytes_per_s=1000.0,
    cache_bytes=1024,
    sort_ids_per_s=1e30,
    pass_rows_per_s=1e30,
    flops_per_s=1000.0,
)
SPEC = TableSpec(name="t", num_rows=64, row_dim=32)
LOAD = TableLoad(num_lookups=4, code_stride=16, id_bytes=1)
WORK = Workload(batch_tokens=8, loads={"t": LOAD}, rule="sgd")


def test_buffers_that_the_allocator_gives_back_cost_their_pages():
    slow = replace(PLAIN, fresh_bytes_per_s=1e6)
    size = 96e6  # a rank keeps a quarter of what it makes: 128 MB sent and 64 MB received
    transfer = moved("world", size)
    assert transfer_s(transfer, slow) - transfer_s(transfer, PLAIN) == pytest.approx(192.0)
    small = moved("world", 20e6)
    assert transfer_s(small, slow) == transfer_s(small, PLAIN)


def moved(axis, sent=30.0, **changes):
    size = np.array([sent])
    return Transfer(what="x", phase="forward", axis=axis, sent=size, received=size / 2, **changes)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        # start + one peer inside + two outside + a third of the bytes inside, two thirds between, at once
        ("world", 1.0 + 0.5 + 2 * 2.0 + max(10 / 100, 20 / 10)),
        ("inside", 1.0 + 0.5 + 30 / 100),
        ("between", 1.0 + 2.0 + 30 / 10),
    ],
)
def test_a_transfer_takes_start_latencies_and_its_slower_link(axis, expected):
    assert transfer_s(moved(axis), PLAIN) == pytest.approx(expected)


def test_the_fullest_rank_decides():
    one = Transfer(what="x", phase="forward", axis="inside", sent=np.array([1.0, 50.0]), received=np.array([80.0, 2.0]))
    assert transfer_s(one, PLAIN) == pytest.approx(1.0 + 0.5 + 80 / 100)


def test_tags_take_the_control_link():
    assert transfer_s(moved("world", is_control=True), PLAIN) == pytest.approx(1.0 + 3 * 0.25 + 30 / 10)


def test_packing_is_read_and_written():
    slow = replace(PLAIN, copy_bytes_per_s=10.0)
    assert transfer_s(moved("inside"), slow) - transfer_s(moved("inside"), PLAIN) == pytest.approx(2 * 45 / 10)


def test_lookups_read_rows_three_times_at_the_rate_of_where_they_lie():
    alone = replace(PLAIN, world_size=1, num_hosts=1)
    memory = price_table(replicated(SPEC), alone, WORK)  # 64 rows of 128 bytes do not stay in 1024
    assert memory.lookup_s == pytest.approx(3 * 8 * 4 * 128 / 100)
    cached = price_table(replicated(SPEC), replace(alone, cache_bytes=64 * 128), WORK)
    assert cached.lookup_s == pytest.approx(3 * 8 * 4 * 128 / 1000)
    assert memory.exchange_s == 0


def test_narrow_columns_still_read_64_bytes():
    cost = price_table(column_wise(SPEC, 4), replace(PLAIN, cache_bytes=1), WORK)  # 8 columns are 32 bytes
    assert cost.lookup_s == pytest.approx(3 * 8 * 4 * 64 / 100)


def test_a_skewed_table_is_as_slow_as_its_fullest_rank():
    even = price_table(table_wise(SPEC, 4, 16), replace(PLAIN, cache_bytes=1), WORK)
    skewed = price_table(table_wise(SPEC, 4, 16, cuts=(0, 0, 0, 16, 64)), replace(PLAIN, cache_bytes=1), WORK)
    assert skewed.lookup_s == pytest.approx(3 * even.lookup_s)


def test_updates_pass_over_all_rows_or_over_those_touched():
    moving = replace(PLAIN, copy_bytes_per_s=1000.0, world_size=1, num_hosts=1)
    cells = 64 * 32
    dense = price_table(replicated(SPEC), moving, replace(WORK, rule="adam"))
    # rows read and written, two fp32 moments read and written, the gradient written and read
    assert dense.update_s == pytest.approx(cells * (8 + 16 + 8) / 1000)
    fused = price_table(replicated(SPEC), moving, replace(WORK, is_fused=True))
    assert fused.update_s == pytest.approx(LOAD.num_unique(64, 8) * 32 * 8 / 1000)


def test_a_gradient_of_all_rows_passes_over_those_held():
    """By row ids alone: slots are passed over with their lookups, and fetched rows are written by themselves."""
    passing = replace(PLAIN, pass_rows_per_s=10.0)
    by_ids = replace(WORK, loads={"t": TableLoad(num_lookups=4)})
    assert price_table(column_wise(SPEC, 4), passing, by_ids).update_s == pytest.approx(64 / 10)
    for plan, work in ((row_wise(SPEC, 4), by_ids), (column_wise(SPEC, 4), WORK)):
        assert price_table(plan, passing, work).update_s < 1e-6
    assert price_table(column_wise(SPEC, 4), passing, replace(by_ids, is_fused=True)).update_s < 1e-6


def test_micro_batches_repeat_exchanges_over_fewer_tokens():
    once = price_table(column_wise(SPEC, 4), PLAIN, replace(WORK, batch_tokens=64))
    twice = price_table(column_wise(SPEC, 4), PLAIN, replace(WORK, batch_tokens=64, micro_batches=2))
    assert twice.sent_bytes().tolist() == once.sent_bytes().tolist()
    assert twice.buffer_bytes == once.buffer_bytes / 2
    assert twice.exchange_s > once.exchange_s
    assert twice.lookup_s == pytest.approx(once.lookup_s)


def test_the_dense_part_counts_arithmetic_memory_and_its_gradients():
    work = replace(WORK, num_dense_parameters=100, dense_flops_per_token=50, activation_bytes_per_token=3)
    alone = replace(PLAIN, world_size=1, num_hosts=1)
    assert dense_s(alone, work) == pytest.approx(8 * 50 / 1000)
    inside, between = 800 / 2 / 100, 800 / 2 / 2 / 10
    assert dense_s(PLAIN, work) == pytest.approx(2 * 50 / 1000 + 1.0 + 0.5 + 2.0 + max(inside, between))
    cost = price(ShardingPlan(1, (replicated(SPEC),)), alone, work)
    assert cost.rank_bytes.tolist() == [2 * SPEC.num_bytes + 8 * 4 * 5 + 100 * 16 + 8 * 3]


def test_a_rank_needs_what_all_tables_keep_and_the_largest_buffer_once():
    other = TableSpec(name="u", num_rows=64, row_dim=16)
    work = replace(WORK, loads={"t": LOAD, "u": LOAD})
    cost = price(
        ShardingPlan(4, (table_wise(SPEC, 4, 16, cuts=(0, 0, 16, 32, 64)), column_wise(other, 4))), PLAIN, work
    )
    both = [table.held.on_ranks(table.footprint.lasting) for table in cost.tables]
    assert cost.rank_bytes.tolist() == (both[0] + both[1] + cost.tables[0].buffer_bytes).tolist()
    assert cost.step_s == sum(table.step_s for table in cost.tables)


def test_narrow_traffic_is_faster():
    wide = price_table(row_wise(SPEC, 4), PLAIN, WORK)
    narrow = price_table(row_wise(SPEC, 4, forward_dtype=torch.bfloat16, backward_dtype=torch.bfloat16), PLAIN, WORK)
    assert narrow.exchange_s < wide.exchange_s


def test_rows_read_narrower_travel_and_are_read_as_such():
    autocast = replace(WORK, lookup_dtype=torch.bfloat16)
    wide, narrow = (price_table(column_wise(SPEC, 4), replace(PLAIN, cache_bytes=1), work) for work in (WORK, autocast))
    sums = 2 * 24 * 4
    assert (wide.sent_bytes("forward") - narrow.sent_bytes("forward")).tolist() == [sums / 2] * 4
    whole = [price_table(table_wise(SPEC, 4, 16), replace(PLAIN, cache_bytes=1), work) for work in (WORK, autocast)]
    assert whole[1].lookup_s == pytest.approx(whole[0].lookup_s / 2)


@pytest.mark.parametrize(
    ("plan", "num_rows"),
    [
        # 2 tokens a rank, 4 lookups a token: forward once, backward twice
        (column_wise(SPEC, 4), 3 * 4 * 8),  # of all ranks' tokens
        (table_wise(SPEC, 4, 16), 3 * 8),  # a quarter of them
        (row_wise(SPEC, 4), 8 + 2 * 8),  # of its own tokens, and those of its rows
    ],
)
def test_each_row_costs_its_start_however_narrow_it_is(plan, num_rows):
    work = replace(WORK, loads={"t": TableLoad(num_lookups=4)}) if plan.kind == "row_wise" else WORK
    starting = replace(PLAIN, row_start_s=0.01)
    difference = price_table(plan, starting, work).lookup_s - price_table(plan, PLAIN, work).lookup_s
    assert difference == pytest.approx(0.01 * num_rows)


def test_an_accelerator_waits_for_its_host_where_that_takes_longer():
    alone = price_table(column_wise(SPEC, 4), replace(PLAIN, collective_s=0.0), WORK)
    busy = alone.lookup_s + alone.exchange_s + alone.update_s
    assert alone.host_s == 0
    num_collectives = len(alone.transfers)
    fast = price_table(column_wise(SPEC, 4), replace(PLAIN, collective_s=1.0, host_lookup_s=0.5), WORK)
    assert fast.step_s == pytest.approx(busy)  # the host is done before
    assert fast.host_s == 0
    slow = price_table(column_wise(SPEC, 4), replace(PLAIN, collective_s=1000.0, host_lookup_s=0.5), WORK)
    assert slow.exchange_s == alone.exchange_s
    assert slow.step_s == pytest.approx(0.5 + num_collectives * 1000.0)


def test_hosts_that_wait_for_counts_hide_less():
    work = Workload(batch_tokens=8, loads={"t": TableLoad(num_lookups=4)}, rule="sgd", micro_batches=2)
    alone = price_table(row_wise(SPEC, 4), replace(PLAIN, collective_s=0.0), work)
    beside = price_table(row_wise(SPEC, 4), replace(PLAIN, collective_s=1.0, host_lookup_s=100.0), work)
    busy_s = 2 * (2 * 100.0 + len(alone.transfers) * 1.0)
    assert busy_s > alone.step_s / 2
    assert beside.step_s == pytest.approx(alone.step_s + busy_s - alone.step_s / 2)
