"""Traffic: the formulas against bytes counted one by one, lookup by lookup, as the kinds are described."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfdist.sharding.holdings import Holdings
from mfdist.sharding.kinds import column_wise, grid, replicated, row_wise, table_wise
from mfdist.sharding.traffic import transfers
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec
from tests.sharding.plans import WORLD_SIZE, table_plans

SLOTS, STRIDE, WIDTH, TOKENS = 12, 16, 24, 40
SPEC = TableSpec(name="t", num_rows=SLOTS * STRIDE, row_dim=WIDTH)
LOAD = TableLoad(num_lookups=SLOTS, code_stride=STRIDE, id_bytes=1)


def trained(load, **changes):
    return Workload(batch_tokens=1, loads={"t": load}, **changes)


def sent(plan, load=LOAD, *, num_tokens=TOKENS, world_size=4, ranks_per_host=4, **changes):
    """Return the bytes each rank sends forward and backward."""
    held = Holdings.of(plan, world_size)
    found = transfers(plan, held, trained(load, **changes), num_tokens, ranks_per_host)
    return [
        held.on_ranks(sum((part.sent for part in found if part.phase == phase and not part.is_control), 0 * held.rows))
        for phase in ("forward", "backward")
    ]


def counted(plan, ids, *, world_size=4):
    """Return the bytes each rank sends, moving every number of a lookup and its gradient by itself."""
    forward, backward = np.zeros(world_size), np.zeros(world_size)
    slots = np.arange(SLOTS) * STRIDE
    for rank, token in itertools.product(range(world_size), range(ids.shape[1])):
        rows = ids[rank, token] + slots
        for other in range(world_size):
            region = plan.region_of(other)
            if other == rank:
                continue
            columns = region.shape[1]
            if plan.kind == "column_wise":
                forward[rank] += SLOTS * (1 + 4)
                forward[other] += columns * 4
                backward[rank] += columns * 4
                backward[other] += SLOTS * 4
            elif plan.kind == "table_wise":
                mine = ((rows >= region.rows[0]) & (rows < region.rows[1])).sum()
                forward[rank] += mine * (1 + 4)
                forward[other] += WIDTH * 4
                backward[rank] += WIDTH * 4
                backward[other] += mine * 4
            elif plan.kind == "row_wise":
                mine = ((rows >= region.rows[0]) & (rows < region.rows[1])).sum()
                if not plan.deduplicate:
                    forward[rank] += mine * 4
                    forward[other] += mine * WIDTH * 4
                backward[rank] += (mine > 0) * (WIDTH * 4 + 4) + mine * (4 + 4)
                backward[other] += mine * 4
    if plan.kind == "row_wise" and plan.deduplicate:
        for rank, other in itertools.permutations(range(world_size), 2):
            region = plan.region_of(other)
            asked = np.unique(ids[rank] + slots)
            mine = ((asked >= region.rows[0]) & (asked < region.rows[1])).sum()
            forward[rank] += mine * 4
            forward[other] += mine * WIDTH * 4
    return forward, backward


PLANS = {
    "rows": row_wise(SPEC, 4),
    "rows, uneven": row_wise(SPEC, 4, cuts=(0, 16, 32, 96, 192)),
    "rows, inside slots": row_wise(SPEC, 4, cuts=(0, 4, 100, 164, 192)),
    "rows, each time": row_wise(SPEC, 4, deduplicate=False),
    "columns": column_wise(SPEC, 4),
    "columns, uneven": column_wise(SPEC, 4, cuts=(0, 0, 4, 12, 24)),
    "slots": table_wise(SPEC, 4, STRIDE),
    "slots, uneven": table_wise(SPEC, 4, STRIDE, cuts=(0, 16, 32, 96, 192)),
}


@pytest.mark.parametrize("name", PLANS)
def test_bytes_are_those_counted_one_by_one(name):
    """Over many draws of ids, since what is deduplicated is a matter of chance; the rest is exact."""
    rng, num_draws = np.random.default_rng(0), 30
    totals = np.zeros((2, 4))
    for _ in range(num_draws):
        totals += counted(PLANS[name], rng.integers(0, STRIDE, (4, TOKENS, SLOTS)))
    np.testing.assert_allclose(sent(PLANS[name]), totals / num_draws, rtol=0.02 if "rows" in name else 1e-12)


def test_copies_send_each_share_twice():
    size = 2 * SPEC.num_bytes * 3 / 4
    assert [part.tolist() for part in sent(replicated(SPEC))] == [[0] * 4, [size] * 4]


def test_a_grid_is_columns_within_a_host_and_slots_or_rows_between():
    def outside(slots):
        plan = grid(SPEC, 2, 2, code_stride=slots)
        held = Holdings.of(plan, 4)
        found = transfers(plan, held, trained(LOAD), TOKENS, 2)
        return {(part.axis, part.phase): 0.0 for part in found} | {
            key: sum(float(part.sent[0]) for part in found if (part.axis, part.phase) == key and not part.is_control)
            for key in {(part.axis, part.phase) for part in found}
        }

    by_slots = outside(STRIDE)
    assert by_slots["inside", "forward"] == TOKENS * (SLOTS * 5 + WIDTH / 2 * 4)
    assert by_slots["between", "forward"] == 2 * TOKENS * (SLOTS / 2 * 5 + WIDTH / 2 * 4)
    by_rows = outside(0)
    assert by_rows["inside", "forward"] == by_slots["inside", "forward"]
    unique = LOAD.num_unique(SPEC.num_rows, 2 * TOKENS)
    assert by_rows["between", "forward"] == pytest.approx(unique / 2 * (4 + WIDTH / 2 * 4))


@given(table_plans(), st.integers(0, 50), st.integers(1, 5))
def test_what_is_sent_is_received(plan, num_tokens, num_lookups):
    stride = plan.code_stride
    load = TableLoad(num_lookups=plan.num_rows // stride if stride else num_lookups, code_stride=stride)
    ranks_per_host = plan.num_column_parts if plan.kind == "grid" else WORLD_SIZE
    if plan.kind == "grid" and len(plan.owners) < WORLD_SIZE:
        return  # a grid spans the world
    held = Holdings.of(plan, WORLD_SIZE)
    for part in transfers(plan, held, trained(load), num_tokens, ranks_per_host):
        assert (part.sent >= 0).all()
        assert part.sent @ held.counts == pytest.approx(part.received @ held.counts, rel=1e-9, abs=1e-6), part.what


def test_narrow_traffic_is_narrower_and_fp8_has_a_scale_a_row():
    wide = sent(column_wise(SPEC, 4))
    half = sent(column_wise(SPEC, 4, forward_dtype=torch.bfloat16))
    eighth = sent(column_wise(SPEC, 4, forward_dtype=torch.float8_e4m3fn))
    codes = TOKENS * SLOTS * 5 * 3
    assert half[0][0] - codes == (wide[0][0] - codes) / 2
    assert eighth[0][0] - codes == (wide[0][0] - codes) / 4 + TOKENS * 3 * 4
    assert half[1].tolist() == wide[1].tolist()
    kept = sent(column_wise(SPEC, 4, forward_dtype=torch.float64))  # rows are no wider on the wire than at home
    assert kept[0].tolist() == wide[0].tolist()


def test_one_rank_sends_nothing():
    assert not transfers(row_wise(SPEC, 1), Holdings.of(row_wise(SPEC, 1), 1), trained(LOAD), TOKENS, 1)


def test_fused_copies_sum_in_fp32_and_say_which_rows():
    half = TableSpec(name="t", num_rows=SPEC.num_rows, row_dim=WIDTH, dtype=torch.bfloat16)
    for spec, wire, width in ((SPEC, None, 4), (half, None, 4), (SPEC, torch.bfloat16, 2)):
        plan = replicated(spec, backward_dtype=wire)
        expected = 2 * SPEC.num_rows * (WIDTH * width + 1) * 3 / 4
        assert sent(plan, is_fused=True)[1].tolist() == [expected] * 4


@pytest.mark.parametrize("num_tokens", [3, TOKENS])
def test_row_wise_adagrad_sends_the_squares_of_the_rows_that_were_read(num_tokens):
    """Of all rows, where there are four lookups for each: those that were read are not listed then."""
    plan = column_wise(SPEC, 4, cuts=(0, 0, 4, 12, 24))
    rules = ("sgd", "rowwise_adagrad")
    plain, adagrad = (sent(plan, num_tokens=num_tokens, is_fused=True, rule=rule)[1] for rule in rules)
    read = LOAD.num_unique(SPEC.num_rows, 4 * num_tokens)
    assert 0 < read < SPEC.num_rows
    squares = 4 * (read if num_tokens == 3 else SPEC.num_rows)
    assert (adagrad - plain).tolist() == pytest.approx([0, *[2 * squares] * 3])


def test_ranks_without_slots_send_no_sums_and_get_no_gradients():
    plan = table_wise(SPEC, 4, STRIDE, cuts=(0, 0, 0, 64, 192))
    forward, backward = sent(plan)
    codes = TOKENS * SLOTS * 5
    assert forward.tolist()[:2] == [codes] * 2
    assert backward.tolist()[:2] == [2 * TOKENS * WIDTH * 4] * 2
    assert backward.tolist()[2] == TOKENS * (WIDTH * 4 + 3 * 4 * 4)
