"""What ranks do in the tests of `shard`; in a module of its own, since their processes import it."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from mfdist import MemoryFormer, MemoryLayer, shard, table_parameters
from mfdist.config import ModelConfig
from mfdist.errors import MfdistError
from mfdist.models.loads import table_loads, table_specs
from mfdist.parallelize import even_plan
from mfdist.sharding.plan import ShardingPlan
from mfdist.table import Table
from mfdist.tables.sharded import ShardedTable
from mfdist.testing.sharded_tables import put_together

SHAPE = ModelConfig(num_layers=1, hidden_dim=16, num_heads=2, bits=4, extra_bits=1, vocab_size=40, max_seq_len=8)


def batch(world_size):
    tokens = torch.randint(0, 40, (world_size * 2, 9), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model, inputs, targets):
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def alone(world_size, num_steps):
    """Return the losses and the model of the same training in one process."""
    torch.manual_seed(4)
    model = MemoryFormer(SHAPE)
    return trained(model, model, *batch(world_size), num_steps), model


def trained(model, wrapped, inputs, targets, num_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(num_steps):
        loss = loss_of(wrapped, inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def training(rank, kind, beside, num_steps=3):
    """Return the mean losses beside DDP or FSDP2, those of one process, and how far all parameters lie from its."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world_size // 2) if kind == "grid" else (world_size,))
    expected, reference = alone(world_size, num_steps)
    torch.manual_seed(4)
    model = shard(MemoryFormer(SHAPE, table_device="meta"), mesh, kind)
    wrapped = model
    if beside == "ddp":
        wrapped = DistributedDataParallel(model)
    elif beside == "fsdp":
        wrapped = fully_shard(
            model, mesh=init_device_mesh("cpu", (world_size,)), ignored_params=set(table_parameters(model))
        )
    inputs, targets = batch(world_size)
    mine = slice(rank * 2, rank * 2 + 2)
    losses = torch.tensor(trained(model, wrapped, inputs[mine], targets[mine], num_steps))
    dist.all_reduce(losses)
    differences = []
    tables = {f"{path}.weight": module for path, module in model.named_modules() if hasattr(module, "plan")}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
        whole = put_together(tables[name], whole) if name in tables else whole
        differences.append((whole - reference.get_parameter(name)).abs().max().item())
    return (losses / world_size).tolist(), expected, max(differences)


def told_of(call):
    try:
        call()
    except MfdistError as error:
        return f"{error.kind}: {error}"
    return "nothing"


def bad_input(rank, what):
    """Return what is told of an input that is wrong."""
    model = MemoryFormer(SHAPE, table_device="meta")
    mesh = init_device_mesh("cpu", (2,))
    specs, loads = table_specs(model), table_loads(model)
    good = even_plan("column_wise", specs, loads, (2,))
    match what:
        case "another model":
            wider = even_plan(
                "column_wise",
                table_specs(MemoryFormer(SHAPE.model_copy(update={"hidden_dim": 32}), device="meta")),
                {},
                (2,),
            )
            return told_of(lambda: shard(model, mesh, wider))
        case "a missing table":
            return told_of(lambda: shard(model, mesh, ShardingPlan(2, good.tables[1:])))
        case "another world":
            return told_of(lambda: shard(model, mesh, even_plan("column_wise", specs, loads, (4,))))
        case "a mesh of one rank":
            return told_of(lambda: shard(model, DeviceMesh("cpu", [rank]), "column_wise"))
        case "a grid on one axis":
            return told_of(lambda: shard(model, mesh, even_plan("grid", specs, loads, (2, 1))))
        case "no such kind":
            return told_of(lambda: shard(model, mesh, "columnwise"))
        case "no tables":
            return told_of(lambda: shard(torch.nn.Linear(2, 2), mesh))
        case "one name twice":
            layers = torch.nn.Sequential(MemoryLayer(8, 8, 4), MemoryLayer(8, 8, 4))
            return told_of(lambda: shard(layers, mesh, "row_wise"))
        case "one rank differs":
            plan = even_plan("row_wise" if rank else "column_wise", specs, loads, (2,))
            told = told_of(lambda: shard(model, mesh, plan))
            return told if isinstance(model.blocks[0].qkv.table.weight, torch.nn.Parameter) else "replaced"
        case "rows from other seeds":
            torch.manual_seed(rank)
            return told_of(lambda: shard(MemoryFormer(SHAPE, table_device="meta"), mesh, "replicated"))
        case "other rows":
            torch.manual_seed(rank)
            return told_of(lambda: shard(MemoryFormer(SHAPE), mesh, "replicated"))
        case "peer memory on one rank alone":
            return told_of(lambda: shard(model, mesh, "column_wise", uses_peer_memory=rank == 0))
        case "sharded twice":
            shard(model, mesh, good)
            return told_of(lambda: shard(model, mesh, good))


def fused_before(rank, kind, device, optimizer):
    """Return whether tables that were fused before they were sharded are trained as those of one process are.

    Where they have rows they have been trained before, so that states and rate are no longer what they begin with.
    """
    world_size = dist.get_world_size()
    inputs, targets = batch(world_size)
    mine = slice(rank * 2, rank * 2 + 2)

    def made(table_device):
        torch.manual_seed(4)
        model = MemoryFormer(SHAPE, table_device=table_device)
        for table in tables_of(model):
            table.fuse(optimizer)
            if table_device is None and device is None:
                table.row_state.lr = 0.02
        if device is None:
            loss_of(model, inputs, targets).backward()
        return model

    reference, model = made(None), shard(made(device), init_device_mesh("cpu", (world_size,)), kind)
    for _ in range(2):
        loss_of(reference, inputs, targets).backward()
        loss_of(model, inputs[mine], targets[mine]).backward()
    pairs = list(zip(tables_of(reference), tables_of(model), strict=True))
    distance = max((put_together(table, table.weight) - one.weight).abs().max().item() for one, table in pairs)
    moved = min(
        (one.weight - other.weight).abs().max().item()
        for one, other in zip(*map(tables_of, (reference, made(None))), strict=True)
    )
    return distance, moved, all(table.row_state.lr == one.row_state.lr for one, table in pairs)


def tables_of(model):
    return [module for module in model.modules() if isinstance(module, Table)]


def kept_rows(rank):
    """Return whether a model that has rows keeps them, and what auto chooses."""
    torch.manual_seed(4)
    model = MemoryFormer(SHAPE)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    shard(model, init_device_mesh("cpu", (2,)))
    tables = {f"{path}.weight": module for path, module in model.named_modules() if hasattr(module, "plan")}
    same = all(torch.equal(put_together(table, table.weight), before[name]) for name, table in tables.items())
    return same, len(tables), repr(model)


def cast_first(rank):
    """Return the dtypes in which a model's tables are told of, kept and sent where it was cast, then sharded."""
    model = MemoryFormer(SHAPE).bfloat16()
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), "column_wise")
    tables = [module for module in model.modules() if isinstance(module, ShardedTable)]
    kept = [(table.spec.dtype, table.weight.dtype, table.plan.forward_dtype) for table in tables]
    told = {str(dtype) for dtypes in kept for dtype in dtypes}
    again = {str(dtype) for table in tables for dtype in (table.float().spec.dtype, table.plan.dtype)}
    return told, again
