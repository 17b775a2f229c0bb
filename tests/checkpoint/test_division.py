"""Who writes which file: every value written once or from one of its replicas, and all ranks agree."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdist.checkpoint import division
from mfdist.checkpoint.grid import FileGrid
from mfdist.errors import ConfigError
from mfdist.spec import Region

SHAPE = (61, 24)
GRID = FileGrid(SHAPE, 4, 8, 8)


@st.composite
def partitions(draw: st.DrawFn) -> list[list[Region]]:
    """Rectangles that cut the array by a random grid, dealt out to ranks, some of them twice."""
    cuts = [sorted({0, end, *draw(st.lists(st.integers(0, end), max_size=4))}) for end in SHAPE]
    world_size = draw(st.integers(1, 5))
    held: list[list[Region]] = [[] for _ in range(world_size)]
    for rows in itertools.pairwise(cuts[0]):
        for columns in itertools.pairwise(cuts[1]):
            for rank in draw(st.lists(st.integers(0, world_size - 1), min_size=1, max_size=2)):
                held[rank].append(Region(rows=rows, columns=columns))
    return held


@settings(max_examples=60, deadline=None)
@given(partitions())
def test_every_value_has_a_writer_and_every_file_one_owner(held: list[list[Region]]) -> None:
    plans = [list(division.divide("dense/a", GRID, held, rank)) for rank in range(len(held))]
    written = np.zeros(SHAPE, dtype=int)
    owned = [plan for rank, mine in enumerate(plans) for plan in mine if plan.owner == rank]
    assert sorted(plan.file for plan in owned) == sorted(name for name, _ in GRID.files())
    for plan in owned:
        for piece in plan.pieces:
            assert held[piece.rank][piece.part].intersection(piece.region) == piece.region
            assert plan.region.intersection(piece.region) == piece.region
            written[slice(*piece.region.rows), slice(*piece.region.columns)] += 1
            assert plan in plans[piece.rank]  # whoever contributes knows
    assert (written >= 1).all()


def test_a_file_that_one_rank_holds_needs_nobody_else() -> None:
    held = [[Region(rows=(0, 40), columns=(0, 24))], [Region(rows=(40, 61), columns=(0, 24))]]
    plans = [plan for rank in (0, 1) for plan in division.divide("dense/a", GRID, held, rank)]
    assert {len(plan.pieces) for plan in plans} == {1}


def test_a_file_across_shards_belongs_to_the_largest() -> None:
    held = [[Region(rows=(0, 42), columns=(0, 24))], [Region(rows=(42, 61), columns=(0, 24))]]
    [across] = {plan for plan in division.divide("dense/a", GRID, held, 0) if plan.file == "c.5.0"}
    assert across.owner == 1
    assert [piece.region.rows for piece in across.pieces] == [(42, 48), (40, 42)]


def test_replicas_share_the_work() -> None:
    held = [[GRID.region], [GRID.region], [GRID.region]]
    counts = [len(list(division.divide("dense/a", GRID, held, rank))) for rank in range(3)]
    assert sum(counts) == sum(1 for _ in GRID.files())
    assert max(counts) - min(counts) <= 1


def test_a_hole_is_named() -> None:
    held = [[Region(rows=(0, 30), columns=(0, 24))], [Region(rows=(30, 61), columns=(0, 20))]]
    with pytest.raises(ConfigError, match=r"rows 30 to 60, columns 20 to 23 of table 't' weight"):
        list(division.divide("tables/t/weight", GRID, held, 0))
