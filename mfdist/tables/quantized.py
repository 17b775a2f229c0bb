"""A table of one byte a value, for inference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import QuantizedRows, quantize, quantized_gather_sum
from mfdist.optim import RowOptimizer
from mfdist.spec import TableSpec
from mfdist.table import Table, autocast_dtype


class QuantizedTable(Table):
    """A table of int8 or fp8 rows with a scale each: a half of bf16's memory, a quarter of fp32's, and as much to read.

    It only looks up: a backward through it and `fuse` are errors. Casting it (`.half()`, `.to(torch.bfloat16)`) sets
    the dtype of its results; its rows stay as they are.

    Args:
        spec: name and shape, and the dtype of the results.
        rows: what `quantize` returned; kept, not copied.

    Raises:
        ConfigError: the rows are not of the spec's shape.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, spec: TableSpec, rows: QuantizedRows) -> None:
        super().__init__(spec)
        if rows.values.shape != (spec.num_rows, spec.row_dim):
            raise ConfigError(
                f'quantised rows must be {spec.num_rows} × {spec.row_dim} for "{spec.name}"; got '
                f"{list(rows.values.shape)}; quantise the whole table"
            )
        self._kind = rows.values.dtype
        # As bytes, because fp8 counts as floating point, which casting a module would cast.
        self.register_buffer("values", rows.as_bytes)
        self.register_buffer("scales", rows.scales)

    @classmethod
    def of(cls, table: Table, dtype: torch.dtype = torch.int8) -> Self:
        """Return a copy of a table's rows in int8 or float8_e4m3fn, on its device.

        A layer keeps working: `layer.table = QuantizedTable.of(layer.table)`.

        Raises:
            ConfigError: this process holds only a part of the table, its rows are no parameter, as those of a quantised
                or mapped table, or the dtype is another.
        """
        if "weight" not in table._parameters:
            raise ConfigError(
                f'a table is quantised from its own rows; got "{table.spec.name}" as a {type(table).__name__}; '
                "give the table that it was made of"
            )
        if table.region != table.spec.region:
            raise ConfigError(
                f'a table is quantised whole; got the part {table.region} of "{table.spec.name}"; '
                "load its checkpoint into a LocalTable first"
            )
        weight = table.get_parameter("weight")
        return cls(replace(table.spec, dtype=weight.dtype), quantize(weight, dtype))

    @property
    def rows(self) -> QuantizedRows:
        """Return the rows, in the table's memory."""
        return QuantizedRows(self.values.view(self._kind), self.scales)

    def forward(self, row_ids: Tensor, scores: Tensor, *, code_stride: int = 0) -> Tensor:
        """Return the lookup; see `Table.forward`. It has no gradient: a backward raises NotImplementedError."""
        dtype = autocast_dtype(self.values.device) or self.spec.dtype
        return quantized_gather_sum(self.rows, row_ids, scores, code_stride, self.spec.name, dtype)

    def fuse(self, optimizer: RowOptimizer | None) -> NoReturn:
        """Refuse: quantised rows are not trained."""
        raise NotImplementedError(
            f'quantised rows are for inference; got fuse({optimizer}) of table "{self.spec.name}"; '
            "train the table that they were made of"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let a cast change what results are in, and a move move the rows; scales stay fp32."""
        scales = self.scales
        applied = super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.spec = replace(self.spec, dtype=fn(torch.empty(0, dtype=self.spec.dtype, device=scales.device)).dtype)
        return applied

    def extra_repr(self) -> str:
        """Return the spec and what the rows are, as shown by `print(model)`."""
        return f"{super().extra_repr()}, rows={str(self._kind).removeprefix('torch.')}"
