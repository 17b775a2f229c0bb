"""What ranks do in the tests of training; in a module of its own, since their processes import it."""

import signal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mfdist.config import DenseGroupConfig, ModelConfig, OptimizerConfig, TableGroupConfig
from mfdist.models import build_model
from mfdist.parallelize import shard
from mfdist.testing.sharded_tables import put_together
from mfdist.training.events import Warned
from mfdist.training.loop import train
from mfdist.training.optimizer import RunOptimizer
from mfdist.training.run import RunDirectory
from mfdist.training.world import World


def trained(rank, path, *overrides):
    """Train a run that is there; return where it stopped, and what was told on this rank."""
    told = []
    stopped = train(RunDirectory.open(path), overrides=overrides, observer=told.append)
    return stopped.step, stopped.reason, [type(event).__name__ for event in told]


def stopped_by_one(rank, path):
    """Train a run of which rank 1 alone is asked to stop after a few steps."""
    run, seen = RunDirectory.open(path), []
    if rank == 1:
        # Rank 1 hears nothing of the run, so it counts its own exchanges by the clock of an alarm.
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
    stopped = train(run, observer=seen.append)
    return stopped.step, stopped.reason, [event.message for event in seen if isinstance(event, Warned)]


def unfused(rank, kind, rule):
    """Return how far tables trained by gradients lie from those of one process, and how far these have moved."""
    world_size = dist.get_world_size()
    shape = ModelConfig(num_layers=1, hidden_dim=16, num_heads=2, bits=4, vocab_size=11, max_seq_len=8)
    tables = TableGroupConfig(rule=rule, fused=False, lr=0.05, clip_norm=0.0)
    settings = OptimizerConfig(dense=DenseGroupConfig(lr=1e-9), tables=tables)
    tokens = torch.randint(0, 11, (world_size, 8), generator=torch.Generator().manual_seed(2))

    def trained(*, is_sharded):
        torch.manual_seed(0)
        model = build_model(shape)
        world = None
        if is_sharded:
            world = World(device=torch.device("cpu"), rank=rank, world_size=world_size)
            shard(model, init_device_mesh("cpu", (2, world_size // 2) if kind == "grid" else (world_size,)), kind)
        optimizer = RunOptimizer(model, settings, seed=5, world=world)
        for step in range(3):
            optimizer.set_rates(optimizer.learning_rates(step, 10))
            model(tokens[rank : rank + 1] if is_sharded else tokens).square().mean().backward()
            optimizer.step(optimizer.gradient_norms())
        return model.blocks[0].qkv.table

    sharded, whole = trained(is_sharded=True), trained(is_sharded=False)
    torch.manual_seed(0)
    before = build_model(shape).blocks[0].qkv.table.weight
    distance = (put_together(sharded, sharded.weight) - whole.weight).abs().max().item()
    return distance, (whole.weight - before).abs().max().item()
