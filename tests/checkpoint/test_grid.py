"""How arrays are cut: every value in exactly one file, files of bounded size, and cuts that the usual shards meet."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.checkpoint import grid
from mfdist.spec import Region

shapes = st.one_of(
    st.lists(st.integers(0, 5000), max_size=2).map(tuple),
    st.lists(st.integers(0, 60), min_size=3, max_size=4).map(tuple),
)


@given(shapes, st.sampled_from([1, 2, 4, 8, 16]))
def test_files_cover_every_value_once(shape: tuple[int, ...], item_bytes: int) -> None:
    cut = grid.cut(shape, item_bytes)
    covered = np.zeros((grid.num_rows(shape), grid.num_columns(shape)), dtype=np.int8)
    names = set()
    for name, region in cut.files():
        covered[slice(*region.rows), slice(*region.columns)] += 1
        names.add(name)
        assert region.shape[0] <= cut.rows_per_file
        assert region.shape[1] <= cut.columns_per_file
        assert len(name.split(".")) == len(shape) + 1
    assert (covered == 1).all()
    assert len(names) == sum(1 for _ in cut.files())
    row_bytes = cut.columns_per_file * item_bytes
    assert cut.rows_per_chunk * row_bytes <= max(grid.MAX_FILE_BYTES // grid.CHUNKS_PER_FILE, row_bytes)
    assert cut.rows_per_file % cut.rows_per_chunk == 0
    # Where rows are almost as large as chunks, a file that holds all may need a few more.
    assert cut.rows_per_file * row_bytes <= max(grid.MAX_FILE_BYTES, row_bytes) + 8 * row_bytes


@given(shapes, st.data())
def test_the_files_of_a_region_are_those_that_meet_it(shape: tuple[int, ...], data: st.DataObject) -> None:
    cut = grid.cut(shape, 4)
    rows, columns = (sorted(data.draw(st.tuples(*[st.integers(0, end)] * 2))) for end in cut.region.shape)
    region = Region(rows=tuple(rows), columns=tuple(columns))
    expected = [(name, file) for name, file in cut.files() if not file.intersection(region).is_empty]
    assert list(cut.files_in(region)) == expected


def test_a_small_array_is_one_file_of_even_chunks() -> None:
    just_over = grid.MIN_FILE_BYTES // grid.CHUNKS_PER_FILE // 4 + 1
    cut = grid.cut((just_over,), 4)
    assert cut.rows_per_chunk == (just_over + 1) // 2
    assert cut.rows_per_file == 2 * cut.rows_per_chunk


@pytest.mark.parametrize("shape", [(32768, 3072), (131072, 1024), (1 << 20, 1024), (16384 * 256, 4096)], ids=str)
@pytest.mark.parametrize(("num_row_shards", "num_column_shards"), [(2, 1), (8, 1), (1, 2), (1, 8), (2, 4), (4, 2)])
def test_the_usual_shards_of_large_tables_share_no_file(
    shape: tuple[int, int], num_row_shards: int, num_column_shards: int
) -> None:
    cut = grid.cut(shape, 4)
    steps = (cut.rows_per_file, cut.columns_per_file)
    for size, num, step in zip(shape, (num_row_shards, num_column_shards), steps, strict=True):
        assert all(size * shard // num % step == 0 for shard in range(num))


def test_cuts_reach_beyond_32_bits_of_elements() -> None:
    cut = grid.cut((1 << 24, 1024), 4)
    last_row = (1 << 24) - 1
    [(name, region)] = cut.files_in(Region(rows=(last_row, last_row + 1), columns=(1023, 1024)))
    assert region.rows[1] == 1 << 24
    assert region.columns[1] == 1024
    assert (1 << 24) // cut.rows_per_file * (1024 // cut.columns_per_file) == (1 << 36) // (grid.MAX_FILE_BYTES)
    assert name == f"c.{(1 << 24) // cut.rows_per_file - 1}.{1024 // cut.columns_per_file - 1}"
    assert next(itertools.islice(cut.files(), 1, 2))[0] == "c.0.1"
