"""What one rank holds of one array, as rectangles of rows × columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfdist.checkpoint.dense_shard import DenseShard, whole_and_shards
from mfdist.checkpoint.dtypes import STORED_DTYPES, dtype_name
from mfdist.checkpoint.grid import FileGrid, cut, num_columns, num_rows
from mfdist.checkpoint.layout import check_paths, dense_path, describe, table_path
from mfdist.checkpoint.state import CheckpointState, TableShard
from mfdist.errors import ConfigError
from mfdist.spec import Region


@dataclass(frozen=True)
class Holding:
    """The parts of an array that lie in this process; none where it only knows of the array."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[Region, Tensor], ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Holding":
        """Return the holding of a whole array."""
        shape = tuple(tensor.shape)
        region = Region(rows=(0, num_rows(shape)), columns=(0, num_columns(shape)))
        return cls(shape, tensor.dtype, ((region, tensor),))

    @classmethod
    def of_shard(cls, shard: DenseShard) -> "Holding":
        """Return the holding of a part of a dense tensor."""
        parts = ((shard.region, shard.values),) if not shard.region.is_empty else ()
        return cls(shard.shape, shard.values.dtype, parts)

    @property
    def item_bytes(self) -> int:
        """Return the size of one value."""
        return self.dtype.itemsize

    @property
    def grid(self) -> FileGrid:
        """Return how the array is cut."""
        return cut(self.shape, self.item_bytes)

    @property
    def regions(self) -> list[Region]:
        """Return the region of each part."""
        return [region for region, _ in self.parts]

    def to_json(self) -> dict[str, Any]:
        """Return what other ranks need to know: the shape, the dtype, and where the parts lie, not their values."""
        regions = [[*region.rows, *region.columns] for region in self.regions]
        return {"shape": list(self.shape), "dtype": dtype_name(self.dtype), "regions": regions}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Holding":
        """Return another rank's holding, without its parts."""
        return cls(tuple(told["shape"]), getattr(torch, told["dtype"]), ())

    def block(self, part: int, region: Region) -> Tensor:
        """Return a region of a part as [rows, columns]; a view where the part's strides allow one."""
        held, tensor = self.parts[part]
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if not self.shape:
            return tensor.reshape(1, 1)
        (top, _), (left, _) = held.rows, held.columns
        rows = tensor[region.rows[0] - top : region.rows[1] - top]
        if rows.ndim == 2:
            return rows[:, region.columns[0] - left : region.columns[1] - left]
        return rows.reshape(len(rows), held.shape[1])  # vectors and higher dimensions are never cut along columns


def holdings_of(state: CheckpointState) -> dict[str, Holding]:
    """Return what a rank holds by the arrays' paths in the store.

    Raises:
        ConfigError: a name or a tensor cannot be stored. Nothing was written.
    """
    holdings: dict[str, Holding] = {}
    for name, table in state.tables.items():
        for array, tensor in {"weight": table.weight, **table.optimizer}.items():
            holdings[table_path(name, array)] = Holding.whole(tensor)
    for name, shards in state.shards.items():
        holdings |= {table_path(name, array): holding for array, holding in _of_shards(name, shards).items()}
    whole, parts = whole_and_shards(state.dense)
    holdings |= {dense_path(name): Holding.whole(tensor) for name, tensor in whole.items()}
    holdings |= {dense_path(name): Holding.of_shard(part) for name, part in {**parts, **state.dense_shards}.items()}
    check_paths(holdings)
    for path, holding in holdings.items():
        for _, tensor in holding.parts:
            if tensor.layout != torch.strided or tensor.is_meta or dtype_name(tensor.dtype) not in STORED_DTYPES:
                raise ConfigError(
                    f"a checkpoint stores strided tensors with data, of a dtype numpy has or a float of 8 or 16 bits; "
                    f"got {describe(path)} ({tensor.layout}, {tensor.dtype}, {tensor.device}); convert it first."
                )
    return holdings


def _of_shards(table: str, shards: Sequence[TableShard]) -> dict[str, Holding]:
    found: dict[str, Holding] = {}
    for shard in shards:
        arrays: Mapping[str, Any] = {"weight": shard.weight, **shard.optimizer}
        if found and (found["weight"].shape != (shard.num_rows, shard.row_dim) or arrays.keys() != found.keys()):
            raise ConfigError(f"shards must be of one table and have the same states; those of {table!r} differ.")
        for name, tensor in arrays.items():
            is_per_row = tensor.ndim == 1
            shape = (shard.num_rows,) if is_per_row else (shard.num_rows, shard.row_dim)
            region = Region(rows=shard.region.rows, columns=(0, 1)) if is_per_row else shard.region
            earlier = found.get(name, Holding(shape, tensor.dtype, ()))
            if (earlier.shape, earlier.dtype) != (shape, tensor.dtype):
                raise ConfigError(f"{name!r} must have one shape and dtype in all shards of {table!r}; they differ.")
            found[name] = Holding(shape, tensor.dtype, (*earlier.parts, (region, tensor)))
    return found
