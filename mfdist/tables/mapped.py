"""A table whose rows stay in files, mapped into memory; for inference. Letters: N tokens, K lookups a token."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import gather_sum
from mfdist.kernels.row_id_check import bad_id_error
from mfdist.optim import RowOptimizer
from mfdist.spec import TableSpec
from mfdist.table import Table, autocast_dtype


@dataclass(frozen=True)
class MappedRows:
    """Rows as files hold them: a block of columns after another, all of one width, padded at the end.

    Args:
        values: [num_blocks · block_rows, width]; row r of the table is rows r, block_rows + r, … one after another.
        num_blocks: blocks of columns.
    """

    values: Tensor
    num_blocks: int = 1

    @property
    def block_rows(self) -> int:
        """Return the rows from a block's first to the next one's."""
        return self.values.shape[0] // self.num_blocks


class MappedTable(Table):
    """A table that is read where its checkpoint lies: only rows that are looked up, and their pages, come into memory.

    The system keeps what was read as long as memory is free, so a table may be larger than memory. It only looks up: a
    backward to its rows and `fuse` are errors, and writing to the rows ends the process.

    Args:
        spec: name, shape and dtype.
        rows: the mapped memory; `mfdist.checkpoint.mapping` makes it.

    Raises:
        ConfigError: the rows are not of the spec's shape.
    """

    values: Tensor
    first_rows: Tensor

    def __init__(self, spec: TableSpec, rows: MappedRows) -> None:
        super().__init__(spec)
        if rows.block_rows < spec.num_rows or rows.num_blocks * rows.values.shape[1] < spec.row_dim:
            raise ConfigError(
                f'mapped rows must hold {spec.num_rows} × {spec.row_dim} for "{spec.name}"; got {rows.num_blocks} '
                f"blocks of columns in {list(rows.values.shape)}"
            )
        self.register_buffer("values", rows.values, persistent=False)
        first = torch.arange(rows.num_blocks) * rows.block_rows
        self.register_buffer("first_rows", first[:, None], persistent=False)
        self._is_plain = rows.num_blocks == 1 and rows.values.shape == (spec.num_rows, spec.row_dim)

    @property
    def resident_rows(self) -> Tensor | None:
        """Return the rows where they lie in one block without padding: then a lookup reads them as any others."""
        is_cast = autocast_dtype(self.values.device) not in (None, self.values.dtype)
        return self.values if self._is_plain and not is_cast else None

    def forward(self, row_ids: Tensor, scores: Tensor, *, code_stride: int = 0) -> Tensor:
        """Return the lookup; see `Table.forward`. It is differentiable in the scores alone."""
        dtype = autocast_dtype(self.values.device) or self.spec.dtype
        if self._is_plain:
            return gather_sum(self.values, row_ids, scores, code_stride, self.spec.name).to(dtype)
        num_tokens, num_lookups = row_ids.shape
        # An id outside the table would read the next block of columns.
        limit = code_stride or self.spec.num_rows
        if error := bad_id_error(row_ids, limit, self.spec.name, is_code=code_stride > 0):
            raise error
        ids = row_ids.to(torch.int64)
        if code_stride:
            ids = ids + torch.arange(num_lookups, device=ids.device) * code_stride
        # A token becomes one for each block of columns, so that one lookup reads all of them.
        blocks = self.first_rows.shape[0]
        ids = (ids[:, None, :] + self.first_rows).view(num_tokens * blocks, num_lookups)
        weights = scores[:, None, :].expand(-1, blocks, -1).reshape(num_tokens * blocks, num_lookups)
        out = gather_sum(self.values, ids, weights, 0, self.spec.name)
        return out.view(num_tokens, blocks * out.shape[1])[:, : self.spec.row_dim].to(dtype)

    def fuse(self, optimizer: RowOptimizer | None) -> NoReturn:
        """Refuse: mapped rows are not trained."""
        raise NotImplementedError(
            f'mapped rows are for inference; got fuse({optimizer}) of table "{self.spec.name}"; '
            "load the checkpoint into a LocalTable"
        )

    def extra_repr(self) -> str:
        """Return the spec and how the rows lie, as shown by `print(model)`."""
        return f"{super().extra_repr()}, mapped in {self.first_rows.shape[0]} blocks of columns"
