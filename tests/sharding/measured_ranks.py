"""What ranks measure of a real sharded table; in a module of its own, since their processes import it."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mfdist.sharding.kinds import row_wise
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.plan import ShardingPlan
from mfdist.tables.sharded import ShardedTable


def measured(rank, plan_json, name, num_tokens, load, mesh_shape, optimizer=None, autocast=None):
    """Return this rank's bytes: rows, gradient, kept for backward, and sent forward and backward."""
    plan = ShardingPlan.from_json(plan_json).table(name)
    exchanges = MeshExchanges(init_device_mesh("cpu", mesh_shape))
    table = ShardedTable(plan, exchanges).fuse(optimizer)
    generator = torch.Generator().manual_seed(rank)
    limit = load.code_stride or plan.num_rows
    ids = torch.randint(0, limit, (num_tokens, load.num_lookups), generator=generator)
    ids = ids.to({1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}[load.id_bytes])
    scores = torch.rand(num_tokens, load.num_lookups, generator=generator, requires_grad=True)
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() != table.weight.untyped_storage().data_ptr():
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    computes = torch.autocast("cpu", autocast, enabled=autocast is not None)
    with computes, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = table(ids, scores, code_stride=load.code_stride)
    out.sum().backward()
    phases = ("lookup", "gradient", "update")
    sent = {phase: sum(each.traffic.num_bytes[phase] for each in exchanges.all) for phase in phases}
    gradient = table.weight.grad
    dist.barrier()
    return {
        "weights": table.weight.nbytes,
        "gradients": 0 if gradient is None else gradient.nbytes,
        "states": sum(state.nbytes for state in table.row_state.tensors.values()) if table.row_state else 0,
        "saved": sum(kept.values()),
        "forward": sent["lookup"],
        "backward": sent["gradient"] + sent["update"],
    }


def zipf_traffic(rank, spec, num_tokens, num_lookups):
    """Return bytes sent by lookups with and without deduplication, and how many rows elsewhere: unique ones, all."""
    world_size = dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    weights = 1 / torch.arange(1, spec.num_rows + 1, dtype=torch.float64) ** 1.2
    ids = torch.multinomial(weights, num_tokens * num_lookups, replacement=True, generator=generator)
    # Frequent rows lie anywhere, not all with rank 0.
    ids = torch.randperm(spec.num_rows, generator=torch.Generator().manual_seed(9))[ids].view(num_tokens, num_lookups)
    exchanges, sent = MeshExchanges(init_device_mesh("cpu", (world_size,))), []
    for deduplicate in (True, False):
        table = ShardedTable(row_wise(spec, world_size, deduplicate=deduplicate), exchanges)
        exchanges.everyone.traffic.clear()
        table(ids, torch.ones(ids.shape))
        sent.append(exchanges.everyone.traffic.num_bytes["lookup"])
    top, bottom = table.region.rows
    elsewhere = ids[(ids < top) | (ids >= bottom)]
    return [*sent, elsewhere.unique().numel(), elsewhere.numel()]
