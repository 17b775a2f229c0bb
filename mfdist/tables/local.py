"""A table whose rows are one parameter of this process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mfdist.kernels import gather_sum
from mfdist.kernels.huge_pages import in_huge_pages
from mfdist.optim import RowOptimizer
from mfdist.spec import TableSpec
from mfdist.table import Table, autocast_dtype
from mfdist.tables.initial_rows import draw_rows, new_seed


class LocalTable(Table):
    """A table held as an ordinary dense `nn.Parameter`, trained by any torch optimiser or in backward.

    Args:
        spec: name, shape and dtype.
        std: standard deviation of the rows' normal initialisation.
        device: where the rows are made; `meta` makes none.
        fuse: trains the rows in backward; see `Table.fuse`.
    """

    def __init__(
        self,
        spec: TableSpec,
        *,
        std: float = 0.02,
        device: torch.device | str | None = None,
        fuse: RowOptimizer | None = None,
    ) -> None:
        super().__init__(spec)
        self.std = std
        rows = torch.empty(spec.num_rows, spec.row_dim, dtype=spec.dtype, device=device)
        self.weight = nn.Parameter(in_huge_pages(rows))
        self.reset_parameters()
        if fuse is not None:
            self.fuse(fuse)

    def reset_parameters(self) -> None:
        """Draw all rows anew from N(0, std²), by a seed that torch's default generator gives and `seed` keeps."""
        self.seed = new_seed()
        if not self.weight.is_meta:
            draw_rows(self.weight, self.spec, self.spec.region, self.std, self.seed)
        if self.row_state is not None:
            self.row_state.reset()

    @property
    def resident_rows(self) -> Tensor | None:
        """Return the rows, unless autocast has lookups read them in another dtype."""
        weight: Tensor = self.weight
        is_cast = autocast_dtype(weight.device, weight.dtype) not in (None, weight.dtype)
        return None if is_cast else weight

    def forward(self, row_ids: Tensor, scores: Tensor, *, code_stride: int = 0) -> Tensor:
        """Return the lookup; see `Table.forward`."""
        weight: Tensor = self.weight
        dtype = autocast_dtype(weight.device, weight.dtype) or weight.dtype
        if self.row_state is not None:
            # Rows are read as they are: a copy in another dtype could not be updated, and would be the table's size.
            return self.row_state.lookup(weight, row_ids, scores, code_stride, self.spec.name).to(dtype)
        return gather_sum(weight.to(dtype), row_ids, scores, code_stride, self.spec.name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let the spec follow a cast of the rows."""
        applied = super()._apply(fn, recurse)
        self.spec = replace(self.spec, dtype=self.weight.dtype)
        return applied
