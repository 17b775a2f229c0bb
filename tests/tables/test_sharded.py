"""ShardedTable: every kind keeps the contract of all tables, and gives what an unsharded table gives."""

import re

import pytest
import torch

from mfdist.optim import RowAdagrad, RowSGD
from mfdist.testing.run_ranks import RankPool
from mfdist.testing.tolerances import TOLERANCES, relative_error
from tests.tables import autocast_ranks, meanwhile_ranks
from tests.tables import sharded_ranks as ranks

KINDS = (
    "row_wise",
    "uneven_rows",
    "some_rows",
    "pooled_rows",
    "pooled_slots",
    "column_wise",
    "uneven_columns",
    "table_wise",
    "few_slots",
    "one_owner",
    "replicated",
)
GRIDS = ("grid", "slot_grid", "pooled_grid")
EXACT = ("row_wise", "uneven_rows", "some_rows", "column_wise", "uneven_columns", "one_owner", "grid")


@pytest.fixture(scope="module")
def pool():
    with RankPool() as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "world_size"), [*((kind, 2) for kind in KINDS), *((kind, 4) for kind in (*GRIDS, "uneven_columns"))]
)
def test_the_contract_of_every_table(pool, kind, world_size):
    names = pool.run(ranks.conformance, world_size, kind, timeout_s=120)
    assert len(names[0]) > 20 and names[0] == names[-1]


@pytest.mark.parametrize("stride", [0, 8], ids=["ids", "codes"])
@pytest.mark.parametrize(
    ("kind", "world_size"),
    [*((kind, 3) for kind in KINDS), *((kind, 4) for kind in GRIDS), ("row_wise", 1), ("column_wise", 1)],
)
def test_what_an_unsharded_table_gives(pool, kind, world_size, stride):
    check_equal(kind, pool.run(ranks.compared, world_size, kind, stride, {}))


@pytest.mark.parametrize("stride", [0, 8], ids=["ids", "codes"])
@pytest.mark.parametrize(("kind", "world_size"), [*((kind, 3) for kind in KINDS), *((kind, 4) for kind in GRIDS)])
def test_ranks_of_several_hosts_give_the_same(pool, kind, world_size, stride):
    arguments = (ranks.on_hosts_of_their_own, world_size, ranks.compared, kind, stride, {})
    check_equal(kind, pool.run(*arguments))


def check_equal(kind, everyones):
    for got, wanted, repeats in everyones:
        assert repeats
        for one, other in zip(got, wanted, strict=True):
            assert one.dtype == other.dtype
            assert relative_error(one, other) <= TOLERANCES["float32"]
        if kind in EXACT:
            assert torch.equal(got[0], wanted[0])
            assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        *(
            (kind, 3)
            for kind in ("some_rows", "pooled_rows", "uneven_columns", "table_wise", "one_owner", "replicated")
        ),
        *((kind, 4) for kind in GRIDS),
    ],
)
def test_all_ranks_know_the_most_that_any_sends_to_any(pool, kind, world_size):
    """It decides whether a message is split, or goes by peer memory, and where its parts lie there."""
    groups = {}
    for found in pool.run(ranks.sends, world_size, kind, 8):
        for members, sent in found:
            groups.setdefault(members, []).append(sent)
    for members, everyones in groups.items():
        assert len(everyones) == len(members)
        for sent in zip(*everyones, strict=True):
            assert len({(each.dtype, each.largest) for each in sent}) == 1
            assert max(max(each.sizes) for each in sent) <= sent[0].largest
            arriving = zip(*(each.arriving for each in sent), strict=True)
            assert [each.sizes for each in sent] == [list(line) for line in arriving]
    assert sum(len(sent) for everyones in groups.values() for sent in everyones)


