"""`shard`: from a model whose tables lie on one device to one whose tables are spread over a mesh.

mesh = init_device_mesh("cuda", (8,))
model = MemoryFormer(config, table_device="meta")   # no rank ever holds a whole table
shard(model, mesh)                                  # tables
model = DistributedDataParallel(model)              # everything else, or fully_shard for FSDP2
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from mfdist.errors import ConfigError
from mfdist.models.loads import table_loads
from mfdist.sharding import kinds
from mfdist.sharding.agreement import agree
from mfdist.sharding.cuts import even_cuts
from mfdist.sharding.mesh import MeshExchanges, check_ranks
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.planner import choose_plan
from mfdist.sharding.routes.planned import check_mesh
from mfdist.sharding.table_plan import KINDS, Kind, TablePlan
from mfdist.sharding.topology import Topology, cpu, h100
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec
from mfdist.tables.local import LocalTable
from mfdist.tables.sharded import ShardedTable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Tokens a rank and micro-batch that an automatic plan is made for where nobody says.
_TOKENS_A_RANK = 8192
#: Numbers of a table by which ranks see whether they have the same.
_SAMPLED = 4096


def shard(
    model: nn.Module,
    mesh: "DeviceMesh",
    plan: ShardingPlan | Literal["auto"] | Kind = "auto",
    *,
    workload: Workload | None = None,
    topology: Topology | None = None,
    deadline_s: float = 300.0,
    chunk_bytes: int | None = None,
    uses_peer_memory: bool = True,
) -> nn.Module:
    """Replace a model's tables by sharded ones over all ranks of a mesh, in place; return the model.

    A table on the meta device gets the values it would have had on one device after the same seed, each rank drawing
    its own part; one that has rows keeps them, and they must be the same on all ranks. A table that is fused stays so,
    with its states. Other parameters stay as they are. DDP leaves the tables alone by itself; for FSDP2 give
    `ignored_params=set(table_parameters(model))`.

    Args:
        model: its tables are `LocalTable`s, each with a name of its own.
        mesh: of one axis, or of two (hosts × ranks of a host), which grids need; it holds every rank.
        plan: for exactly this model and mesh; a kind, for all tables and as even as it gets; or "auto", which asks the
            planner.
        workload, topology: what the planner plans for; by default a few thousand tokens a rank, and this machine's kind
            of processor.
        deadline_s: longest wait for the slowest rank, in every exchange.
        chunk_bytes, uses_peer_memory: see `mfdist.sharding.exchange.Exchange`.

    Raises:
        ConfigError: the plan is for another model or mesh, the mesh is not the world, or a rank has another model, plan
            or mesh, or other rows, by their seeds or a sample. Found before anything is exchanged but digests; the
            model is as it was.

    Called on: all ranks, with equal arguments.
    """
    tables = _local_tables(model)
    specs = [table.spec for table in tables]
    check_ranks(mesh)
    shape = tuple(mesh.mesh.shape)
    if isinstance(plan, str):
        plan = _planned(model, specs, mesh, plan, workload, topology)
    plan.validate(specs, mesh.size())
    for table_plan in plan.tables:
        check_mesh(table_plan, shape)
    exchanges = MeshExchanges(mesh, deadline_s=deadline_s, chunk_bytes=chunk_bytes, uses_peer_memory=uses_peer_memory)
    agree(exchanges.everyone, "model, plan and mesh", f"mesh {shape}\n{_described(tables)}\n{plan.to_json()}")
    made = {id(table): _sharded(table, plan.table(table.spec.name), exchanges) for table in tables}
    ignored = []
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if id(child) in made:
                setattr(module, name, made[id(child)])
                ignored.append(f"{path}.{name}.weight" if path else f"{name}.weight")
    # What DDP's own static setter writes; it leaves these parameters to the tables.
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
    return model


def table_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the rows of a model's sharded tables, which DDP and FSDP2 must leave alone."""
    return [module.weight for module in model.modules() if isinstance(module, ShardedTable)]


