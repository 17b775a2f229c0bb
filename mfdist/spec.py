"""What a table is, apart from where its rows lie."""

from dataclasses import dataclass
from typing import Self

import torch

from mfdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """Name, shape and dtype of one logical table.

    Raises:
        ConfigError: a size is not positive, or the dtype is not a floating one.
    """

    name: str
    num_rows: int
    row_dim: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.row_dim < 1:
            raise ConfigError(
                f"a table needs at least one row of one column; got num_rows={self.num_rows}, "
                f'row_dim={self.row_dim} for "{self.name}"'
            )
        if not self.dtype.is_floating_point:
            raise ConfigError(f'rows must be floating point; got {self.dtype} for table "{self.name}"')

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all rows, without optimiser state."""
        return self.num_rows * self.row_dim * self.dtype.itemsize

    @property
    def region(self) -> "Region":
        """Return the region that is the whole table."""
        return Region(rows=(0, self.num_rows), columns=(0, self.row_dim))


@dataclass(frozen=True, kw_only=True)
class Region:
    """A rectangle of a table: rows [begin, end) × columns [begin, end), in the table's own, global numbers.

    A shard is a region with an owner. Checkpoints, plans and row updates speak of regions, so none of them depends on
    how many ranks there are. An empty region is one without rows or columns.

    Raises:
        ConfigError: an end lies before its begin, or a begin before 0.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]

    def __post_init__(self) -> None:
        for kind, (begin, end) in (("rows", self.rows), ("columns", self.columns)):
            if not 0 <= begin <= end:
                raise ConfigError(f"a region's {kind} must be [begin, end) with 0 <= begin <= end; got {begin}, {end}")

    @property
    def shape(self) -> tuple[int, int]:
        """Return (number of rows, number of columns)."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing in it."""
        return 0 in self.shape

    def intersection(self, other: Self) -> "Region":
        """Return what both cover, empty where they do not meet."""
        rows, columns = _overlap(self.rows, other.rows), _overlap(self.columns, other.columns)
        return Region(rows=rows, columns=columns)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    begin = max(one[0], other[0])
    return begin, max(begin, min(one[1], other[1]))