@pytest.mark.parametrize("kind", ["row_wise", "pooled_rows", "column_wise", "table_wise", "replicated"])
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=["bf16", "e4m3", "e5m2"])
def test_narrower_traffic_costs_its_rounding_and_no_more(pool, kind, wire):
    """Forward and backward are chosen apart; a wire narrower than the rows moves only what it carries."""
    bound = {torch.bfloat16: 4e-3, torch.float8_e4m3fn: 6e-2, torch.float8_e5m2: 0.12}[wire]
    for direction in ("forward_dtype", "backward_dtype"):
        got, wanted, repeats = pool.run(ranks.compared, 2, kind, 8, {direction: wire})[0]
        errors = [relative_error(one, other) for one, other in zip(got, wanted, strict=True)]
        assert repeats and max(errors) <= bound
        is_forward = direction == "forward_dtype"
        assert (errors[0] > 1e-6) == (is_forward and kind != "replicated")
        assert (errors[1] > 1e-6) != is_forward


@pytest.mark.parametrize("kind", ["row_wise", "pooled_rows", "column_wise", "table_wise", "replicated"])
def test_bf16_tables_travel_as_they_are(pool, kind):
    for got, wanted, repeats in pool.run(ranks.compared, 3, kind, 8, {"dtype": torch.bfloat16}):
        assert repeats and got[0].dtype == torch.bfloat16
        for one, other in zip(got, wanted, strict=True):
            assert relative_error(one.float(), other.float()) <= TOLERANCES["bfloat16"]


@pytest.mark.parametrize("kind", ["row_wise", "column_wise"])
def test_chunks_change_no_bit(pool, kind):
    results = pool.run(ranks.on_hosts_of_their_own, 2, ranks.chunked, kind, 8)
    assert all(is_same for is_same, _ in results)
    without, within = (sum(messages[index] for _, messages in results) for index in (0, 1))
    assert within > without


@pytest.mark.parametrize(("kind", "world_size"), [("column_wise", 2), ("column_wise", 4), ("uneven_columns", 4)])
def test_sums_that_travel_while_others_are_made_change_no_bit(pool, kind, world_size):
    for is_same, times in pool.run(meanwhile_ranks.made_in_parts, world_size, kind, 8):
        assert is_same and times == {0}  # the first time, and not the second


@pytest.mark.parametrize(
    "reaches", [meanwhile_ranks.ordered_meanwhile, ranks.on_hosts_of_their_own], ids=["memory", "gloo"]
)
@pytest.mark.parametrize("rule", [RowSGD, RowAdagrad])
@pytest.mark.parametrize(("kind", "world_size"), [("column_wise", 4), ("uneven_columns", 4), ("table_wise", 3)])
def test_lookups_put_in_order_while_gradients_travel_change_no_bit(pool, kind, world_size, rule, reaches):
    asked = () if reaches is meanwhile_ranks.ordered_meanwhile else (meanwhile_ranks.ordered_meanwhile,)
    for is_same, times in pool.run(reaches, world_size, *asked, kind, rule):
        assert is_same and times == [2, 2]  # in the first table's updates


@pytest.mark.parametrize("kind", ["column_wise", "table_wise", "row_wise", "pooled_rows", "replicated"])
def test_training_goes_on_after_an_evaluation_in_inference_mode(pool, kind):
    assert all(pool.run(meanwhile_ranks.evaluated_first, 2, kind))


@pytest.mark.parametrize(
    ("kind", "number"),
    [("column_wise", 4), ("table_wise", 4), ("pooled_rows", 4), ("row_wise", 5), ("replicated", 2)],
)
def test_what_is_there_together_travels_in_one_message(pool, kind, number):
    stride = 0 if kind in ("row_wise", "pooled_rows") else 8
    assert pool.run(ranks.messages, 2, kind, stride) == [number] * 2


@pytest.mark.parametrize("kind", ["row_wise", "pooled_rows"])
def test_rows_stay_where_ranks_update_different_tables(pool, kind):
    assert pool.run(ranks.updated_apart, 2, kind) == [("consistency", True, 0)] * 2


