"""The plan as it is drawn: which rank or server holds how much of each table, and what travels."""

from typing import Any

import numpy as np

from mfdist.config import RunConfig
from mfdist.models import build_model
from mfdist.models.loads import table_loads, table_specs
from mfdist.sharding import kinds
from mfdist.sharding.cost import PlanCost, TableCost, price
from mfdist.sharding.explanation import described
from mfdist.sharding.holdings import Floats
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.table_plan import TablePlan
from mfdist.sharding.topology import TOPOLOGIES
from mfdist.training.workload import run_workload

#: Ranks drawn one by one; of more, so many evenly spread ones.
MAX_HOLDERS = 64


def plan_view(
    config: RunConfig, plan: ShardingPlan | None, *, num_ranks: int, num_hosts: int, device_type: str
) -> dict[str, Any] | None:
    """Return a plan as JSON values; None where the model has no tables.

    Args:
        config: of the run, its vocabulary known.
        plan: by which its tables are spread; None where one rank holds them.
        num_ranks, num_hosts: that train.
        device_type: of the ranks, "cpu" or "cuda".
    """
    if config.model.kind != "memory":
        return None
    model = build_model(config.model, device="meta")
    specs = table_specs(model)
    if not specs:
        return None
    is_served = bool(config.servers.addresses) and plan is not None
    plan = plan or ShardingPlan(1, tuple(kinds.row_wise(spec, 1) for spec in specs))
    world_size = plan.world_size
    workload = run_workload(config, model)
    topology = TOPOLOGIES["h100" if device_type == "cuda" else "cpu"](world_size, 1 if is_served else num_hosts)
    cost = price(plan, topology, workload)
    shown = np.unique(np.arange(min(world_size, MAX_HOLDERS)) * world_size // min(world_size, MAX_HOLDERS))
    loads = table_loads(model)
    return {
        "holders": "server" if is_served else "rank",
        "num_holders": world_size,
        "num_hosts": num_hosts,
        "shown": shown.tolist(),
        "is_chosen": config.sharding.kind == "auto" and config.sharding.plan is None and not is_served,
        "tables": [_table(table, loads[table.plan.name].num_lookups) for table in cost.tables],
        "bytes": [_whole(table.held.on_ranks(table.footprint.weights)[shown]) for table in cost.tables],
        "regions": [[_region(table.plan, int(rank)) for rank in shown] for table in cost.tables],
        # Servers sum what they hold for clients; the collectives of ranks are not theirs.
        "sent_forward": [] if is_served else [_whole(table.sent_bytes("forward")[shown]) for table in cost.tables],
        "sent_backward": [] if is_served else [_whole(table.sent_bytes("backward")[shown]) for table in cost.tables],
        "memory": _memory(cost, shown, is_served=is_served),
    }


def _table(cost: TableCost, num_lookups: int) -> dict[str, Any]:
    plan = cost.plan
    return {
        "name": plan.name,
        "kind": described(cost),
        "num_rows": plan.num_rows,
        "row_dim": plan.row_dim,
        "num_bytes": plan.spec.num_bytes,
        "rows_read": num_lookups,
    }


def _region(plan: TablePlan, rank: int) -> str:
    region = plan.region_of(rank)
    if region.is_empty:
        return "nothing"
    if region == plan.spec.region:
        return "all rows"
    rows, columns = region.rows, region.columns
    parts = []
    if rows != plan.spec.region.rows:
        parts.append(f"rows {rows[0]:,} to {rows[1] - 1:,}")
    if columns != plan.spec.region.columns:
        parts.append(f"columns {columns[0]:,} to {columns[1] - 1:,}")
    return ", ".join(parts)


def _memory(cost: PlanCost, shown: Any, *, is_served: bool) -> list[dict[str, Any]]:
    """Return what each holder's memory is for, in parts that add up."""

    def total(part: str) -> Floats:
        held = [table.held.on_ranks(getattr(table.footprint, part)) for table in cost.tables]
        return np.asarray(np.sum(held, axis=0))

    parts = {"rows": total("weights"), "optimiser states": total("states")}
    if not is_served:
        parts["row gradients"] = total("gradients")
        parts["kept for backward"] = total("saved")
        parts["exchange buffers"] = np.full_like(parts["rows"], cost.buffer_bytes)
        parts["dense part and activations"] = np.full_like(parts["rows"], cost.dense_bytes)
    return [{"name": name, "bytes": _whole(values[shown])} for name, values in parts.items() if values.any()]


def _whole(values: Floats) -> list[int]:
    return [int(value) for value in values]
