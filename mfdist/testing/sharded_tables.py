"""Sharded tables for tests: made from whole rows, put together again, and held against the suite of every table.

All functions are called on all ranks.
"""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.table_plan import TablePlan
from mfdist.tables.sharded import ShardedTable
from mfdist.testing.fused_conformance import FusedConformance
from mfdist.testing.table_conformance import TableConformance


def sharded(rows: Tensor, plan: TablePlan, exchanges: MeshExchanges) -> ShardedTable:
    """Return a sharded table that holds `rows`, the same on all ranks."""
    table = ShardedTable(plan, exchanges, device=rows.device)
    with torch.no_grad():
        table.weight.copy_(part_of(rows, table))
    return table


def part_of(whole: Tensor, table: ShardedTable) -> Tensor:
    """Return the part of `whole` [R, D] that this rank holds."""
    (top, bottom), (left, right) = table.region.rows, table.region.columns
    return whole[top:bottom, left:right]


def put_together(table: ShardedTable, part: Tensor | None) -> Tensor:
    """Return [R, D] from every rank's part, or zeros for None; a copy that a rank holds must equal the others'."""
    part = torch.zeros_like(table.weight) if part is None else part
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (table.region, part.detach().cpu()))
    shape = (table.spec.num_rows, table.spec.row_dim)
    whole, is_filled = part.new_zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for region, theirs in everyones:
        (top, bottom), (left, right) = region.rows, region.columns
        held, is_held = whole[top:bottom, left:right], is_filled[top:bottom, left:right]
        assert not is_held.any() or torch.equal(held.cpu(), theirs), "copies differ"
        held.copy_(theirs)
        is_held.fill_(True)
    assert is_filled.all(), "no rank holds a part"
    return whole


class ShardedConformance(TableConformance, FusedConformance):
    """The suite for one kind of sharding; each rank makes the same lookups, whose mean gradient is a rank's own.

    Args:
        exchanges: over the mesh.
        make_plan: from a spec to its plan.
    """

    def __init__(self, exchanges: MeshExchanges, make_plan: Any) -> None:
        self._exchanges = exchanges
        self._make_plan = make_plan
        self.num_ranks = exchanges.world_size

    def make_table(self, rows: Tensor) -> ShardedTable:
        """Return a sharded table of the rows."""
        from mfdist.spec import TableSpec

        spec = TableSpec(name="sharded", num_rows=rows.shape[0], row_dim=rows.shape[1], dtype=rows.dtype)
        device = self._exchanges.device
        return sharded(rows.to(device), self._make_plan(spec), self._exchanges)

    def rows_gradient(self, table: Any) -> Tensor:
        """Return the whole gradient, put together."""
        return put_together(table, table.weight.grad)

    def rows_of(self, table: Any) -> Tensor:
        """Return all rows, put together."""
        return put_together(table, table.weight)

    def states_of(self, table: Any) -> list[Tensor]:
        """Return the states of all rows, put together; those of one value a row must be the same on all who have it."""
        states = []
        for tensor in table.row_state.tensors.values():
            wide = tensor if tensor.ndim == 2 else tensor[:, None].expand(table.region.shape)
            whole = put_together(table, wide)
            assert tensor.ndim == 2 or bool((whole == whole[:, :1]).all()), "shards of one row differ in its state"
            states.append(whole if tensor.ndim == 2 else whole[:, 0].clone())
        return states


def run_conformance(suite: Any) -> list[str]:
    """Run every case of a suite outside pytest, as ranks must; return their names.

    Raises:
        AssertionError: a case failed; the message has its name.
    """
    done = []
    for name, method, arguments in cases_of(suite):
        torch.manual_seed(0)
        try:
            method(**arguments)
        except Exception as error:
            raise AssertionError(f"{name} failed: {error!r}") from error
        done.append(name)
    return done


def cases_of(suite: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield the name, method and arguments of each case, `parametrize` marks multiplied out."""
    for name, method in inspect.getmembers(suite, inspect.ismethod):
        if not name.startswith("test_"):
            continue
        axes = []
        for mark in getattr(method, "pytestmark", []):
            names, values = mark.args[:2]
            listed = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
            axes.append([dict(zip(listed, value if len(listed) > 1 else (value,), strict=True)) for value in values])
        for chosen in itertools.product(*axes):
            arguments = {key: value for part in chosen for key, value in part.items()}
            yield f"{name}{list(arguments.values()) if arguments else ''}", method, arguments