@pytest.mark.parametrize("kind", ["column_wise", "uneven_columns", "table_wise"])
def test_lookups_that_begin_before_the_sizes_are_known(pool, kind):
    (first, kind_first, after_first), (second, kind_second, after_second) = pool.run(meanwhile_ranks.hasty, 2, kind, 8)
    assert all(is_same for is_same, _ in (*first, *second)) and all((*after_first, *after_second))
    # The fourth and the seventh were begun with numbers of tokens that had changed, and made again.
    (once, *others), (once_there, *others_there) = ([sent for _, sent in results] for results in (first, second))
    again = [call for call, sent in enumerate(others, start=1) if sent > once]
    again_there = [call for call, sent in enumerate(others_there, start=1) if sent > once_there]
    assert sorted({*again, *again_there}) == [3, 6]
    assert kind_first == ["consistency"] * 5 and kind_second == ["row_id", *["config"] * 4]


@pytest.mark.parametrize("kind", ["row_wise", "pooled_rows", "column_wise", "table_wise", "replicated"])
def test_messages_past_the_limit_are_split(pool, kind):
    assert pool.run(ranks.in_pieces, 3, kind, 8) == [True] * 3


@pytest.mark.parametrize(
    ("kind", "world_size"), [("uneven_rows", 3), ("column_wise", 3), ("grid", 4), ("replicated", 2)]
)
def test_first_values_do_not_depend_on_the_sharding(pool, kind, world_size):
    assert pool.run(ranks.initial_rows, world_size, kind) == [True] * world_size


@pytest.mark.parametrize("kind", ["row_wise", "column_wise", "table_wise", "replicated"])
def test_gradients_are_those_of_the_mean_over_the_ranks(pool, kind):
    for rows, scores in pool.run(ranks.mean_loss, 2, kind):
        expected = torch.zeros(16)
        # Rank 1 looks one row further than rank 0.
        for row, times in ((0, 1), (9, 2), (1, 1), (10, 2)):
            expected[row] = times / 3 / 2
        assert torch.allclose(rows, expected[:, None].expand(16, 4))
        assert scores.shape == (3, 1)


@pytest.mark.parametrize("kind", ["row_wise", "pooled_rows", "column_wise", "table_wise"])
def test_one_ranks_bad_id_is_an_error_everywhere_and_the_next_lookup_works(pool, kind):
    told = pool.run(ranks.other_inputs, 3, kind)
    assert told[1][0].startswith('row_id: row id 16 at lookup 0 is outside table "words"')
    for rank in (0, 2):
        assert 'lookup of table "words"' in told[rank][0] and "rank 1 refused it" in told[rank][0]
    assert all(rows == [[1.0] * 4] for _, rows in told)


def test_lookups_in_different_tables_are_told_apart(pool):
    told = pool.run(ranks.other_tables, 3)
    assert told[0].startswith(
        "consistency: all ranks must make the same lookups in the same order; rank 0 makes call 0"
    )
    assert re.search(r'rank 0 makes .*table "words" .*rank 1 makes call 0, the lookup of table "bytes"', told[0])
    assert 'rank 1 makes call 0, the lookup of table "bytes"' in told[1]


@pytest.mark.parametrize("what", ["lookup", "gradient"])
def test_a_rank_that_does_not_come_is_named(pool, what):
    for told in pool.run(ranks.late, 3, what)[::2]:
        assert told.startswith(f"unavailable: all ranks must reach call {int(what == 'gradient')}, the {what} of table")
        assert "within 3 s; rank 1 did not" in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("uneven_rows", 3), ("pooled_rows", 3), ("uneven_columns", 3), ("table_wise", 3), ("grid", 4)],
)
def test_rows_trained_in_backward_are_those_of_an_unsharded_table(pool, kind, world_size, rule, dtype):
    """Stochastic rounding included, since its random bits come from a value's place in the whole table."""
    for got, wanted in pool.run(ranks.fused, world_size, kind, 8, rule, dtype):
        if (rule == "adagrad" and "columns" in kind) or kind == "grid":  # mean squares are summed by columns
            assert relative_error(got.float(), wanted.detach().float()) <= TOLERANCES["float32"]
        else:
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["uneven_rows", "uneven_columns"])
def test_moments_in_bytes_are_those_of_an_unsharded_table(pool, kind):
    for got, wanted in pool.run(ranks.fused, 3, kind, 8, "adam in bytes", torch.bfloat16):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        ("row_wise", 2),
        ("pooled_rows", 2),
        ("column_wise", 2),
        ("uneven_columns", 4),
        ("table_wise", 2),
        ("replicated", 2),
        ("grid", 4),
    ],
)
def test_rows_in_fp32_trained_under_autocast(pool, kind, world_size):
    """Sums that are whole before they travel are rounded before, not after: the same bits, half as many of them."""
    for (out, wanted), (rows, wanted_rows), _ in pool.run(autocast_ranks.fused_under_autocast, world_size, kind):
        assert out.dtype == torch.bfloat16
        assert relative_error(out.float(), wanted.float()) <= TOLERANCES["bfloat16"]
        assert relative_error(rows, wanted_rows) <= TOLERANCES["float32"]
        if kind in ("column_wise", "uneven_columns"):
            assert torch.equal(out, wanted) and torch.equal(rows, wanted_rows)
    if kind == "column_wise":
        (*_, sent), (*_, sent_by_none) = pool.run(autocast_ranks.fused_under_autocast, world_size, kind)
        assert sent == 37 * 5 * (1 + 4)  # rank 1 has no tokens: codes and scores to it, and no sums
        assert sent_by_none == 37 * 12 * 2  # half of 24 columns, in bf16


