"""From a table's plan to its route."""

from collections.abc import Sequence
from itertools import pairwise

from mfdist.errors import ConfigError
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.routes.column_wise import ColumnWise
from mfdist.sharding.routes.local import LocalRoute
from mfdist.sharding.routes.pooled_rows import PooledRows
from mfdist.sharding.routes.replicated import Replicated
from mfdist.sharding.routes.route import Route
from mfdist.sharding.routes.row_wise import RowWise
from mfdist.sharding.routes.table_wise import TableWise
from mfdist.sharding.table_plan import TablePlan


def check_mesh(plan: TablePlan, shape: Sequence[int]) -> None:
    """Raise ConfigError where a table's plan cannot be carried out on a mesh of this shape."""
    world_size = shape[0] * (shape[1] if len(shape) > 1 else 1)
    if outside := [owner for owner in plan.owners if owner >= world_size]:
        raise ConfigError(
            f'owners must be ranks in [0, {world_size}); got {outside[0]} for table "{plan.name}"; '
            "make a plan for this mesh"
        )
    if plan.kind != "grid":
        return
    cut = (plan.num_row_parts, plan.num_column_parts)
    if tuple(shape) != cut or plan.owners != tuple(range(world_size)):
        raise ConfigError(
            f'a grid needs a mesh of hosts × ranks of a host, cut as the mesh is; table "{plan.name}" is cut into '
            f"{cut[0]} × {cut[1]} parts, the mesh is {' × '.join(map(str, shape))}; "
            f"use init_device_mesh(…, {cut}) or another kind"
        )


def route_of(plan: TablePlan, exchanges: MeshExchanges) -> Route:
    """Return the route of a planned table; the plan must fit the mesh, see `check_mesh`."""
    everyone = exchanges.everyone
    wires = (plan.forward_dtype, plan.backward_dtype)
    regions = [plan.region_of(rank) for rank in range(exchanges.world_size)]
    if plan.kind == "replicated":
        return Replicated(plan.name, everyone, plan.backward_dtype)
    if plan.kind == "column_wise":
        columns = [region.columns for region in regions]
        below = LocalRoute(plan.name)
        return ColumnWise(plan.name, plan.num_rows, columns, everyone, below, wires, can_chunk=True)
    if plan.kind == "grid":
        own = regions[exchanges.rank]
        assert exchanges.across_hosts is not None
        assert exchanges.within_host is not None
        across = _by_rows(plan, list(pairwise(plan.row_cuts)), own.columns[1] - own.columns[0], exchanges.across_hosts)
        columns = list(pairwise(plan.column_cuts))
        return ColumnWise(plan.name, plan.num_rows, columns, exchanges.within_host, across, wires, can_chunk=False)
    return _by_rows(plan, [region.rows for region in regions], plan.row_dim, everyone)


def _by_rows(plan: TablePlan, rows: Sequence[tuple[int, int]], row_dim: int, exchange: Exchange) -> Route:
    wires = (plan.forward_dtype, plan.backward_dtype)
    row_wise: Route = RowWise(plan.name, rows, row_dim, exchange, wires, deduplicate=plan.deduplicate)
    if plan.pooled and plan.kind != "table_wise":
        row_wise = PooledRows(plan.name, rows, row_dim, exchange, wires)
    # Where rows are pooled and a lookup's slots happen to lie on one rank each, they are summed as slots are.
    is_by_slots = plan.kind == "table_wise" or plan.code_stride > 0 or plan.pooled
    return TableWise(plan.name, rows, row_dim, exchange, row_wise, wires) if is_by_slots else row_wise
