"""`shard`: the model trains as it does in one process, beside DDP and FSDP2, and bad input is refused at once."""

import re

import pytest

from mfdist.optim import RowAdagrad, RowAdam
from mfdist.testing.run_ranks import RankPool
from tests import parallelize_ranks as ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool() as made:
        yield made


@pytest.mark.parametrize("beside", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["row_wise", "column_wise", "table_wise", "replicated", "grid"])
def test_training_is_that_of_one_process(pool, kind, beside):
    world_size = 4 if kind == "grid" else 2
    for losses, expected, difference in pool.run(ranks.training, world_size, kind, beside, timeout_s=120):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert losses[-1] < losses[0]
        assert difference < 1e-5


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("another model", r"table \"blocks.0.qkv\" is 128 × 96 float32 in the plan, 64 × 48 float32 in the model"),
        ("a missing table", r'must cover every table of the model; it lacks "blocks.0.qkv"'),
        ("another world", r"it is for 4 ranks, the mesh has 2"),
        ("a mesh of one rank", r"must hold all 2 ranks of the process group in order; got \[[01]\]"),
        ("a grid on one axis", r"a grid needs a mesh of hosts × ranks of a host"),
        ("no such kind", r'must be auto or one of row_wise, .*; got "columnwise"'),
        ("no tables", r"must have tables that lie on one device"),
        ("one name twice", r'got two called "memory"'),
        ("one rank differs", r"must have the same model, plan and mesh; got .*(column_wise|row_wise).* on rank"),
        ("rows from other seeds", r"got 'table blocks.0.qkv 64 x 48 torch.float32 from seed \d+, std .*' on rank"),
        ("other rows", r"got 'table blocks.0.qkv 64 x 48 torch.float32 of \w{16}' on rank"),
        ("peer memory on one rank alone", r"must have the same chunk_bytes and uses_peer_memory; got .*(True|False)"),
        ("sharded twice", r"must have tables that lie on one device"),
    ],
)
def test_bad_input_is_refused_with_the_difference(pool, what, told):
    for message in pool.run(ranks.bad_input, 2, what):
        assert message.startswith("config: ") and re.search(told, message), message


@pytest.mark.parametrize("device", [None, "meta"], ids=["trained", "meta"])
@pytest.mark.parametrize("kind", ["row_wise", "column_wise"])
@pytest.mark.parametrize("optimizer", [RowAdam(lr=0.05), RowAdagrad(lr=0.05)], ids=["adam", "adagrad"])
def test_fused_tables_stay_fused_and_keep_their_states(pool, kind, device, optimizer):
    for distance, moved, has_rate in pool.run(ranks.fused_before, 2, kind, device, optimizer):
        assert distance < 1e-5 < 1e-2 < moved and has_rate


def test_rows_that_are_there_are_kept_and_auto_is_a_plan(pool):
    for is_same, num_tables, shown in pool.run(ranks.kept_rows, 2):
        assert is_same and num_tables == 3
        assert "ShardedTable" in shown and "LocalTable" not in shown


def test_what_was_cast_is_planned_in_its_dtype(pool):
    assert pool.run(ranks.cast_first, 2) == [({"torch.bfloat16"}, {"torch.float32"})] * 2
