"""Predictions against what real sharded tables hold, keep and send, on real ranks."""

import pytest
import torch

from mfdist.optim import RowAdagrad, RowAdam, RowSGD
from mfdist.sharding.cost import price_table
from mfdist.sharding.kinds import column_wise, grid, replicated, row_wise, table_wise
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.topology import cpu
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec
from mfdist.testing.run_ranks import RankPool
from tests.sharding import measured_ranks

#: Largest difference between a predicted number of bytes and the measured one, as a share of the latter.
WITHIN = 0.05

CODES = TableSpec(name="t", num_rows=12 * 256, row_dim=60)
CODES_LOAD = TableLoad(num_lookups=12, code_stride=256, id_bytes=1)
IDS = TableSpec(name="t", num_rows=20000, row_dim=40, dtype=torch.bfloat16)
IDS_LOAD = TableLoad(num_lookups=6, id_bytes=8)


@pytest.fixture(scope="module")
def pool():
    with RankPool() as made:
        yield made


def plans(spec, load, world_size):
    yield "rows", row_wise(spec, world_size)
    yield "rows each time", row_wise(spec, world_size, deduplicate=False, forward_dtype=torch.bfloat16)
    skewed = (0, *(spec.num_rows * part * part // world_size**2 for part in range(1, world_size)), spec.num_rows)
    yield "skewed rows", row_wise(spec, world_size, cuts=skewed)
    yield "pooled rows", row_wise(spec, world_size, pooled=True, backward_dtype=torch.bfloat16)
    yield "columns", column_wise(spec, world_size, backward_dtype=torch.bfloat16)
    yield "columns in fp8", column_wise(spec, world_size, forward_dtype=torch.float8_e4m3fn)
    yield "copies", replicated(spec)
    if load.code_stride:
        yield "slots", table_wise(spec, world_size, load.code_stride)
    if world_size == 4:
        yield "grid of rows", grid(spec, 2, 2)
    if world_size == 4 and load.code_stride:
        yield "grid of slots", grid(spec, 2, 2, code_stride=load.code_stride)


SIZES = (4, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3, 8)))
BOTH = pytest.mark.parametrize(("spec", "load"), [(CODES, CODES_LOAD), (IDS, IDS_LOAD)], ids=["codes", "ids"])
NUM_TOKENS = 1500


def compare(pool, plan, name, work, optimizer=None):
    """Hold one plan's predicted bytes against those of a table on ranks."""
    load, is_grid = work.load("t"), plan.kind == "grid"
    world_size = work.batch_tokens // NUM_TOKENS
    mesh = (2, world_size // 2) if is_grid else (world_size,)
    cost = price_table(plan, cpu(world_size, 2 if is_grid else 1), work)
    text = ShardingPlan(world_size, (plan,)).to_json()
    asked = (text, "t", NUM_TOKENS, load, mesh, optimizer, work.lookup_dtype)
    found = pool.run(measured_ranks.measured, world_size, *asked, timeout_s=200)
    predicted = {
        "weights": cost.held.on_ranks(cost.footprint.weights),
        "gradients": cost.held.on_ranks(cost.footprint.gradients),
        "states": cost.held.on_ranks(cost.footprint.states),
        "saved": cost.held.on_ranks(cost.footprint.saved),
        "forward": cost.sent_bytes("forward"),
        "backward": cost.sent_bytes("backward"),
    }
    for key, each in predicted.items():
        measured = [rank[key] for rank in found]
        if optimizer is None and key == "states":
            continue  # an optimiser outside has them
        assert each.tolist() == pytest.approx(measured, rel=WITHIN, abs=64), f"{key} of {name}"


@pytest.mark.parametrize("world_size", SIZES)
@BOTH
def test_bytes_are_those_predicted(pool, spec, load, world_size):
    work = Workload(batch_tokens=NUM_TOKENS * world_size, loads={"t": load})
    for name, plan in plans(spec, load, world_size):
        compare(pool, plan, name, work)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [(RowAdagrad(lr=0.1), "rowwise_adagrad"), (RowAdam(lr=0.1, state_dtype=torch.bfloat16), "adam")],
    ids=["adagrad", "adam"],
)
@BOTH
def test_bytes_of_fused_tables_are_those_predicted(pool, spec, load, optimizer, rule, world_size):
    work = Workload(
        batch_tokens=NUM_TOKENS * world_size,
        loads={"t": load},
        rule=rule,
        is_fused=True,
        state_dtype=torch.bfloat16,
    )
    for name, plan in plans(spec, load, world_size):
        if name in ("rows", "pooled rows", "columns", "copies", "slots", "grid of rows"):
            compare(pool, plan, name, work, optimizer)


@pytest.mark.parametrize("world_size", [3, 4])
def test_bytes_under_autocast_are_those_predicted(pool, world_size):
    """Sums of columns are whole, so they travel rounded; their gradients too where a rank's share of one is exact."""
    work = Workload(
        batch_tokens=NUM_TOKENS * world_size,
        loads={"t": CODES_LOAD},
        rule="sgd",
        is_fused=True,
        lookup_dtype=torch.bfloat16,
    )
    for name, plan in plans(CODES, CODES_LOAD, world_size):
        if name in ("rows", "columns", "columns in fp8", "slots", "grid of rows", "grid of slots"):
            compare(pool, plan, name, work, RowSGD(lr=0.1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_deduplication_saves_the_share_of_repeated_ids(pool, world_size):
    spec = TableSpec(name="t", num_rows=20000, row_dim=40)
    found = pool.run(measured_ranks.zipf_traffic, world_size, spec, NUM_TOKENS, 6)
    once, each_time, unique, ids = (sum(column) for column in zip(*found, strict=True))
    assert unique / ids < 0.4  # most are repeated
    assert once / each_time == pytest.approx(unique / ids, rel=WITHIN)
