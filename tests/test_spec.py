"""Regions: rectangles of tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.errors import ConfigError
from mfdist.spec import Region, TableSpec

_span = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: (min(pair), max(pair)))
_regions = st.builds(Region, rows=_span, columns=_span)


def _cells(region: Region) -> np.ndarray:
    cells = np.zeros((12, 12), dtype=bool)
    cells[slice(*region.rows), slice(*region.columns)] = True
    return cells


@given(_regions, _regions)
def test_intersection_covers_what_both_cover(one: Region, other: Region) -> None:
    """Against cells ticked on a grid."""
    both = one.intersection(other)
    assert (_cells(both) == (_cells(one) & _cells(other))).all()
    assert both.is_empty == (not _cells(both).any())
    assert both.shape[0] * both.shape[1] == _cells(both).sum()


def test_whole_table() -> None:
    """A spec's region is all of it."""
    spec = TableSpec(name="t", num_rows=5, row_dim=3)
    assert spec.region == Region(rows=(0, 5), columns=(0, 3))


@pytest.mark.parametrize("rows", [(-1, 2), (3, 2)])
def test_backward_region_is_refused(rows: tuple[int, int]) -> None:
    """Begin before end, and not below 0."""
    with pytest.raises(ConfigError, match="rows must be"):
        Region(rows=rows, columns=(0, 1))
