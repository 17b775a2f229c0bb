"""What a rank does in the benchmark of sharded tables. Letters: n tokens a rank, K lookups a token, D row width."""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mfdist.benchmarks import torchrec_contender
from mfdist.benchmarks.sharding_case import RATE, SEED, STD, Batch, ShardingCase, expected_sums, make_batch
from mfdist.benchmarks.sharding_exchange import Alone, exchange_alone, overlap
from mfdist.optim import RowSGD
from mfdist.sharding import kinds
from mfdist.sharding.cuts import even_cuts
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.table_plan import TablePlan
from mfdist.tables.sharded import ShardedTable
from mfdist.testing.tolerances import TOLERANCES

#: The note of a contender that was not timed because its sums were wrong.
WRONG = "wrong"
#: Of a contender's name, where NCCL carries all messages of GPUs that could write into each other's memory.
_NCCL = "-nccl"
_MIN_TURNS = 3
#: Steps that follow each other without a wait, and how often.
_IN_A_ROW, _ROWS_OF_STEPS = 8, 3
#: Rows that one rank may fetch or sum in a step; with more, a contender takes minutes, or more memory than there is.
_MOST_BYTES = {"cpu": 512 << 20, "cuda": 12 << 30}


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One case, who takes part, and for how long each is timed."""

    case: ShardingCase
    device: str
    contenders: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank found of one contender; where it was not timed, `note` says why."""

    forward_s: float = 0.0
    step_s: float = 0.0
    in_a_row_s: float = 0.0
    num_turns: int = 0
    alone: Alone | None = None
    overlap: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    note: str = ""


class Contender(Protocol):
    """A table whose rows lie on all ranks, trained by SGD in backward."""

    def forward(self, batch: Batch) -> Tensor:
        """Return this rank's sums [n, D], differentiable."""


class OwnTable:
    """A `ShardedTable`."""

    def __init__(self, plan: TablePlan, exchanges: MeshExchanges) -> None:
        self.table = ShardedTable(plan, exchanges, std=STD, device=exchanges.device, seed=SEED)
        self.table.fuse(RowSGD(lr=RATE))

    def forward(self, batch: Batch) -> Tensor:
        """Return the sums."""
        out: Tensor = self.table(batch.row_ids, batch.scores, code_stride=batch.code_stride)
        return out


