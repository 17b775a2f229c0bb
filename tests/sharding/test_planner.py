"""The planner: its plans are valid, fit and are balanced; small cases against trying everything."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from mfdist.errors import ConfigError
from mfdist.sharding.cost import dense_bytes, price, price_table
from mfdist.sharding.kinds import column_wise, row_wise
from mfdist.sharding.layout import candidates, lay_out
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.planner import choose_plan, decide, judge
from mfdist.sharding.topology import cpu, h100
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec
from tests.sharding.models import memoryformer, workload


@st.composite
def settings_of_few_tables(draw, least=1, most=4):
    specs, loads = [], {}
    for index in range(draw(st.integers(least, most))):
        stride = draw(st.sampled_from([0, 16, 64]))
        slots = draw(st.integers(1, 8))
        spec = TableSpec(
            name=f"t{index}", num_rows=(stride or 500) * slots, row_dim=draw(st.sampled_from([8, 30, 128]))
        )
        specs.append(spec)
        share = draw(st.sampled_from([None, 0.0, 0.5]))
        loads[spec.name] = TableLoad(
            num_lookups=slots, code_stride=stride, id_bytes=1 if stride else 8, duplicate_share=share
        )
    work = Workload(
        batch_tokens=draw(st.sampled_from([16, 1024, 65536])),
        loads=loads,
        rule=draw(st.sampled_from(["sgd", "rowwise_adagrad", "adam"])),
        is_fused=draw(st.booleans()),
    )
    machine = draw(st.sampled_from([h100(1), h100(4), h100(8, 2), cpu(3), cpu(6, 2)]))
    return specs, work, machine


def memory_for(specs, work, machine, share):
    """Return the machine with memory for a share of the way from the leanest to the fastest plan."""
    roomy = replace(machine, memory_bytes=1 << 50)
    fastest = decide(specs, roomy, work).cost.rank_bytes.max()
    leanest = decide(specs, replace(machine, memory_bytes=1), work).cost.rank_bytes.max()
    return replace(machine, memory_bytes=int((leanest + share * (fastest - leanest)) / 0.9) + 2)


ONE_OF_500 = [TableSpec(name="t0", num_rows=500, row_dim=8)]
READ_ONCE = Workload(
    batch_tokens=16, loads={"t0": TableLoad(num_lookups=1, code_stride=0, id_bytes=8)}, rule="sgd", is_fused=False
)


@settings(max_examples=40)
@given(settings_of_few_tables(), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@example((ONE_OF_500, READ_ONCE, cpu(6, 2)), 0.0)  # a fifth of a byte too much
def test_plans_are_valid_and_fit(setting, share):
    specs, work, machine = setting
    machine = memory_for(specs, work, machine, share)
    plan = choose_plan(specs, machine, work)
    plan.validate(specs, machine.world_size)
    decision = judge(plan, specs, machine, work)
    assert decision.fits
    assert decision.cost.rank_bytes.max() <= machine.usable_bytes


def by_trying_everything(specs, work, machine):
    """Return the least time of any combination of plans that fits, and the largest gain of one table.

    Pieces may be uneven: one fits that would with as much on top as they add to the fullest rank of any combination.
    """
    options = [[price_table(plan, machine, work) for plan in candidates(spec, machine, work)] for spec in specs]
    gains = [max(cost.step_s for cost in kinds) - min(cost.step_s for cost in kinds) for kinds in options]
    combinations = list(itertools.product(*options))
    needed = [
        sum(cost.lasting_bytes for cost in chosen)
        + max(cost.buffer_bytes for cost in chosen)
        + dense_bytes(machine, work)
        for chosen in combinations
    ]
    plans = (lay_out((cost.plan for cost in chosen), machine) for chosen in combinations)
    laid_out = [price(ShardingPlan(machine.world_size, plan), machine, work).rank_bytes.max() for plan in plans]
    uneven = math.ceil(max(real - even for real, even in zip(laid_out, needed, strict=True)))
    fitting = [
        chosen
        for chosen, even in zip(combinations, needed, strict=True)
        if math.ceil(even + uneven) <= machine.usable_bytes
    ]
    return min((sum(cost.step_s for cost in chosen) for chosen in fitting), default=float("inf")), max(gains)


@settings(max_examples=40)
@given(settings_of_few_tables())
def test_with_ample_memory_the_plan_is_the_fastest_there_is(setting):
    specs, work, machine = setting
    machine = replace(machine, memory_bytes=1 << 50)
    best = [min(price_table(plan, machine, work).step_s for plan in candidates(spec, machine, work)) for spec in specs]
    found = decide(specs, machine, work)
    assert [kinds[0].step_s for kinds in found.options] == best
    chosen = [cost.plan.kind for cost in found.cost.tables]
    assert chosen == [kinds[0].plan.kind for kinds in found.options]


FOUR = [
    TableSpec(name="t0", num_rows=64, row_dim=128),
    TableSpec(name="t1", num_rows=500, row_dim=8),
    TableSpec(name="t2", num_rows=500, row_dim=8),
    TableSpec(name="t3", num_rows=48, row_dim=128),
]
FEW_TOKENS = Workload(
    batch_tokens=16,
    loads={
        "t0": TableLoad(num_lookups=1, code_stride=64, id_bytes=1),
        "t1": TableLoad(num_lookups=1, id_bytes=8),
        "t2": TableLoad(num_lookups=1, id_bytes=8),
        "t3": TableLoad(num_lookups=3, code_stride=16, id_bytes=1),
    },
    rule="rowwise_adagrad",
    is_fused=True,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(settings_of_few_tables(least=2, most=3), st.sampled_from([0.2, 0.5, 0.8]))
@example((FOUR, FEW_TOKENS, cpu(3)), 0.8)  # a table in one piece makes one rank much fuller than the average
def test_with_little_memory_the_plan_is_at_most_one_move_from_the_fastest(setting, share):
    specs, work, machine = setting
    machine = memory_for(specs, work, machine, share)
    best, gain = by_trying_everything(specs, work, machine)
    found = decide(specs, machine, work)
    assert found.fits
    slowest = sum(kinds[-1].step_s for kinds in found.options)
    assume(best + gain < slowest)  # or any plan would do
    by_name = {spec.name: kinds for spec, kinds in zip(specs, found.options, strict=True)}
    chosen = sum(
        next(
            cost.step_s
            for cost in by_name[table.plan.name]
            if (cost.plan.kind, cost.plan.code_stride, cost.plan.deduplicate)
            == (table.plan.kind, table.plan.code_stride, table.plan.deduplicate)
        )
        for table in found.cost.tables
    )
    assert chosen <= best + gain + 1e-12


@pytest.mark.parametrize(
    ("spec", "load", "machine", "rule", "kind"),
    [
        # Many wide rows are summed for a token: sums of columns are less than rows, and than partial sums.
        ((1 << 22, 4096), TableLoad(num_lookups=128), h100(8), "sgd", "column_wise"),
        # Narrow rows, often the same ones, over many hosts: little to fetch, and all codes to all hosts would be much.
        ((1 << 26, 128), TableLoad(num_lookups=16, duplicate_share=0.8), h100(64, 64), "rowwise_adagrad", "row_wise"),
        # Few tokens, many slots: sums are less than codes.
        (
            (1 << 22, 64),
            TableLoad(num_lookups=4096, code_stride=1024, id_bytes=4),
            h100(8),
            "rowwise_adagrad",
            "table_wise",
        ),
        # Smaller than anything that would travel.
        ((64, 8), TableLoad(num_lookups=64), h100(8), "rowwise_adagrad", "replicated"),
        # Columns stay on a host; of what crosses hosts each rank carries its share.
        (
            (1 << 17, 3072),
            TableLoad(num_lookups=128, code_stride=1024, id_bytes=4),
            h100(64, 8),
            "rowwise_adagrad",
            "grid",
        ),
    ],
)
def test_the_known_best_kinds(spec, load, machine, rule, kind):
    table = TableSpec(name="t", num_rows=spec[0], row_dim=spec[1], dtype=torch.bfloat16)
    work = Workload(batch_tokens=4096 * machine.world_size, loads={"t": load}, rule=rule, is_fused=True)
    assert choose_plan([table], machine, work).table("t").kind == kind


def test_columns_cost_more_where_squares_of_other_columns_are_waited_for():
    """Sums of gradients are written and read twice, and where few rows are read, lookups are sorted to list them."""
    for load, sorts in (
        (TableLoad(num_lookups=64, code_stride=256, id_bytes=1), False),
        (TableLoad(num_lookups=2), True),
    ):
        spec = TableSpec(name="t", num_rows=64 * 256, row_dim=1024)
        update_s = {}
        for rule in ("sgd", "rowwise_adagrad"):
            work = Workload(batch_tokens=4096 * 4, loads={"t": load}, rule=rule, is_fused=True)
            update_s[rule] = price_table(column_wise(spec, 4), h100(4), work).update_s
        touched = load.num_unique(spec.num_rows, 4096 * 4)
        passes_s = 3 * 4 * touched * 256 / h100(4).copy_bytes_per_s
        sorting_s = 4096 * 4 * load.num_lookups / h100(4).sort_ids_per_s if sorts else 0.0
        assert update_s["rowwise_adagrad"] - update_s["sgd"] == pytest.approx(passes_s + sorting_s)


def test_one_rank_keeps_everything():
    specs, loads = memoryformer()
    assert {table.kind for table in choose_plan(specs, h100(1), workload(loads)).tables} == {"replicated"}


def test_traffic_has_the_dtypes_asked_for():
    specs, loads = memoryformer()
    work = workload(loads, forward_dtype=torch.bfloat16, backward_dtype=torch.float8_e5m2)
    for table in choose_plan(specs, h100(4), work).tables:
        assert table.backward_dtype == torch.float8_e5m2
        assert table.forward_dtype == torch.bfloat16 or table.kind == "replicated"


def test_memory_is_balanced_where_slots_do_not_divide():
    specs, loads = memoryformer(num_layers=3, hidden_dim=248)
    decision = decide(specs, h100(7), workload(loads))
    filled = decision.cost.rank_bytes
    assert (filled.max() - filled.min()) / filled.max() < 0.05


def test_nothing_fits_is_an_error_that_says_what_would():
    specs, loads = memoryformer()
    with pytest.raises(ConfigError, match=r"too much: no room is left for .*; what would fit: ") as caught:
        choose_plan(specs, h100(4, memory_bytes=30_000_000), workload(loads))
    assert "\n" not in str(caught.value)


def test_no_tables_is_an_error():
    with pytest.raises(ConfigError, match="there must be a table"):
        decide([], h100(2), workload({}))


def test_a_plan_by_hand_is_judged_by_the_same_figures():
    specs, loads = memoryformer(num_layers=1)
    chosen = decide(specs, h100(4), workload(loads))
    again = judge(chosen.plan, specs, h100(4), workload(loads))
    assert again.cost.step_s == chosen.cost.step_s
    by_rows = ShardingPlan(4, tuple(row_wise(spec, 4) for spec in specs))
    assert judge(by_rows, specs, h100(4), workload(loads)).cost.step_s > chosen.cost.step_s
    with pytest.raises(ConfigError, match="the mesh has 8"):
        judge(by_rows, specs, h100(8), workload(loads))


def test_4096_ranks_and_100_terabytes():
    """Ends by the suite's time limit if planning is not quick."""
    slots, hidden_dim = 2048, 16384
    shapes = {"qkv": (4096, 3 * hidden_dim), "ffn": (16384, hidden_dim)}
    specs, loads = [], {}
    for layer in range(64):
        for part, (stride, row_dim) in shapes.items():
            name = f"blocks.{layer}.{part}"
            specs.append(TableSpec(name=name, num_rows=slots * stride, row_dim=row_dim, dtype=torch.bfloat16))
            loads[name] = TableLoad(num_lookups=slots, code_stride=stride, id_bytes=4)
    assert sum(spec.num_bytes for spec in specs) > 100e12
    work = Workload(batch_tokens=4096 * 64, loads=loads, rule="rowwise_adagrad", micro_batches=8)
    decision = decide(specs, h100(4096, 512), work)
    assert decision.fits
    decision.plan.validate(specs, 4096)
