"""Plans of one table, one function for each kind of sharding."""

from collections.abc import Sequence

import torch

from mfdist.errors import ConfigError
from mfdist.sharding.cuts import Cuts, even_cuts, first_ranks
from mfdist.sharding.table_plan import Kind, TablePlan
from mfdist.spec import TableSpec


def row_wise(
    spec: TableSpec,
    owners: int | Sequence[int],
    *,
    cuts: Sequence[int] | None = None,
    deduplicate: bool = True,
    pooled: bool = False,
    forward_dtype: torch.dtype | None = None,
    backward_dtype: torch.dtype | None = None,
) -> TablePlan:
    """Return the plan that cuts the rows anywhere, by default evenly.

    Args:
        spec: the table.
        owners: the ranks in the order of their rows, or how many ranks there are.
        cuts: row cuts, where they are not even.
        deduplicate: send each row id once.
        pooled: let owners sum what a token uses of their rows.
        forward_dtype, backward_dtype: of the traffic; by default the table's.
    """
    ranks = _ranks(owners)
    rows = even_cuts(spec.num_rows, len(ranks)) if cuts is None else tuple(cuts)
    return _plan(
        spec, "row_wise", ranks, forward_dtype, backward_dtype, rows=rows, deduplicate=deduplicate, pooled=pooled
    )


def column_wise(
    spec: TableSpec,
    owners: int | Sequence[int],
    *,
    cuts: Sequence[int] | None = None,
    forward_dtype: torch.dtype | None = None,
    backward_dtype: torch.dtype | None = None,
) -> TablePlan:
    """Return the plan that cuts the columns, by default evenly; arguments as in `row_wise`."""
    ranks = _ranks(owners)
    columns = even_cuts(spec.row_dim, len(ranks)) if cuts is None else tuple(cuts)
    return _plan(spec, "column_wise", ranks, forward_dtype, backward_dtype, columns=columns)


def table_wise(
    spec: TableSpec,
    owners: int | Sequence[int],
    code_stride: int,
    *,
    cuts: Sequence[int] | None = None,
    forward_dtype: torch.dtype | None = None,
    backward_dtype: torch.dtype | None = None,
) -> TablePlan:
    """Return the plan that cuts the rows between slots of `code_stride` rows; other arguments as in `row_wise`.

    With `code_stride` 0 there are no slots, and the table goes to one owner whole.
    """
    ranks = _ranks(owners)
    step = code_stride or spec.num_rows
    rows = even_cuts(spec.num_rows, len(ranks), step) if cuts is None else tuple(cuts)
    return _plan(spec, "table_wise", ranks, forward_dtype, backward_dtype, rows=rows, code_stride=code_stride)


def grid(
    spec: TableSpec,
    num_hosts: int,
    ranks_per_host: int,
    *,
    code_stride: int = 0,
    deduplicate: bool = True,
    pooled: bool = False,
    forward_dtype: torch.dtype | None = None,
    backward_dtype: torch.dtype | None = None,
) -> TablePlan:
    """Return the plan that cuts columns over each host's ranks, and rows (or slots) over the hosts, all evenly.

    Args:
        spec: the table.
        num_hosts, ranks_per_host: rank = host · ranks_per_host + place on the host.
        code_stride: rows of a slot, to cut between slots; 0 cuts rows anywhere.
        deduplicate: send each row id once, where rows are cut.
        pooled: let owners sum what a token uses of their rows, where rows are cut.
        forward_dtype, backward_dtype: of the traffic; by default the table's.
    """
    return _plan(
        spec,
        "grid",
        _ranks(num_hosts * ranks_per_host),
        forward_dtype,
        backward_dtype,
        rows=even_cuts(spec.num_rows, num_hosts, code_stride or 1),
        columns=even_cuts(spec.row_dim, ranks_per_host),
        code_stride=code_stride,
        deduplicate=deduplicate,
        pooled=pooled,
    )


def replicated(spec: TableSpec, *, backward_dtype: torch.dtype | None = None) -> TablePlan:
    """Return the plan that gives every rank the whole table."""
    return _plan(spec, "replicated", (), None, backward_dtype)


def _plan(
    spec: TableSpec,
    kind: Kind,
    owners: tuple[int, ...],
    forward_dtype: torch.dtype | None,
    backward_dtype: torch.dtype | None,
    *,
    rows: Cuts | None = None,
    columns: Cuts | None = None,
    code_stride: int = 0,
    deduplicate: bool = True,
    pooled: bool = False,
) -> TablePlan:
    return TablePlan(
        name=spec.name,
        num_rows=spec.num_rows,
        row_dim=spec.row_dim,
        dtype=spec.dtype,
        kind=kind,
        row_cuts=rows or (0, spec.num_rows),
        column_cuts=columns or (0, spec.row_dim),
        owners=owners,
        code_stride=code_stride,
        deduplicate=deduplicate,
        pooled=pooled,
        forward_dtype=forward_dtype or spec.dtype,
        backward_dtype=backward_dtype or spec.dtype,
    )


def _ranks(owners: int | Sequence[int]) -> tuple[int, ...]:
    ranks = first_ranks(owners) if isinstance(owners, int) else tuple(owners)
    if not ranks:
        raise ConfigError("a split table needs at least one owner; got none")
    return ranks
