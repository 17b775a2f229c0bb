"""Explanations, word for word."""

from dataclasses import replace

from mfdist.sharding.explanation import described, explain
from mfdist.sharding.kinds import grid, row_wise
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.planner import decide, judge
from mfdist.sharding.topology import h100
from tests.sharding.models import memoryformer, workload

SPECS, LOADS = memoryformer(num_layers=1, hidden_dim=1024)
WORK = workload(LOADS, batch_tokens=32768)


def test_golden_explanations():
    found = explain(decide(SPECS, h100(8), WORK))
    assert [f"{item.cost.plan.name}: {described(item.cost)}; {item.reason}" for item in found] == [
        "blocks.0.qkv: column_wise; next best is table_wise, 1.79× as long: 3.48 ms in exchanges against 0.943 ms",
        "blocks.0.ffn1: column_wise; next best is table_wise, 1.00× as long: 1.7 ms in exchanges against 0.721 ms",
        "blocks.0.ffn2: table_wise; next best is column_wise, 1.14× as long: 2.22 ms in lookups against 0.716 ms",
    ]


def test_a_kind_is_told_why_it_was_not_the_fastest():
    machine = h100(8, memory_bytes=360_000_000)
    found = explain(decide(SPECS, machine, WORK))
    reasons = [item.reason for item in found if "slower than" in item.reason]
    assert reasons
    assert all("more a rank" in reason or "at once against" in reason for reason in reasons)


def test_one_rank_needs_no_reason():
    found = explain(decide(SPECS, h100(1), WORK))
    assert {item.reason for item in found} == {"there is one rank, which holds everything"}


def test_a_plan_by_hand_is_told_what_would_be_faster():
    plan = ShardingPlan(8, tuple(row_wise(spec, 8) for spec in SPECS))
    found = explain(judge(plan, SPECS, h100(8), WORK))
    faster = [item.reason.split(" ms slower than ")[1] for item in found]
    assert all(reason.startswith(("column_wise", "table_wise", "replicated")) for reason in faster)


def test_options_are_one_of_each_kind_fastest_first():
    for item in explain(decide(SPECS, h100(16, 2), WORK)):
        names = [described(option) for option in item.options]
        assert len(set(names)) == len(names) == 6
        times = [option.step_s for option in item.options]
        assert times == sorted(times)


def test_a_grid_says_what_it_cuts():
    plan = ShardingPlan(4, (grid(replace(SPECS[0], name="a"), 2, 2), grid(SPECS[0], 2, 2, code_stride=256)))
    loads = {**LOADS, "a": LOADS[SPECS[0].name]}
    specs = [table.spec for table in plan.tables]
    found = explain(judge(plan, specs, h100(4, 2), replace(WORK, loads=loads)))
    assert [described(item.cost) for item in found] == ["grid of rows", "grid of slots"]
