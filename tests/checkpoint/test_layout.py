"""Names and paths: pure, so tested by their properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.checkpoint import layout
from mfdist.errors import ConfigError

parts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=16)


@given(parts, parts)
def test_a_table_path_is_read_back_and_stays_three_plain_parts(table: str, array: str) -> None:
    path = layout.table_path(table, array)
    assert layout.parse_path(path) == (table, array)
    assert path.isascii()
    assert len(path.split("/")) == 3
    assert all(not part.startswith((".", "__")) and part != "zarr.json" for part in path.split("/"))


@given(st.lists(parts.map(lambda part: part.replace("/", "_")), min_size=1, max_size=4).map("/".join))
def test_a_dense_path_is_read_back(name: str) -> None:
    assert layout.parse_path(layout.dense_path(name)) == (None, name)


@pytest.mark.parametrize("name", ["", "a//b", "/a", "x" * 201, "é" * 40, "\ud800"])
def test_a_name_that_fits_no_file_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="checkpoint name"):
        layout.dense_path(name)


def test_an_array_inside_an_array_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'model/a/b' beside tensor 'model/a'"):
        layout.check_paths([layout.dense_path("model/a/b"), layout.dense_path("model/a")])


@given(st.integers(0, 10**12), st.integers(1, 10**3))
def test_a_step_name_is_read_back(step: int, revision: int) -> None:
    name = layout.step_name(step, revision)
    assert layout.parse_step_name(name) == (step, revision)
    assert not layout.is_leftover(name)
    assert layout.is_leftover(layout.removed_name(name, 7))
    assert layout.parse_step_name(layout.partial_name(step, 7, "c0de")) is None


@pytest.mark.parametrize(
    "name", ["step-1", "step-000000001-1", "step-000000001-02", "step-0000000001", "step-000000001x"]
)
def test_another_spelling_is_no_step(name: str) -> None:
    assert layout.parse_step_name(name) is None


def test_steps_sort_by_name_as_by_number() -> None:
    names = [layout.step_name(step) for step in (0, 9, 10, 999, 123456789)]
    assert names == sorted(names)
