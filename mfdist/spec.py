"""What a table is, apart from where its rows lie."""

from dataclasses import dataclass

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
