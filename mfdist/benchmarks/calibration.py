"""Calibration: a machine's own figures for plans, measured while all its ranks are at work.

Ranks of one machine share cores, memory and links, so everything is measured on all of them at once. Of several turns
the quickest counts, since what else the machine does only ever makes one slower, and of the ranks the median. What
several hosts have between them is not measured; their figures are those given.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mfdist.kernels import gather_sum, row_gradient
from mfdist.sharding.cost import price_table
from mfdist.sharding.exchange import Exchange, Opened
from mfdist.sharding.kinds import column_wise
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.tags import Call
from mfdist.sharding.topology import Link, Topology
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec
from mfdist.tables.sharded import ShardedTable

_COPY_BYTES = 32 << 20
_SMALL_BYTES, _LARGE_BYTES = 1 << 10, 4 << 20  # to each other rank
_NUM_IDS = 200_000
_LOOKUPS = (512, 16, 256)  # tokens, lookups, columns
_SLOT_ROWS, _FAR_ROWS, _FEW_COLUMNS = 256, 100_000, 32
_TURNS = 9


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """All ranks of an exchange in step with each other."""

    exchange: Exchange
    turns: int
    clock: Callable[[], float]

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the quickest time of `work`, begun by all ranks together each time; the median over ranks."""
        work()
        taken = []
        for _ in range(self.turns):
            self.begin("start").wait()
            began = self.clock()
            work()
            taken.append(self.clock() - began)
        opened = self.begin("result", [round(min(taken) * 1e9)])
        return statistics.median(counts[0] for counts in opened.wait()) * 1e-9

    def begin(self, what: str, counts: tuple[int, ...] | list[int] = ()) -> Opened:
        return self.exchange.open(Call(table=what, kind="calibration", phase="check"), list(counts))


def calibrate(
    exchanges: MeshExchanges, base: Topology, *, turns: int = _TURNS, clock: Callable[[], float] = time.perf_counter
) -> Topology:
    """Return `base` with the figures of the ranks of one host; the same on all ranks.

    Args:
        exchanges: over a mesh of one axis, on the CPU.
        base: what is not measured: memory, links between hosts, the dense part's rate; its world size is replaced.
        turns: how often each figure is measured.
        clock: seconds; `time.process_time` counts this process's work alone, where other work shares the cores.

    Called on: all ranks of the mesh.
    """
    exchange = exchanges.everyone
    bench = _Bench(exchange=exchange, turns=turns, clock=clock)
    copy, clone = bench.seconds(_copying()), bench.seconds(_cloning())
    sort = bench.seconds(_sorting())
    num_tokens, num_lookups, row_dim = _LOOKUPS
    looked_up = num_tokens * num_lookups * row_dim * 4
    cached = bench.seconds(_training()) / 3  # a pass forward and two backward
    memory, passing = bench.seconds(_looking_up()), bench.seconds(_passing())
    found = replace(
        base,
        name="measured",
        world_size=exchange.world_size,
        num_hosts=1,
        copy_bytes_per_s=2 * _COPY_BYTES / copy,
        fresh_bytes_per_s=_COPY_BYTES / max(clone - copy, 1e-9),
        sort_ids_per_s=_NUM_IDS / sort,
        pass_rows_per_s=_FAR_ROWS / max(passing - 4 * _FAR_ROWS * _FEW_COLUMNS * copy / (2 * _COPY_BYTES), 1e-9),
        cached_lookup_bytes_per_s=looked_up / cached,
        lookup_bytes_per_s=min(looked_up / memory, looked_up / cached),
    )
    return found if exchange.world_size == 1 else _with_calls(_with_links(found, bench), bench, exchanges)


def _with_links(base: Topology, bench: _Bench) -> Topology:
    exchange, num_peers = bench.exchange, bench.exchange.world_size - 1
    tags = bench.seconds(lambda: bench.begin("tags").wait())
    small, large = (bench.seconds(_sending(bench, size)) for size in (_SMALL_BYTES, _LARGE_BYTES))
    # The model adds packing, which these sends do not do; what is left over is the link's.
    bytes_per_s = (_LARGE_BYTES - _SMALL_BYTES) * num_peers / max(large - small, 1e-9)
    inside = Link(bytes_per_s=bytes_per_s, latency_s=max(small - tags, 1e-9) / num_peers)
    return replace(
        base,
        inside=inside,
        collective_s=0.0,
        control=Link(bytes_per_s=bytes_per_s, latency_s=tags / exchange.world_size),
    )


def _with_calls(base: Topology, bench: _Bench, exchanges: MeshExchanges) -> Topology:
    """Return `base` with what a collective takes besides: the work around it, from a lookup that has next to none."""
    world_size = bench.exchange.world_size
    spec = TableSpec(name="tiny", num_rows=1, row_dim=world_size)
    plan = column_wise(spec, world_size)
    table = ShardedTable(plan, exchanges)
    ids, scores = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, requires_grad=True)
    grad = torch.ones(1, world_size)
    taken = bench.seconds(lambda: table(ids, scores).backward(grad))
    work = Workload(batch_tokens=world_size, loads={"tiny": TableLoad(num_lookups=1)}, rule="sgd")
    cost = price_table(plan, base, work)
    return replace(base, collective_s=max(0.0, taken - cost.step_s) / len(cost.transfers))


def _copying() -> Callable[[], object]:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _cloning() -> Callable[[], object]:
    """Return a copy to a buffer that is new each time."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    return source.clone


def _sorting() -> Callable[[], object]:
    ids = torch.randint(0, 1 << 20, (_NUM_IDS,), generator=torch.Generator().manual_seed(0))
    return lambda: torch.sort(ids, stable=True)


def _training() -> Callable[[], object]:
    """Return a lookup and its gradient in a table of slots that stay in the cache."""
    num_tokens, num_lookups, row_dim = _LOOKUPS
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(_SLOT_ROWS * num_lookups, row_dim, generator=generator)
    codes = torch.randint(0, _SLOT_ROWS, (num_tokens, num_lookups), generator=generator).to(torch.uint8)
    scores = torch.rand(num_tokens, num_lookups, generator=generator)
    return lambda: row_gradient(table, codes, scores, gather_sum(table, codes, scores, _SLOT_ROWS), _SLOT_ROWS)


def _looking_up() -> Callable[[], object]:
    """Return a lookup of rows far apart."""
    num_tokens, num_lookups, row_dim = _LOOKUPS
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(_FAR_ROWS, row_dim)
    ids = torch.randint(0, _FAR_ROWS, (num_tokens, num_lookups), generator=generator)
    scores = torch.rand(num_tokens, num_lookups, generator=generator)
    return lambda: gather_sum(table, ids, scores)


def _passing() -> Callable[[], object]:
    """Return a gradient of many narrow rows, few of which were read."""
    table = torch.zeros(_FAR_ROWS, _FEW_COLUMNS)
    ids = torch.arange(0, _FAR_ROWS, _FAR_ROWS // 64)[:, None]
    scores, grad = torch.ones(ids.shape), torch.ones(ids.shape[0], _FEW_COLUMNS)
    return lambda: row_gradient(table, ids, scores, grad)


def _sending(bench: _Bench, size: int) -> Callable[[], object]:
    exchange = bench.exchange
    payload = torch.zeros(size * exchange.world_size, dtype=torch.uint8)
    sizes = [size] * exchange.world_size

    def work() -> None:
        opened = bench.begin("payload")
        exchange.send(opened, payload, sizes, sizes, size).wait()
        opened.wait()

    return work
