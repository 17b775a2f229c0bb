"""The planner's choice against every kind there is, on real ranks of this machine: is what it chooses the fastest?

For each world size the machine is calibrated in the same processes, each case is planned with those figures, and every
kind is timed: lookup, backward and a plain SGD update, kinds taking turns so that a slow moment falls on all of them.
On a machine that does other things besides, the ranks' processor time says more than the clock.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mfdist.benchmarks.calibration import calibrate
from mfdist.errors import ConfigError
from mfdist.sharding.cost import price_table
from mfdist.sharding.layout import candidates
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.planner import choose_plan
from mfdist.sharding.table_plan import TablePlan
from mfdist.sharding.topology import Topology, cpu, h100
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec
from mfdist.tables.sharded import ShardedTable
from mfdist.testing.run_ranks import RankPool

_CODES = {1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
_DEADLINE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table and what a rank asks of it."""

    name: str
    spec: TableSpec
    load: TableLoad
    tokens_a_rank: int

    def workload(self, world_size: int) -> Workload:
        """Return the case as a workload."""
        tokens = self.tokens_a_rank * world_size
        return Workload(batch_tokens=tokens, loads={self.spec.name: self.load}, rule="sgd")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen in a case, and what each kind takes.

    Args:
        case, world_size: which.
        chosen: the kind.
        measured_s, predicted_s: kind → time of a step.
    """

    case: str
    world_size: int
    chosen: str
    measured_s: dict[str, float]
    predicted_s: dict[str, float]

    @property
    def loss(self) -> float:
        """Return how much slower the chosen kind is than the fastest, as a share of the latter."""
        return self.measured_s[self.chosen] / min(self.measured_s.values()) - 1


def _case(name: str, rows: int, row_dim: int, load: TableLoad, tokens: int) -> Case:
    return Case(
        name=name,
        spec=TableSpec(name=name, num_rows=rows, row_dim=row_dim),
        load=load,
        tokens_a_rank=tokens,
    )


#: Device → a MemoryFormer's projection, its second feed-forward layer, few rows of a large table, a table smaller than
#: a batch.
CASES = {
    "cpu": (
        _case("qkv", 16 * 256, 384, TableLoad(num_lookups=16, code_stride=256, id_bytes=1), 1024),
        _case("ffn2", 32 * 1024, 384, TableLoad(num_lookups=32, code_stride=1024, id_bytes=4), 1024),
        _case("n-grams", 100_000, 128, TableLoad(num_lookups=4), 512),
        _case("tiny", 128, 32, TableLoad(num_lookups=8), 2048),
    ),
    "cuda": (
        _case("qkv", 128 * 256, 3072, TableLoad(num_lookups=128, code_stride=256, id_bytes=1), 4096),
        _case("ffn2", 128 * 1024, 1024, TableLoad(num_lookups=128, code_stride=1024, id_bytes=4), 4096),
        _case("n-grams", 4_000_000, 256, TableLoad(num_lookups=16), 4096),
        _case("tiny", 4096, 64, TableLoad(num_lookups=8), 16384),
    ),
}


def chosen_cases(device: str, patterns: Sequence[str]) -> list[Case]:
    """Return the cases whose names match a shell pattern, all where there is none.

    Raises:
        ConfigError: no case matches.
    """
    found = [case for case in CASES[device] if not patterns or any(fnmatch(case.name, pattern) for pattern in patterns)]
    if not found:
        names = ", ".join(case.name for case in CASES[device])
        raise ConfigError(f"a case must be one of {names}; got {', '.join(patterns)}")
    return found


def compare(
    device: str,
    world_sizes: Sequence[int],
    cases: Sequence[Case],
    *,
    turns: int = 15,
    is_shared: bool = False,
    timeout_s: float = _DEADLINE_S,
) -> Iterator[Topology | Choice]:
    """Yield for each world size the figures that were measured, then each case's choice, which was made by them.

    Args:
        device: cpu or cuda, of which each rank needs one.
        world_sizes, cases: every case is tried at each world size.
        turns: how often each kind is timed.
        is_shared: count processor time, calibration included; it says nothing of a GPU's.
        timeout_s: for each calibration, and each case at each world size.
    """
    with RankPool() as pool:
        for world_size in world_sizes:
            run = partial(pool.run, timeout_s=timeout_s, backend=_BACKENDS[device])
            found = run(calibrated, world_size, device, is_shared)[0]
            yield found
            for case in cases:
                yield _compare(run, device, case, found, turns, is_shared)


def calibrated(rank: int, device: str, is_shared: bool) -> Topology:
    """Return this machine's figures for as many ranks as there are; called on all ranks."""
    exchanges = MeshExchanges(init_device_mesh(device, (dist.get_world_size(),)))
    base = cpu(1) if device == "cpu" else h100(1, memory_bytes=torch.cuda.mem_get_info()[1])
    return calibrate(exchanges, base, clock=_clock(is_shared))


def timed(rank: int, device: str, case: Case, plans: Sequence[TablePlan], turns: int, is_shared: bool) -> list[float]:
    """Return the quickest step by each plan, on this rank; called on all ranks."""
    exchanges = MeshExchanges(init_device_mesh(device, (dist.get_world_size(),)))
    tables = [ShardedTable(plan, exchanges, device=exchanges.device) for plan in plans]
    generator = torch.Generator().manual_seed(rank)
    shape = (case.tokens_a_rank, case.load.num_lookups)
    ids = torch.randint(0, case.load.code_stride or case.spec.num_rows, shape, generator=generator)
    ids = ids.to(exchanges.device, _CODES[case.load.id_bytes])
    scores = torch.rand(shape, generator=generator).to(exchanges.device).requires_grad_()
    grad = torch.rand(case.tokens_a_rank, case.spec.row_dim, generator=generator).to(exchanges.device)
    clock = _clock(is_shared)
    taken: list[list[float]] = [[] for _ in tables]
    for _ in range(turns + 1):  # the first compiles
        for table, times in zip(tables, taken, strict=True):
            _finish(device)
            dist.barrier()
            _finish(device)
            began = clock()
            table(ids, scores, code_stride=case.load.code_stride).backward(grad)
            weight = table.weight
            assert weight.grad is not None
            with torch.no_grad():
                weight.add_(weight.grad, alpha=-0.01)
            _finish(device)
            times.append(clock() - began)
            weight.grad = None
    return [min(times[1:]) for times in taken]


def _compare(
    run: Callable[..., list[list[float]]], device: str, case: Case, machine: Topology, turns: int, is_shared: bool
) -> Choice:
    workload = case.workload(machine.world_size)
    predicted = {}
    plans: list[TablePlan] = []
    for plan in candidates(case.spec, machine, workload):
        predicted[_name(plan)] = price_table(plan, machine, workload).step_s
        plans.append(plan)
    times = run(timed, machine.world_size, device, case, plans, turns, is_shared)
    chosen = choose_plan([case.spec], machine, workload).tables[0]
    return Choice(
        case=case.name,
        world_size=machine.world_size,
        chosen=_name(chosen),
        measured_s={
            _name(plan): sum(each) / len(each) for plan, each in zip(plans, zip(*times, strict=True), strict=True)
        },
        predicted_s=predicted,
    )


def _finish(device: str) -> None:
    """Wait for what a GPU has been asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def _clock(is_shared: bool) -> Callable[[], float]:
    return time.process_time if is_shared else time.perf_counter


def _name(plan: TablePlan) -> str:
    return f"{plan.kind}, pooled" if plan.pooled else plan.kind if plan.deduplicate else f"{plan.kind}, each time"
