"""How one table is split: its cuts, and which rank holds which part.

A table is cut into a grid of row parts × column parts, and every part has an owner, a rank in the mesh's flattened
order. The kind says which cuts there are, and with them what travels in a lookup:

    row_wise     rows cut anywhere: ids go to the owners, rows come back; pooled: scores too, and partial sums come back
    table_wise   rows cut between slots: every owner sums its slots, partial sums come back
    column_wise  columns cut: codes and scores go to all owners, sums of columns come back
    grid         columns cut within a host; rows (code_stride 0) or slots (code_stride > 0) across hosts
    replicated   nothing cut, every rank holds everything: only gradients travel
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from mfdist.errors import ConfigError
from mfdist.sharding.cuts import Cuts, check_cuts, first_ranks
from mfdist.spec import Region, TableSpec

Kind = Literal["row_wise", "column_wise", "table_wise", "grid", "replicated"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: What rows, sums and gradients may travel as.
WIRE_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

#: kind → whether it may cut (rows, columns).
_CUTTABLE: dict[Kind, tuple[bool, bool]] = {
    "row_wise": (True, False),
    "table_wise": (True, False),
    "column_wise": (False, True),
    "grid": (True, True),
    "replicated": (False, False),
}


@dataclass(frozen=True)
class Shard:
    """A region of a table and the rank that holds it."""

    owner: int
    region: Region


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """How one table is split; made by `row_wise` and its neighbours below, or read from JSON.

    Args:
        name, num_rows, row_dim, dtype: those of the table's spec.
        kind: what is cut.
        row_cuts, column_cuts: ascending from 0 to num_rows and row_dim.
        owners: the rank of each part, row part by row part; a rank holds one part at most. Empty where replicated.
        code_stride: rows a slot owns, where slots are what is cut (table_wise, and grids of slots); 0 elsewhere.
        deduplicate: send each row id once (row_wise, and grids of rows); the others ignore it.
        pooled: owners sum what a token uses of their rows, instead of sending the rows (row_wise, and grids of rows);
            then nothing is deduplicated, and the sums are an unsharded table's up to rounding.
        forward_dtype, backward_dtype: what rows and sums, and their gradients, travel as.

    Raises:
        ConfigError: holes, overlaps, cuts that the kind does not have, an owner twice, or a dtype that cannot travel.
    """

    name: str
    num_rows: int
    row_dim: int
    dtype: torch.dtype
    kind: Kind
    row_cuts: Cuts
    column_cuts: Cuts
    owners: tuple[int, ...]
    code_stride: int = 0
    deduplicate: bool = True
    pooled: bool = False
    forward_dtype: torch.dtype
    backward_dtype: torch.dtype

    def __post_init__(self) -> None:
        where = f'table "{self.spec.name}"'
        if self.kind not in KINDS:
            raise ConfigError(f'the kind of sharding must be one of {", ".join(KINDS)}; got "{self.kind}" for {where}')
        step = self._check_stride(where)
        check_cuts(self.row_cuts, self.num_rows, "rows", where, step)
        check_cuts(self.column_cuts, self.row_dim, "columns", where)
        self._check_kind(where)
        self._check_owners(where)
        for dtype in (self.forward_dtype, self.backward_dtype):
            if dtype not in WIRE_DTYPES:
                names = ", ".join(dtype_name(allowed) for allowed in WIRE_DTYPES)
                raise ConfigError(f"traffic must be one of {names}; got {dtype_name(dtype)} for {where}")

    @property
    def spec(self) -> TableSpec:
        """Return the table this plan is for."""
        return TableSpec(name=self.name, num_rows=self.num_rows, row_dim=self.row_dim, dtype=self.dtype)

    @property
    def num_row_parts(self) -> int:
        """Return into how many parts the rows are cut."""
        return len(self.row_cuts) - 1

    @property
    def num_column_parts(self) -> int:
        """Return into how many parts the columns are cut."""
        return len(self.column_cuts) - 1

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Return every part with its owner, row part by row part; empty where every rank holds everything."""
        return tuple(Shard(owner, self._part(index)) for index, owner in enumerate(self.owners))

    def region_of(self, rank: int) -> Region:
        """Return what `rank` holds: the whole table where replicated, an empty region where it holds nothing."""
        if self.kind == "replicated":
            return self.spec.region
        if rank not in self.owners:
            return Region(rows=(0, 0), columns=(0, 0))
        return self._part(self.owners.index(rank))

    def _part(self, index: int) -> Region:
        row, column = divmod(index, self.num_column_parts)
        return Region(
            rows=(self.row_cuts[row], self.row_cuts[row + 1]),
            columns=(self.column_cuts[column], self.column_cuts[column + 1]),
        )

    def _check_stride(self, where: str) -> int:
        """Return what row cuts must be multiples of."""
        if self.code_stride < 0 or (self.code_stride and self.num_rows % self.code_stride):
            raise ConfigError(
                f"code_stride must divide num_rows; got code_stride={self.code_stride}, num_rows={self.num_rows} "
                f"for {where}"
            )
        if self.code_stride and self.kind not in ("table_wise", "grid"):
            raise ConfigError(
                f"code_stride belongs to what is cut between slots; got {self.code_stride} for {where}, which is "
                f"{self.kind}; leave it out"
            )
        if self.kind == "table_wise" and not self.code_stride:
            return self.num_rows  # without slots there is nothing to cut between
        return self.code_stride or 1

    def _check_kind(self, where: str) -> None:
        rows, columns = _CUTTABLE[self.kind]
        for what, num_parts, is_allowed in (
            ("rows", self.num_row_parts, rows),
            ("columns", self.num_column_parts, columns),
        ):
            if num_parts > 1 and not is_allowed:
                raise ConfigError(f"a {self.kind} table keeps its {what} whole; got {num_parts} parts of {where}")

    def _check_owners(self, where: str) -> None:
        expected = 0 if self.kind == "replicated" else self.num_row_parts * self.num_column_parts
        if len(self.owners) != expected:
            raise ConfigError(
                f"every part must have one owner; got {len(self.owners)} owners for {expected} parts of {where}"
            )
        if self.owners is first_ranks(len(self.owners)):
            return  # what nearly all plans of thousands of ranks have
        if self.owners and min(self.owners) < 0:
            raise ConfigError(f"an owner is a rank, 0 or more; got {min(self.owners)} for {where}")
        if len(set(self.owners)) != len(self.owners):
            twice = next(owner for index, owner in enumerate(self.owners) if owner in self.owners[:index])
            raise ConfigError(f"a rank holds one part of a table at most; rank {twice} owns two of {where}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name without its module: `float32`."""
    return str(dtype).removeprefix("torch.")