@pytest.mark.parametrize("kind", ["column_wise", "uneven_columns"])
def test_small_gradients_in_fp16_lose_nothing_by_the_number_of_ranks(pool, kind):
    for _, (rows, wanted_rows), _ in pool.run(autocast_ranks.fused_under_autocast, 4, kind, torch.float16, 1e-6):
        assert relative_error(rows, wanted_rows) <= TOLERANCES["float32"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_lookups_under_autocast_that_begin_before_the_sizes_are_known(pool, dtype):
    """What stands in for a lookup of other tokens, or one that is refused, is of the same dtype as all others'."""
    counts = ((9, 9), (9, 9), (9, 9), (9, 8), (9, 8), (9, 8), (6, 9))
    asked = (ranks.on_hosts_of_their_own, 2, autocast_ranks.hasty, counts, dtype)
    for rank, (is_same, error) in enumerate(pool.run(*asked)):
        assert is_same == [True] * len(counts)
        assert error == ("row_id" if rank == 1 else "consistency")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize(("kind", "world_size"), [("column_wise", 2), ("uneven_columns", 3), ("replicated", 2)])
def test_rows_that_nobody_reads_stay_where_most_are_read(pool, kind, world_size, rule, dtype):
    """Also where all rows' gradients are summed and none is listed; with weight decay, which would show."""
    for rows, wanted, first in pool.run(autocast_ranks.mostly_read, world_size, kind, rule, dtype):
        assert relative_error(rows, wanted) <= TOLERANCES["float32"]
        unread = torch.arange(40) % 8 >= 4
        assert torch.equal(rows[unread], first[unread]) and not torch.equal(rows[~unread], first[~unread])


def test_autocast_on_one_rank_alone_is_told(pool):
    for rank, (told, after) in enumerate(pool.run(autocast_ranks.other_autocast, 2)):
        assert told.startswith("consistency: ")
        assert f"rank {1 - rank} makes" in told and "bfloat16)" in told and "float32)" in told
        assert after == [[1.0] * 4]


@pytest.mark.parametrize("kind", ["row_wise", "pooled_rows", "column_wise", "table_wise", "replicated"])
def test_a_bad_id_that_a_kernel_has_met_leaves_nobody_waiting(pool, kind):
    """GPUs tell of it later, perhaps in the midst of an exchange: it is raised before the next, and told to all."""
    for rank, (told, grads) in enumerate(pool.run(autocast_ranks.met_by_a_kernel, 3, kind)):
        first, _, second = told.partition("; row_id" if rank == 1 else "; consistency")
        if rank == 1:
            assert first.startswith('row_id: row id 99 is outside table "words"') and "row id 98" in second
        elif kind != "replicated":  # whose lookups ask nobody
            assert first.startswith("consistency: ") and "rank 1 refused it" in first and "rank 1 refused it" in second
        assert grads == [[4.0]]
