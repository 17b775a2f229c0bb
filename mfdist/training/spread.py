"""Spreading a run's tables over its ranks, as the configuration's `[sharding]` says."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch.distributed.device_mesh import init_device_mesh

from mfdist.config import RunConfig
from mfdist.errors import ConfigError
from mfdist.models import Transformer
from mfdist.models.loads import table_loads, table_specs
from mfdist.parallelize import even_plan, shard
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.table_plan import TablePlan
from mfdist.training.workload import run_workload

_WIRES: Final = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def spread_tables(model: Transformer, config: RunConfig, world_size: int, num_hosts: int) -> None:
    """Replace the model's tables by sharded ones, in place.

    Raises:
        ConfigError: there is no such plan, or it does not fit the model or the ranks; see `mfdist.shard`.

    Called on: all ranks.
    """
    sharding = config.sharding
    shape = (num_hosts, world_size // num_hosts) if num_hosts > 1 else (world_size,)
    mesh = init_device_mesh(next(model.parameters()).device.type, shape)
    workload = replace(
        run_workload(config, model),
        deduplicate=sharding.deduplicate,
        forward_dtype=_WIRES[sharding.forward_dtype],
        backward_dtype=_WIRES[sharding.backward_dtype],
    )
    plan: ShardingPlan | str = "auto"
    if sharding.plan is not None:
        plan = _read_plan(sharding.plan)
    elif sharding.kind != "auto":
        plan = even_plan(
            sharding.kind,
            table_specs(model),
            table_loads(model),
            shape,
            deduplicate=sharding.deduplicate,
            pooled=sharding.pooled,
            forward_dtype=workload.forward_dtype,
            backward_dtype=workload.backward_dtype,
        )
    shard(
        model,
        mesh,
        plan,  # type: ignore[arg-type]
        workload=workload,
        deadline_s=sharding.deadline_s,
        uses_peer_memory=sharding.peer_memory,
    )


def shares_memory(model: Transformer) -> bool:
    """Return whether ranks that hold the model's tables can write into each other's memory."""
    exchanges = (getattr(module, "exchanges", None) for module in model.modules())
    return any(
        exchange.has_peer_memory for each in exchanges if isinstance(each, MeshExchanges) for exchange in each.all
    )


def plan_of(model: Transformer, num_holders: int) -> ShardingPlan | None:
    """Return the plan that the model's tables are spread by, over so many ranks or servers; None where they are not."""
    plans = [plan for module in model.modules() if isinstance(plan := getattr(module, "plan", None), TablePlan)]
    return ShardingPlan(num_holders, tuple(plans)) if plans else None


def _read_plan(path: Path) -> ShardingPlan:
    try:
        return ShardingPlan.from_json(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"sharding.plan must be a file that `mfdist plan --json` or a person wrote; cannot read {path} ({reason})"
        ) from None
