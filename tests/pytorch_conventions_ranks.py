"""What ranks do in test_pytorch_conventions.py; in a module of its own, since their processes import it."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mfdist import MemoryFormer
from tests.parallelize_ranks import SHAPE, alone, batch, trained


def plain_tables(rank, wrapper):
    """Return mean losses of a model whose tables are ordinary parameters, those of one process, and the distance."""
    world_size = dist.get_world_size()
    expected, reference = alone(world_size, 3)
    torch.manual_seed(4)
    model = MemoryFormer(SHAPE)
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    inputs, targets = batch(world_size)
    mine = slice(rank * 2, rank * 2 + 2)
    losses = torch.tensor(trained(model, wrapped, inputs[mine], targets[mine], 3))
    dist.all_reduce(losses)
    distance = 0.0
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
        distance = max(distance, (whole - reference.get_parameter(name)).abs().max().item())
    return (losses / world_size).tolist(), expected, distance
