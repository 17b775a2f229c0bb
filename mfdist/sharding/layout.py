"""Layout: cuts that fill the ranks of a world alike, once the kind of each table is known."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from mfdist.sharding.cuts import levelling_cuts
from mfdist.sharding.holdings import Floats, Holdings
from mfdist.sharding.kinds import column_wise, grid, replicated, row_wise, table_wise
from mfdist.sharding.table_plan import Kind, TablePlan
from mfdist.sharding.topology import Topology
from mfdist.sharding.workload import Workload
from mfdist.spec import TableSpec

#: Columns that kernels take at once.
_TILES = (64, 32)
#: Pieces a part has at least where they are tiles, so that one more makes little difference.
_EVEN_ENOUGH = 8
#: Otherwise columns are cut at multiples of this where there are enough, so that rows of a shard start aligned.
_ALIGNED_BYTES = 16


def candidates(spec: TableSpec, topology: Topology, workload: Workload) -> list[TablePlan]:
    """Return every plan there is for a table, cut evenly; of two that take as long, the earlier is better.

    Deduplication is a choice where it is allowed: it costs sorting, and pays where ids repeat. Pooling is one where
    there are no slots: with slots, those are what is better cut.
    """
    world_size, stride = topology.world_size, workload.load(spec.name).code_stride
    forward, backward = workload.forward_dtype, workload.backward_dtype
    copies = [replicated(spec, backward_dtype=backward)]
    if world_size == 1:
        return copies
    ways: list[dict[str, Any]] = [
        {"deduplicate": once} for once in ((True, False) if workload.deduplicate else (False,))
    ]
    if not stride:
        ways.append({"pooled": True})
    split = [
        column_wise(spec, world_size, forward_dtype=forward, backward_dtype=backward),
        *(row_wise(spec, world_size, forward_dtype=forward, backward_dtype=backward, **way) for way in ways),
    ]
    if stride:
        split.append(table_wise(spec, world_size, stride, forward_dtype=forward, backward_dtype=backward))
    if topology.num_hosts > 1 and topology.ranks_per_host > 1:
        shape = (topology.num_hosts, topology.ranks_per_host)
        split += [grid(spec, *shape, forward_dtype=forward, backward_dtype=backward, **way) for way in ways]
        if stride:
            split.append(grid(spec, *shape, code_stride=stride, forward_dtype=forward, backward_dtype=backward))
    return [*copies, *split]


def lay_out(plans: Iterable[TablePlan], topology: Topology) -> tuple[TablePlan, ...]:
    """Cut each table where it is cut already, the pieces left over going to the ranks that hold least.

    Tables with the largest pieces are cut first. In bytes of rows, no two ranks then differ by more than the largest
    piece (a slot, a row or a few columns of one table; for grids, one of each direction).

    Returns:
        the plans in their given order.
    """
    given = list(plans)
    loads = np.zeros(topology.world_size)
    done: dict[int, TablePlan] = {}
    for index in sorted(range(len(given)), key=lambda index: -_piece_bytes(given[index])):
        plan = done[index] = _levelled(given[index], loads, topology)
        held = Holdings.of(plan, topology.world_size)
        loads += held.on_ranks(held.rows * held.columns) * plan.dtype.itemsize
    return tuple(done[index] for index in range(len(given)))


def _levelled(plan: TablePlan, loads: Floats, topology: Topology) -> TablePlan:
    rows, columns = _steps(plan)
    match plan.kind:
        case "replicated":
            return plan
        case "row_wise" | "table_wise":
            cuts = levelling_cuts(plan.num_rows, loads, rows)
            return plan if cuts == plan.row_cuts else replace(plan, row_cuts=cuts)
        case "column_wise":
            cuts = levelling_cuts(plan.row_dim, loads, columns)
            return plan if cuts == plan.column_cuts else replace(plan, column_cuts=cuts)
        case "grid":
            places = loads.reshape(topology.num_hosts, topology.ranks_per_host)
            return replace(
                plan,
                row_cuts=levelling_cuts(plan.num_rows, places.sum(1), rows),
                column_cuts=levelling_cuts(plan.row_dim, places.sum(0), columns),
            )


def _steps(plan: TablePlan) -> tuple[int, int]:
    """Return the rows and the columns that stay together; tiles of columns where parts then hardly differ."""
    num_parts, row_dim = plan.num_column_parts, plan.row_dim
    if row_dim % num_parts == 0:
        return plan.code_stride or 1, 1
    wide = [step for step in _TILES if row_dim % step == 0 and row_dim // step >= _EVEN_ENOUGH * num_parts]
    aligned = max(1, _ALIGNED_BYTES // plan.dtype.itemsize)
    if not wide and row_dim % aligned == 0 and row_dim // aligned >= num_parts:
        wide = [aligned]
    return plan.code_stride or 1, max(wide, default=1)


def _piece_bytes(plan: TablePlan) -> int:
    rows, columns = _steps(plan)
    size: dict[Kind, int] = {
        "row_wise": rows * plan.row_dim,
        "table_wise": rows * plan.row_dim,
        "column_wise": plan.num_rows * columns,
        "grid": rows * plan.row_dim + plan.num_rows * columns,
        "replicated": 0,
    }
    return size[plan.kind] * plan.dtype.itemsize
