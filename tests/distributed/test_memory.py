"""What a rank holds at its fullest: its share of the table and its states, and the buffers the plan announced."""

import sys

import pytest

from mfdist.testing.run_ranks import RankPool
from tests.distributed import suite_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


@pytest.mark.parametrize(
    ("world_size", "kind"),
    [
        *((2, kind) for kind in ("row_wise", "pooled_rows", "column_wise", "table_wise")),
        *(pytest.param(4, kind, marks=pytest.mark.slow) for kind in ("row_wise", "column_wise", "grid", "slot_grid")),
    ],
)
def test_a_rank_holds_its_share_and_what_was_announced(pool, world_size, kind):
    for found in pool.run(suite_ranks.peak_memory, world_size, kind, "cpu", timeout_s=120):
        assert 0.9 * found["held"] <= found["peak"] <= found["allowed"] + found["announced"]


@pytest.fixture(scope="module")
def pool():
    with RankPool() as made:
        yield made
