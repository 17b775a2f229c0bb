"""Calibration: a machine's own figures for plans, measured while all its ranks are at work.

Ranks of one machine share cores, memory and links, so everything is measured on all of them at once, as `ranks_clock`
says. What several hosts have between them is not measured; their figures are those given.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mfdist.benchmarks.ranks_clock import RanksClock
from mfdist.kernels import gather_sum, row_gradient
from mfdist.sharding.cost import TableCost, price_table
from mfdist.sharding.kinds import column_wise, replicated
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.table_plan import TablePlan
from mfdist.sharding.topology import Link, Topology
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec
from mfdist.tables.sharded import ShardedTable

_TURNS = 9


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """How much is moved to measure a rate: enough to leave the caches and to hide what starting takes.

    Args:
        copy_bytes: of a copy.
        small_bytes, large_bytes: to each other rank.
        num_ids: to sort.
        lookups: tokens, lookups a token, columns.
        slot_rows: of a table that stays in the cache.
        far_rows: of one that does not.
        few_columns: of that one where a pass over rows is measured, not their bytes.
    """

    copy_bytes: int
    small_bytes: int = 1 << 10
    large_bytes: int
    num_ids: int
    lookups: tuple[int, int, int]
    slot_rows: int = 256
    far_rows: int
    few_columns: int = 32


_SIZES = {
    "cpu": _Sizes(copy_bytes=32 << 20, large_bytes=4 << 20, num_ids=200_000, lookups=(512, 16, 256), far_rows=100_000),
    "cuda": _Sizes(
        copy_bytes=1 << 30, large_bytes=256 << 20, num_ids=8_000_000, lookups=(16384, 32, 1024), far_rows=1_000_000
    ),
}


class _Bench(RanksClock):
    """The ranks, and how much is moved on what they work on."""

    @property
    def sizes(self) -> _Sizes:
        return _SIZES[self.device.type]


def calibrate(
    exchanges: MeshExchanges, base: Topology, *, turns: int = _TURNS, clock: Callable[[], float] = time.perf_counter
) -> Topology:
    """Return `base` with the figures of the ranks of one host; the same on all ranks.

    Args:
        exchanges: over a mesh of one axis; what is measured is its device.
        base: what is not measured: memory, links between hosts, the dense part's rate; its world size is replaced.
        turns: how often each figure is measured.
        clock: seconds; `time.process_time` counts this process's work alone, where other work shares the cores.

    Called on: all ranks of the mesh.
    """
    exchange, device = exchanges.everyone, exchanges.device
    bench = _Bench(exchange=exchange, device=device, turns=turns, clock=clock)
    sizes = bench.sizes
    copy, clone = bench.seconds(_copying(bench)), bench.seconds(_cloning(bench))
    sort = bench.seconds(_sorting(bench))
    num_tokens, num_lookups, row_dim = sizes.lookups
    num_rows = num_tokens * num_lookups
    looked_up = num_rows * row_dim * 4
    cached = bench.seconds(_training(bench, row_dim)) / 3  # a pass forward and two backward
    starts = _starts(bench, cached) if device.type == "cpu" else 0.0
    cached -= starts
    memory, passing = bench.seconds(_looking_up(bench)) - starts, bench.seconds(_passing(bench))
    passed = 4 * sizes.far_rows * sizes.few_columns * copy / (2 * sizes.copy_bytes)
    found = replace(
        base,
        name="measured",
        world_size=exchange.world_size,
        num_hosts=1,
        copy_bytes_per_s=2 * sizes.copy_bytes / copy,
        # The allocator of a GPU keeps what it is given back.
        fresh_bytes_per_s=sizes.copy_bytes / max(clone - copy, 1e-9) if device.type == "cpu" else 0.0,
        sort_ids_per_s=sizes.num_ids / sort,
        pass_rows_per_s=sizes.far_rows / max(passing - passed, 1e-9),
        cached_lookup_bytes_per_s=looked_up / cached,
        lookup_bytes_per_s=min(looked_up / max(memory, 1e-9), looked_up / cached),
        row_start_s=starts / num_rows,
    )
    return found if exchange.world_size == 1 else _with_calls(_with_links(found, bench), bench, exchanges)


def _with_links(base: Topology, bench: _Bench) -> Topology:
    """Return `base` with what messages take between ranks, apart from what collectives take to start: `_with_calls`.

    An accelerator's latency is that of messages queued long before: until one that is waited for has come, its host has
    started it, and starts are counted as the host's.
    """
    exchange, num_peers = bench.exchange, bench.exchange.world_size - 1
    tags = bench.seconds(lambda: bench.begin("tags").wait())
    few, many = bench.sizes.small_bytes, bench.sizes.large_bytes
    send_few = _sending(bench, few)
    small, large = bench.seconds(send_few), bench.seconds(_sending(bench, many))
    # The model adds packing, which these sends do not do; what is left over is the link's.
    bytes_per_s = (many - few) * num_peers / max(large - small, 1e-9)
    latencies = small - tags if bench.device.type == "cpu" else bench.queued_seconds(send_few, _copying(bench))
    return replace(
        base,
        inside=Link(bytes_per_s=bytes_per_s, latency_s=max(latencies, 1e-9) / num_peers),
        collective_s=0.0,
        host_lookup_s=0.0,
        control=Link(bytes_per_s=bytes_per_s, latency_s=tags / exchange.world_size),
    )


def _with_calls(base: Topology, bench: _Bench, exchanges: MeshExchanges) -> Topology:
    """Return `base` with what a collective takes besides: the work around it, from a lookup that has next to none.

    An accelerator runs behind its host there, so that kinds with few and with many collectives tell what is the host's.
    They take turns with a larger lookup of a local table, as layers of a model do.
    """
    spec = TableSpec(name="tiny", num_rows=1, row_dim=bench.exchange.world_size)
    step, cost = _small_step(column_wise(spec, spec.row_dim), base, bench, exchanges)
    if bench.device.type == "cpu":
        return replace(base, collective_s=max(0.0, bench.seconds(step) - cost.step_s) / len(cost.transfers))
    few_step, few = _small_step(replicated(spec), base, bench, exchanges)
    training = _training(bench, bench.sizes.lookups[2])
    seconds, few_seconds, _ = bench.seconds_in_turns([step, few_step, training])
    each = max(0.0, seconds - few_seconds) / (len(cost.transfers) - len(few.transfers))
    return replace(base, collective_s=each, host_lookup_s=max(few_seconds - each * len(few.transfers), 1e-9))


def _small_step(
    plan: TablePlan, base: Topology, bench: _Bench, exchanges: MeshExchanges
) -> tuple[Callable[[], None], TableCost]:
    """Return a step of one token a rank, and what it costs without calls."""
    table = ShardedTable(plan, exchanges, device=bench.device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=bench.device)
    scores = torch.ones(1, 1, device=bench.device, requires_grad=True)
    grad = torch.ones(1, plan.row_dim, device=bench.device)

    def step() -> None:
        table(ids, scores).backward(grad)
        assert table.weight.grad is not None
        with torch.no_grad():
            table.weight.add_(table.weight.grad, alpha=-0.01)
        table.weight.grad = None

    world_size = bench.exchange.world_size
    work = Workload(batch_tokens=world_size, loads={plan.name: TableLoad(num_lookups=1)}, rule="sgd")
    return step, price_table(plan, base, work)


def _copying(bench: _Bench) -> Callable[[], object]:
    source = torch.zeros(bench.sizes.copy_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _cloning(bench: _Bench) -> Callable[[], object]:
    """Return a copy to a buffer that is new each time."""
    source = torch.zeros(bench.sizes.copy_bytes, dtype=torch.uint8, device=bench.device)
    return source.clone


def _sorting(bench: _Bench) -> Callable[[], object]:
    ids = torch.randint(0, 1 << 20, (bench.sizes.num_ids,), generator=torch.Generator().manual_seed(0))
    ids = ids.to(bench.device)
    return lambda: torch.sort(ids, stable=True)


def _starts(bench: _Bench, wide: float) -> float:
    """Return what of `wide`, the time of a pass over rows of the usual width, their bytes do not take."""
    narrower = 8
    narrow = bench.seconds(_training(bench, bench.sizes.lookups[2] // narrower)) / 3
    return min(max(0.0, (narrower * narrow - wide) / (narrower - 1)), wide / 2)


def _training(bench: _Bench, row_dim: int) -> Callable[[], object]:
    """Return a lookup and its gradient in a table of slots that stay in the cache."""
    _, num_lookups, _ = bench.sizes.lookups
    stride = bench.sizes.slot_rows
    table = torch.randn(stride * num_lookups, row_dim, device=bench.device)
    codes, scores = _drawn(bench, stride)
    codes = codes.to(torch.uint8)
    return lambda: row_gradient(table, codes, scores, gather_sum(table, codes, scores, stride), stride)


def _looking_up(bench: _Bench) -> Callable[[], object]:
    """Return a lookup of rows far apart."""
    table = torch.zeros(bench.sizes.far_rows, bench.sizes.lookups[2], device=bench.device)
    ids, scores = _drawn(bench, bench.sizes.far_rows)
    return lambda: gather_sum(table, ids, scores)


def _passing(bench: _Bench) -> Callable[[], object]:
    """Return a gradient of many narrow rows, few of which were read."""
    far_rows, few_columns = bench.sizes.far_rows, bench.sizes.few_columns
    table = torch.zeros(far_rows, few_columns, device=bench.device)
    ids = torch.arange(0, far_rows, far_rows // 64, device=bench.device)[:, None]
    scores = torch.ones(ids.shape, device=bench.device)
    grad = torch.ones(ids.shape[0], few_columns, device=bench.device)
    return lambda: row_gradient(table, ids, scores, grad)


def _drawn(bench: _Bench, limit: int) -> tuple[Tensor, Tensor]:
    """Return row ids below a limit, and scores."""
    generator, shape = torch.Generator().manual_seed(0), bench.sizes.lookups[:2]
    ids = torch.randint(0, limit, shape, generator=generator)
    return ids.to(bench.device), torch.rand(shape, generator=generator).to(bench.device)


def _sending(bench: _Bench, size: int) -> Callable[[], object]:
    exchange = bench.exchange
    payload = torch.zeros(size * exchange.world_size, dtype=torch.uint8, device=bench.device)
    sizes = [size] * exchange.world_size

    def work() -> None:
        opened = bench.begin("payload")
        exchange.swap(opened, payload, sizes, sizes, size)
        opened.wait()

    return work
