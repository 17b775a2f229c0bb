"""Putting a model's tables on servers, as `mfdist.shard` puts them on ranks."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from mfdist.errors import ConfigError
from mfdist.models.loads import table_loads
from mfdist.sharding import kinds
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.table_plan import TablePlan
from mfdist.sharding.workload import TableLoad
from mfdist.spec import TableSpec
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from mfdist.tables.local import LocalTable

Kind = Literal["auto", "whole", "row_wise", "column_wise", "table_wise"]

#: Columns a server has at least where they are cut: narrower ones cost more in calls than they save in work.
_LEAST_COLUMNS = 128


def serve_tables(model: nn.Module, servers: TableServers, plan: ShardingPlan | Kind = "auto") -> nn.Module:
    """Replace a model's tables by ones whose rows lie on servers, in place; return the model.

    A table on the meta device gets the values it would have had here after the same seed, drawn by the servers; one
    that has rows gives them to the servers. Tables are frozen until they are fused.

    Args:
        model: its tables are `LocalTable`s, each with a name of its own.
        servers: as client of which.
        plan: its owners are servers; or a kind, see `server_plan`.

    Raises:
        ConfigError: the plan is for another model or number of servers.
        ConsistencyError: a server holds another table of a name.

    Called on: all clients, with equal arguments.
    """
    tables = [module for module in model.modules() if isinstance(module, LocalTable)]
    specs = [table.spec for table in tables]
    if isinstance(plan, str):
        plan = server_plan(plan, specs, table_loads(model), len(servers))
    plan.validate(specs, len(servers))
    made = {id(table): _served(table, plan.table(table.spec.name), servers) for table in tables}
    ignored = []
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if id(child) in made:
                setattr(module, name, made[id(child)])
                ignored.append(f"{path}.{name}.weight" if path else f"{name}.weight")
    # What DDP's own static setter writes: there is nothing of tables to average.
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
    return model


def server_plan(
    kind: Kind,
    specs: Sequence[TableSpec],
    loads: Mapping[str, TableLoad],
    num_servers: int,
    *,
    needs_whole_rows: bool = False,
    forward_dtype: torch.dtype | None = None,
    backward_dtype: torch.dtype | None = None,
) -> ShardingPlan:
    """Return a plan for tables on servers.

    Args:
        kind: whole: each table lies on one server, the largest first to the one that has least; row_wise, column_wise,
            table_wise: all are cut so, evenly; auto: columns are cut where each server gets 128 or more, so that all
            work on each lookup; else tables stay whole if there are enough, and are cut between slots if not.
        specs: of the tables.
        loads: how they are read, for their slots.
        num_servers: how many.
        needs_whole_rows: whether columns must not be cut, as by row-wise Adagrad.
        forward_dtype, backward_dtype: what sums and gradients travel as.
    """
    wires: Any = {"forward_dtype": forward_dtype, "backward_dtype": backward_dtype}
    held = [0] * num_servers
    made: dict[str, TablePlan] = {}
    for spec in sorted(specs, key=lambda spec: -spec.num_bytes):
        stride = loads[spec.name].code_stride if spec.name in loads else 0
        match kind if kind != "auto" else _best(spec, stride, len(specs), num_servers, needs_whole_rows):
            case "row_wise":
                made[spec.name] = kinds.row_wise(spec, num_servers, **wires)
            case "column_wise":
                made[spec.name] = kinds.column_wise(spec, num_servers, **wires)
            case "table_wise" if stride:
                made[spec.name] = kinds.table_wise(spec, num_servers, stride, **wires)
            case "whole" | "table_wise":
                server = held.index(min(held))
                held[server] += spec.num_bytes
                made[spec.name] = kinds.row_wise(spec, [server], **wires)
            case other:
                raise ConfigError(
                    f'tables on servers are auto, whole, row_wise, column_wise or table_wise; got "{other}"'
                )
    return ShardingPlan(num_servers, tuple(made[spec.name] for spec in specs))


def _best(spec: TableSpec, stride: int, num_tables: int, num_servers: int, needs_whole_rows: bool) -> Kind:
    if num_servers == 1:
        return "whole"
    if not needs_whole_rows and spec.row_dim >= _LEAST_COLUMNS * num_servers:
        return "column_wise"
    if num_tables >= num_servers or not stride:
        return "whole"
    return "table_wise"


def _served(table: LocalTable, plan: TablePlan, servers: TableServers) -> RemoteTable:
    made = RemoteTable(plan, servers, std=table.std, seed=table.seed)
    if not table.weight.is_meta:
        made.load_rows(table.weight.detach())
    return made