def even_plan(
    kind: Kind,
    specs: Sequence[TableSpec],
    loads: Mapping[str, TableLoad],
    mesh_shape: Sequence[int],
    *,
    deduplicate: bool = True,
    pooled: bool = False,
    forward_dtype: torch.dtype | None = None,
    backward_dtype: torch.dtype | None = None,
) -> ShardingPlan:
    """Return the plan that gives every table the same kind of sharding, cut as evenly as it gets.

    Args:
        kind: of all tables.
        specs: of the tables.
        loads: how they are read, for the slots that `table_wise` and grids are cut between.
        mesh_shape: ranks, or hosts × ranks of a host.
        deduplicate, pooled, forward_dtype, backward_dtype: see `TablePlan`; what is pooled is cut between slots.

    Raises:
        ConfigError: there is no such kind, or the mesh has one axis and a grid needs two.
    """
    if kind not in KINDS:
        raise ConfigError(f'the kind of sharding must be auto or one of {", ".join(KINDS)}; got "{kind}"')
    if kind == "grid" and len(mesh_shape) != 2:
        raise ConfigError(f"a grid needs a mesh of hosts × ranks of a host; got one of shape {tuple(mesh_shape)}")
    world_size = mesh_shape[0] * (mesh_shape[1] if len(mesh_shape) > 1 else 1)

    def planned(spec: TableSpec) -> TablePlan:
        stride = loads[spec.name].code_stride if spec.name in loads else 0
        match kind:
            case "row_wise":
                return kinds.row_wise(
                    spec,
                    world_size,
                    cuts=even_cuts(spec.num_rows, world_size, stride) if pooled and stride else None,
                    deduplicate=deduplicate,
                    pooled=pooled,
                    forward_dtype=forward_dtype,
                    backward_dtype=backward_dtype,
                )
            case "column_wise":
                return kinds.column_wise(spec, world_size, forward_dtype=forward_dtype, backward_dtype=backward_dtype)
            case "table_wise":
                owners = world_size if stride else 1
                return kinds.table_wise(
                    spec, owners, stride, forward_dtype=forward_dtype, backward_dtype=backward_dtype
                )
            case "grid":
                return kinds.grid(
                    spec,
                    *mesh_shape,
                    code_stride=stride,
                    deduplicate=deduplicate,
                    pooled=pooled,
                    forward_dtype=forward_dtype,
                    backward_dtype=backward_dtype,
                )
            case "replicated":
                return kinds.replicated(spec, backward_dtype=backward_dtype)

    return ShardingPlan(world_size, tuple(planned(spec) for spec in specs))


def _local_tables(model: nn.Module) -> list[LocalTable]:
    tables = [module for module in model.modules() if isinstance(module, LocalTable)]
    if not tables:
        raise ConfigError("a model to shard must have tables that lie on one device; got one without")
    names = [table.spec.name for table in tables]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f'every table must have a name of its own; got two called "{twice[0]}"; give MemoryLayer name=…'
        )
    return tables


def _planned(
    model: nn.Module,
    specs: Sequence[TableSpec],
    mesh: "DeviceMesh",
    kind: str,
    workload: Workload | None,
    topology: Topology | None,
) -> ShardingPlan:
    shape = tuple(mesh.mesh.shape)
    loads = table_loads(model)
    if kind != "auto":
        return even_plan(kind, specs, loads, shape)  # type: ignore[arg-type]
    workload = workload or Workload(batch_tokens=_TOKENS_A_RANK * mesh.size(), loads=loads)
    return choose_plan(specs, topology or _this_machine(mesh), workload)


def _this_machine(mesh: "DeviceMesh") -> Topology:
    num_hosts = mesh.mesh.shape[0] if mesh.mesh.ndim == 2 else 1
    if mesh.device_type == "cuda":
        return h100(mesh.size(), num_hosts, memory_bytes=torch.cuda.get_device_properties().total_memory)
    return cpu(mesh.size(), num_hosts)


def _described(tables: Sequence[LocalTable]) -> str:
    return "\n".join(
        f"table {table.spec.name} {table.spec.num_rows} x {table.spec.row_dim} {table.spec.dtype} {_first_rows(table)}"
        for table in tables
    )


def _first_rows(table: LocalTable) -> str:
    """Return what tells a table's rows from others: what they will be drawn from, or a digest of a sample of them."""
    weight = table.weight.detach()
    if weight.is_meta:
        return f"from seed {table.seed}, std {table.std:g}"
    sample = weight.flatten()[:: max(1, weight.numel() // _SAMPLED)].cpu().contiguous()
    return f"of {hashlib.blake2b(sample.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()}"


def _sharded(table: LocalTable, plan: TablePlan, exchanges: MeshExchanges) -> ShardedTable:
    device = exchanges.device
    state = table.row_state
    if table.weight.is_meta:
        made = ShardedTable(plan, exchanges, std=table.std, device=device, seed=table.seed)
        return made if state is None else made.fuse(state.optimizer)
    made = ShardedTable(plan, exchanges, std=table.std, device="meta", seed=table.seed)
    (top, bottom), (left, right) = made.region.rows, made.region.columns
    held = table.weight.detach()[top:bottom, left:right].to(device, copy=True).contiguous()
    made.weight = nn.Parameter(held, requires_grad=table.weight.requires_grad)
    if state is not None:
        made.fuse(state.optimizer)
        assert made.row_state is not None
        whole = state.tensors.items()
        parts = {name: each[top:bottom, left:right] if each.ndim == 2 else each[top:bottom] for name, each in whole}
        made.row_state.load(parts, state.num_updates)
        made.row_state.lr = state.lr
    return made
