"""What a checkpoint holds: tables with their row optimiser's state, every other tensor, and plain JSON.

A rank that holds parts of tables gives them as `shards`; together the ranks' shards must cover each table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from mfdist.checkpoint.dense_shard import DenseShard
from mfdist.errors import ConfigError
from mfdist.spec import Region

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"


@dataclass(frozen=True, kw_only=True)
class TableState:
    """One table and its row optimiser's state.

    Raises:
        ConfigError: the weight is not [num_rows, row_dim], or a state has another number of rows.
    """

    weight: Tensor  # [num_rows, row_dim]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)  # each [num_rows, …]

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ConfigError(
                f"a table must be [num_rows, row_dim]; got shape {list(self.weight.shape)}; "
                "save tensors of other shapes under `dense`."
            )
        for name, tensor in self.optimizer.items():
            _check_name(name)
            if tensor.ndim == 0 or tensor.shape[0] != self.weight.shape[0]:
                raise ConfigError(
                    f"optimiser state {name!r} must have num_rows={self.weight.shape[0]} rows; "
                    f"got shape {list(tensor.shape)}; save what is not per row under `dense`."
                )


@dataclass(frozen=True, kw_only=True)
class TableShard:
    """A rectangle of a table and of its row optimiser's state.

    A state of one value a row belongs to all shards of that row alike: it must be the same in each, and one is saved.

    Raises:
        ConfigError: the region does not lie in the table, or a tensor does not have its shape.
    """

    num_rows: int  # of the whole table
    row_dim: int
    region: Region
    weight: Tensor  # [rows, columns] of the region
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)  # each [rows, columns] or [rows]

    def __post_init__(self) -> None:
        if self.region.rows[1] > self.num_rows or self.region.columns[1] > self.row_dim:
            raise ConfigError(
                f"a shard must lie in its table; got rows {self.region.rows} and columns {self.region.columns} "
                f"of [{self.num_rows}, {self.row_dim}]."
            )
        for name, tensor in {"weight": self.weight, **self.optimizer}.items():
            allowed = [self.region.shape] if name == "weight" else [self.region.shape, self.region.shape[:1]]
            if tuple(tensor.shape) not in allowed:
                raise ConfigError(
                    f"{name!r} of a shard must be {' or '.join(str(list(shape)) for shape in allowed)}; "
                    f"got {list(tensor.shape)}."
                )
        for name in self.optimizer:
            _check_name(name)


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """Everything a run needs to go on from a step, or one rank's share of it.

    What several ranks hold under one name (tables and dense tensors that are replicated) must be the same in each; one
    of them writes it. Attributes are those of rank 0.

    Raises:
        ConfigError: the step is negative, a table is both whole and in shards, or the attributes are not what JSON
            gives back unchanged.
    """

    step: int
    tables: Mapping[str, TableState]  # "blocks.0.qkv" → …
    #: Any dtype and shape; "/" in a name makes groups: "model/head.weight". Of a DTensor each rank saves its own part.
    dense: Mapping[str, Tensor]
    attributes: Mapping[str, JSON]
    shards: Mapping[str, Sequence[TableShard]] = field(default_factory=dict)
    dense_shards: Mapping[str, DenseShard] = field(default_factory=dict)  # what DTensors in `dense` become in a copy

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ConfigError(f"a checkpoint's step must be 0 or more; got {self.step}; count finished steps from 0.")
        if both := self.tables.keys() & self.shards.keys():
            raise ConfigError(f"a table must be saved whole or in shards; got both of {min(both)!r}; drop one.")
        # A checkpoint is exact: NaN, tuples and integer keys would come back as something else or as invalid JSON.
        try:
            text = json.dumps(dict(self.attributes), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"checkpoint attributes must be plain JSON; got one that is not ({error}); convert it first."
            ) from error
        if json.loads(text) != dict(self.attributes):
            raise ConfigError(
                "checkpoint attributes must survive JSON unchanged; got tuples or keys that are not strings; "
                "use lists and string keys."
            )


def _check_name(name: str) -> None:
    if name == "weight":
        raise ConfigError("an optimiser state must not be named 'weight', the table's own array; rename it.")