def contest(rank: int, asked: Contest) -> dict[str, Measured]:
    """Return what this rank finds of each contender; called on all ranks."""
    case, world_size = asked.case, dist.get_world_size()
    mesh = init_device_mesh(asked.device, (world_size,))
    meshes = {1: MeshExchanges(mesh)}
    if world_size >= 4 and world_size % 2 == 0 and "grid" in asked.contenders:
        meshes[2] = MeshExchanges(init_device_mesh(asked.device, (2, world_size // 2)))
    if world_size > 1 and asked.device == "cuda" and any(name.endswith(_NCCL) for name in asked.contenders):
        meshes[0] = MeshExchanges(mesh, uses_peer_memory=False)
    device = meshes[1].device
    wanted = expected_sums(case, rank, world_size, device)
    batch = make_batch(case, rank, device)
    found: dict[str, Measured] = {}
    right: dict[str, tuple[Contender, float | None, int | None]] = {}
    for name in asked.contenders:
        made = _made(name, case, meshes)
        if isinstance(made, str):
            found[name] = Measured(note=made)
            continue
        error, peak_bytes = _checked(made, batch, wanted)
        # All ranks time it, or none: one that was right here may have been wrong elsewhere.
        if _most(0.0 if error is None else error, device) <= TOLERANCES[str(case.dtype).removeprefix("torch.")]:
            right[name] = (made, error, peak_bytes)
        else:
            found[name] = Measured(error=error, note=WRONG)
    times = _timed({name: one for name, (one, _, _) in right.items()}, batch, device, asked.seconds)
    for name, (one, error, peak_bytes) in right.items():
        step = partial(_step, one, batch)
        found[name] = Measured(
            forward_s=statistics.median(forward_s for forward_s, _ in times[name]),
            step_s=statistics.median(step_s for _, step_s in times[name]),
            in_a_row_s=_in_a_row_s(one, batch),
            num_turns=len(times[name]),
            alone=exchange_alone(one.table, step) if isinstance(one, OwnTable) and world_size > 1 else None,
            overlap=overlap(step) if device.type == "cuda" else None,
            peak_bytes=peak_bytes,
            error=error,
        )
    return found


def _made(name: str, case: ShardingCase, meshes: dict[int, MeshExchanges]) -> Contender | str:
    """Return a contender, or why it cannot take part."""
    if name.startswith("torchrec-"):
        return torchrec_contender.made(name.removeprefix("torchrec-"), case)
    spec, stride, world_size = case.spec, case.code_stride, meshes[1].world_size
    fetched = {"row_wise-each-time": case.num_tokens * case.num_lookups, "replicated": case.num_rows}.get(name, 0)
    num_bytes = fetched * case.row_dim * case.dtype.itemsize
    if num_bytes >= _MOST_BYTES[meshes[1].device.type]:
        return f"would move {num_bytes / 1e6:.0f} MB of rows a rank; too slow to be timed here"
    match name:
        case "column_wise":
            return OwnTable(kinds.column_wise(spec, world_size), meshes[1])
        case "column_wise-nccl" | "table_wise-nccl":
            if 0 not in meshes or not meshes[1].everyone.has_peer_memory:
                return "NCCL carries all messages here as it is"
            return _made(name.removesuffix(_NCCL), case, {1: meshes[0]})
        case "row_wise" | "row_wise-each-time":
            return OwnTable(kinds.row_wise(spec, world_size, deduplicate=name == "row_wise"), meshes[1])
        case "row_wise-pooled":
            cuts = even_cuts(spec.num_rows, world_size, stride or 1)
            return OwnTable(kinds.row_wise(spec, world_size, cuts=cuts, pooled=True), meshes[1])
        case "table_wise":
            if not stride:
                return "needs slots, which row ids have not"
            return OwnTable(kinds.table_wise(spec, world_size, stride), meshes[1])
        case "grid":
            if 2 not in meshes:
                return "needs an even number of ranks, 4 or more"
            return OwnTable(kinds.grid(spec, *meshes[2].shape, code_stride=stride), meshes[2])
    return OwnTable(kinds.replicated(spec), meshes[1])


def _checked(
    contender: Contender, batch: Batch, wanted: tuple[Tensor, Tensor] | None
) -> tuple[float | None, int | None]:
    """Return how far the sums before and after an update are from the unsharded table's; the GPU memory of the step."""
    device = batch.scores.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = contender.forward(batch)
    sums = before.detach().clone()
    before.backward(batch.grad_output)  # type: ignore[no-untyped-call]
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    after = contender.forward(batch).detach()
    if wanted is None:
        return None, peak_bytes
    return max(_distance(got, one) for got, one in zip((sums, after), wanted, strict=True)), peak_bytes


def _distance(got: Tensor, wanted: Tensor) -> float:
    """Return ‖got − wanted‖ / ‖wanted‖, computed where they lie: copies to the host would take most of a benchmark."""
    return float(torch.linalg.vector_norm(got.double() - wanted) / torch.linalg.vector_norm(wanted))


def _timed(
    contenders: dict[str, Contender], batch: Batch, device: torch.device, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Return seconds of each turn's forward, and of all of it.

    Contenders take turns, all as often, until they have had `seconds` on average; one far slower leaves early.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    under_way = list(contenders)
    while under_way and (sum(spent.values()) < seconds * len(spent) or len(times[under_way[0]]) < _MIN_TURNS):
        for name in under_way:
            times[name].append(_step(contenders[name], batch))
            # The slowest rank's, so that all ranks stop at the same turn.
            spent[name] += _most(times[name][-1][1], device)
        under_way = [name for name in under_way if spent[name] < 4 * seconds or len(times[name]) < _MIN_TURNS]
    return times


def _in_a_row_s(contender: Contender, batch: Batch) -> float:
    """Return seconds a step, of steps that are queued one after the other, as the layers of a model are."""
    taken = []
    for _ in range(_ROWS_OF_STEPS):
        _synchronize(batch.scores.device)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(_IN_A_ROW):
            batch.scores.grad = None
            contender.forward(batch).backward(batch.grad_output)  # type: ignore[no-untyped-call]
        _synchronize(batch.scores.device)
        taken.append((time.perf_counter() - began) / _IN_A_ROW)
    return statistics.median(taken)


def _step(contender: Contender, batch: Batch) -> tuple[float, float]:
    device = batch.scores.device
    batch.scores.grad = None
    _synchronize(device)
    dist.barrier()
    began = time.perf_counter()
    out = contender.forward(batch)
    _synchronize(device)
    looked_up = time.perf_counter()
    out.backward(batch.grad_output)  # type: ignore[no-untyped-call]
    _synchronize(device)
    return looked_up - began, time.perf_counter() - began


def _most(value: float, device: torch.device) -> float:
    """Return the largest of all ranks' values; NaN where one is."""
    everyones = [torch.zeros(1, dtype=torch.float64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, torch.tensor([value], dtype=torch.float64, device=device))
    return float(torch.stack(everyones).max())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
