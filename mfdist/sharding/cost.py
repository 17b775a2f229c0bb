"""Costs: what a plan takes in memory, on the wire, and in time. Pure; no table is touched.

Times are predictions by an α–β model: a collective takes a start, a latency for each peer, and its bytes over the
link's rate, bytes within a host and between hosts at once; lookups and updates take their bytes over the memory's rate.
A step is the sum over its tables, each as slow as its slowest rank, since every exchange waits for all. Overlap of
exchanges and lookups is not counted. Where accelerators do the work, their hosts run ahead: a table takes its host's
time or its accelerator's, whichever is longer. Where the host waits to learn how much arrives, it has run ahead for
half of what the accelerator does, and it has twice as much to set going: ids are sorted and made unique. These two
numbers fit four H200; see docs/results.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mfdist.sharding.footprint import SUM_BYTES, Footprint, footprint
from mfdist.sharding.holdings import Floats, Holdings
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.table_plan import TablePlan
from mfdist.sharding.topology import Topology
from mfdist.sharding.traffic import Axis, Phase, Transfer, owner_hits, summed_rows, sums_slots, transfers
from mfdist.sharding.workload import TableLoad, Workload, reads_most_rows

#: Columns of a table that a lookup keeps in the cache while tokens pass.
_SLICE_COLUMNS = 64
#: Buffers from this size on are given back to the system, whose pages cost when they are touched again (glibc's limit).
_KEPT_BYTES = 32 << 20
#: Host's times of a lookup that one takes which waits to learn how much arrives; and the share of the accelerator's
#: work that it has queued by then.
_WAITING_LOOKUPS, _QUEUED_SHARE = 2, 0.5
#: The least that memory reads of a row at once.
_LEAST_READ_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class TableCost:
    """What one table costs in a step.

    Args:
        plan: what was priced.
        held: what it gives to the ranks.
        footprint: memory.
        transfers: collectives of one micro-batch.
        num_micro_batches: how often those happen in a step.
        lookup_s, exchange_s, update_s: of a step: hashing apart, lookups forward and backward; collectives; the rows'
            update.
        host_s: for which an accelerator waits for its host besides.
    """

    plan: TablePlan
    held: Holdings
    footprint: Footprint
    transfers: tuple[Transfer, ...]
    num_micro_batches: int
    lookup_s: float
    exchange_s: float
    update_s: float
    host_s: float

    @property
    def step_s(self) -> float:
        """Return the predicted time of a step's lookups, exchanges and update."""
        return self.lookup_s + self.exchange_s + self.update_s + self.host_s

    def renamed(self, name: str) -> "TableCost":
        """Return the cost of another table of the same shape that is read alike."""
        return self if name == self.plan.name else replace(self, plan=replace(self.plan, name=name))

    @cached_property
    def lasting_bytes(self) -> float:
        """Return the memory a rank needs beside exchange buffers, the mean over ranks."""
        return self.held.mean(self.footprint.lasting)

    @cached_property
    def buffer_bytes(self) -> float:
        """Return the memory that the largest exchange takes on a rank."""
        return float(self.footprint.transient.max())

    def sent_bytes(self, phase: Phase | None = None) -> Floats:
        """Return the bytes [W] that each rank sends in a step, in one phase or both."""
        sent = np.zeros(len(self.held.rows))
        for transfer in self.transfers:
            if phase in (None, transfer.phase) and not transfer.is_control:
                sent = sent + transfer.sent * self.num_micro_batches
        return self.held.on_ranks(sent)


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """What all tables and the dense part cost in a step.

    Args:
        tables: in the plan's order.
        dense_bytes: parameters, gradients, states and activations beside the tables, each rank.
        dense_s: the dense part's arithmetic and the exchange of its gradients.
    """

    tables: tuple[TableCost, ...]
    dense_bytes: float
    dense_s: float

    @cached_property
    def rank_bytes(self) -> Floats:
        """Return the memory [W] that each rank needs at its fullest."""
        total = np.full(self.tables[0].held.world_size, float(self.dense_bytes))
        for table in self.tables:
            total += table.held.on_ranks(table.footprint.lasting)
        return total + self.buffer_bytes

    @property
    def buffer_bytes(self) -> float:
        """Return the memory that the largest exchange takes; it is the same for all tables in turn."""
        return max(table.buffer_bytes for table in self.tables)

    @property
    def step_s(self) -> float:
        """Return the predicted time of a step."""
        return sum(table.step_s for table in self.tables) + self.dense_s


def price(plan: ShardingPlan, topology: Topology, workload: Workload) -> PlanCost:
    """Return what a plan costs on a topology of its world size."""
    tables = [price_table(table, topology, workload) for table in plan.tables]
    return PlanCost(
        tables=tuple(tables), dense_bytes=dense_bytes(topology, workload), dense_s=dense_s(topology, workload)
    )


def price_table(plan: TablePlan, topology: Topology, workload: Workload) -> TableCost:
    """Return what one table costs."""
    load = workload.load(plan.name)
    num_tokens = workload.tokens_per_exchange(topology.world_size)
    held = Holdings.of(plan, topology.world_size)
    read = replace(plan, dtype=workload.read_dtype(plan.dtype))
    exchanges = transfers(read, held, workload, num_tokens, topology.ranks_per_host)
    times = workload.micro_batches
    lookup_s = times * _lookup_s(read, held, load, topology, num_tokens)
    exchange_s = times * sum(transfer_s(transfer, topology) for transfer in exchanges)
    update_s = _update_s(plan, held, load, topology, workload)
    waits = _is_by_rows(plan, topology) and not sums_slots(plan, load)
    return TableCost(
        plan=plan,
        held=held,
        footprint=footprint(plan, held, load, workload, exchanges, num_tokens, topology.ranks_per_host),
        transfers=tuple(exchanges),
        num_micro_batches=times,
        lookup_s=lookup_s,
        exchange_s=exchange_s,
        update_s=update_s,
        host_s=_host_s(topology, times, len(exchanges), lookup_s + exchange_s + update_s, waits=waits),
    )


def transfer_s(transfer: Transfer, topology: Topology) -> float:
    """Return the time of one all-to-all, packing and unpacking included."""
    inside, outside = _num_peers(transfer.axis, topology)
    size = float(max(transfer.sent.max(), transfer.received.max()))
    start_s = 0.0 if topology.host_lookup_s else topology.collective_s  # of the host: `_host_s`
    if transfer.is_control:
        return start_s + (inside + outside) * topology.control.latency_s + size / topology.control.bytes_per_s
    packing = 2 * float((transfer.sent + transfer.received).max()) / topology.copy_bytes_per_s
    num_ranks = inside + outside + 1
    for buffer in (transfer.sent, transfer.received):
        packing += fresh_s(float(buffer.max()) * num_ranks / (num_ranks - 1), topology)
    shares = (size * inside / (inside + outside), size * outside / (inside + outside))
    return start_s + packing + _moving_s(shares, (inside, outside), topology)


def _host_s(topology: Topology, num_micro_batches: int, num_collectives: int, work_s: float, *, waits: bool) -> float:
    """Return for how long an accelerator that works for `work_s` waits for its host."""
    if not topology.host_lookup_s:
        return 0.0
    lookup_s = topology.host_lookup_s * (_WAITING_LOOKUPS if waits else 1)
    busy_s = num_micro_batches * (lookup_s + num_collectives * topology.collective_s)
    return max(0.0, busy_s - work_s * (_QUEUED_SHARE if waits else 1))


def fresh_s(num_bytes: float, topology: Topology) -> float:
    """Return what a new buffer takes beside what is done with it."""
    if num_bytes < _KEPT_BYTES or not topology.fresh_bytes_per_s:
        return 0.0
    return num_bytes / topology.fresh_bytes_per_s


def _num_peers(axis: Axis, topology: Topology) -> tuple[int, int]:
    """Return how many others take part, on the same host and elsewhere."""
    ranks = topology.ranks_per_host
    inside, outside = ranks - 1, topology.world_size - ranks
    return {"world": (inside, outside), "inside": (inside, 0), "between": (0, topology.num_hosts - 1)}[axis]


def _moving_s(sizes: tuple[float, float], num_peers: tuple[int, int], topology: Topology) -> float:
    """Return the time of bytes within a host and between hosts, at once."""
    inside, outside = topology.inside, topology.between
    latency = num_peers[0] * inside.latency_s + num_peers[1] * outside.latency_s
    return latency + max(sizes[0] / inside.bytes_per_s, sizes[1] / outside.bytes_per_s)


def dense_bytes(topology: Topology, workload: Workload) -> float:
    """Return what the dense part takes on a rank: fp32 parameters, gradients, two moments; and activations."""
    num_tokens = workload.tokens_per_exchange(topology.world_size)
    return workload.num_dense_parameters * 16 + workload.activation_bytes_per_token * num_tokens


def dense_s(topology: Topology, workload: Workload) -> float:
    """Return the time of the dense part's arithmetic and of the exchange of its gradients."""
    tokens = workload.tokens_per_exchange(topology.world_size) * workload.micro_batches
    arithmetic = tokens * workload.dense_flops_per_token / topology.flops_per_s
    world_size = topology.world_size
    if world_size == 1 or not workload.num_dense_parameters:
        return arithmetic
    # An all-reduce passes round the hosts over all their links at once, and within each host.
    size = 2.0 * 4 * workload.num_dense_parameters
    ranks, num_hosts = topology.ranks_per_host, topology.num_hosts
    sizes = (size * (ranks - 1) / ranks, size * (num_hosts - 1) / num_hosts / ranks)
    return arithmetic + topology.collective_s + _moving_s(sizes, (ranks - 1, num_hosts - 1), topology)


def _lookup_s(plan: TablePlan, held: Holdings, load: TableLoad, topology: Topology, num_tokens: int) -> float:
    """Return the time of one micro-batch's lookups: rows read once forward; rows and gradients once each backward."""
    world_size = topology.world_size
    if _is_fetched(plan, topology):
        group = world_size if plan.kind == "row_wise" else topology.num_hosts
        return _fetched_s(plan, held, load, topology, num_tokens * world_size // group, group)
    num_summed = np.full(len(held.rows), float(num_tokens * load.num_lookups))
    if plan.kind != "replicated":  # all ranks' tokens, in the part of the table that is here
        num_summed *= world_size * held.rows / plan.num_rows
    row_bytes = _row_bytes(held.columns, plan.dtype.itemsize)
    ordered = float(num_summed.max()) / topology.sort_ids_per_s if plan.pooled else 0.0  # by owner, and there by row
    each_s = row_bytes / _rates(plan, held, topology) + topology.row_start_s
    return 3 * float(np.max(num_summed * each_s)) + 2 * ordered


def _is_fetched(plan: TablePlan, topology: Topology) -> bool:
    """Return whether rows come to the tokens, and not sums."""
    return _is_by_rows(plan, topology) and not plan.pooled


def _is_by_rows(plan: TablePlan, topology: Topology) -> bool:
    """Return whether rows are cut anywhere, so that lookups are listed by their owners."""
    return plan.kind == "row_wise" or (plan.kind == "grid" and not plan.code_stride and topology.num_hosts > 1)


def _fetched_s(
    plan: TablePlan, held: Holdings, load: TableLoad, topology: Topology, num_tokens: int, group: int
) -> float:
    """Return the time of lookups whose rows come to the tokens, and whose gradients go to the rows."""
    lookups = float(num_tokens * load.num_lookups)
    unique = load.num_unique(plan.num_rows, num_tokens) if plan.deduplicate else lookups
    item_bytes = plan.dtype.itemsize
    width = float(_row_bytes(held.columns, item_bytes).max())
    is_cached = unique * min(float(held.columns.max()), _SLICE_COLUMNS) * item_bytes <= topology.cache_bytes
    rate = topology.cached_lookup_bytes_per_s if is_cached else topology.lookup_bytes_per_s
    most = float(held.rows.max()) / plan.num_rows * group  # the fullest rank's load, as a multiple of the average
    here_s, there_s = (
        width / each + topology.row_start_s for each in (rate, float(_rates(plan, held, topology).min()))
    )
    summed = lookups * here_s + 2 * lookups * most * there_s
    pairs = num_tokens * float(owner_hits(plan, held, load).max()) * group
    copied = 2 * (unique * most + pairs) * width / topology.copy_bytes_per_s
    ordered = lookups * (2 + most) / topology.sort_ids_per_s  # by row, by owner, and at the owner by row again
    return summed + copied + ordered


def _row_bytes(columns: Floats, item_bytes: int) -> Floats:
    """Return what memory reads of a row that has so many columns; of no row, nothing."""
    return np.where(columns > 0, np.maximum(columns * item_bytes, _LEAST_READ_BYTES), 0)


def _rates(plan: TablePlan, held: Holdings, topology: Topology) -> Floats:
    slices = held.rows * np.minimum(held.columns, _SLICE_COLUMNS) * plan.dtype.itemsize
    is_cached = slices <= topology.cache_bytes
    return np.where(is_cached, topology.cached_lookup_bytes_per_s, topology.lookup_bytes_per_s)


def _update_s(plan: TablePlan, held: Holdings, load: TableLoad, topology: Topology, workload: Workload) -> float:
    """Return the time of a step's row gradients and updates: every weight, or in backward those of touched rows."""
    item_bytes, rows, times, passing = plan.dtype.itemsize, held.rows, 1, 0.0
    state = {"sgd": 0, "rowwise_adagrad": 0, "adam": 2 * workload.state_dtype.itemsize}[workload.rule]
    if workload.is_fused:
        times = workload.micro_batches
        seen = workload.tokens_per_exchange(topology.world_size) * topology.world_size
        touched = load.num_unique(plan.num_rows, seen)
        rows = rows * min(1.0, touched / plan.num_rows)
        moved = 2 * item_bytes + 2 * state
        if workload.rule == "rowwise_adagrad" and plan.kind in ("column_wise", "grid"):
            # Sums wait for the squares of the other columns: written, and read for both.
            summed = summed_rows(plan, load, seen) / touched
            passing = 3 * SUM_BYTES * times * float(np.max(rows * held.columns)) * summed / topology.copy_bytes_per_s
            lookups = float(seen * load.num_lookups)
            if plan.kind == "grid" or not reads_most_rows(lookups, plan.num_rows):
                passing += times * lookups / topology.sort_ids_per_s
    else:
        if not (load.code_stride or _is_by_rows(plan, topology)):
            passing = workload.micro_batches * float(rows.max()) / topology.pass_rows_per_s
        if plan.kind != "replicated":  # whose gradient is what its first exchange sends
            passing += workload.micro_batches * fresh_s(float(np.max(rows * held.columns)) * item_bytes, topology)
        copied = workload.read_dtype(plan.dtype)  # rows cast for the lookup, and their gradient cast back
        casts = 0 if copied == plan.dtype else 2 * (item_bytes + copied.itemsize)
        moved = (
            workload.micro_batches * casts + 2 * item_bytes + 2 * state + item_bytes * (1 + workload.micro_batches)
        )  # the gradient: written, read
    return passing + times * float(np.max(rows * held.columns)) * moved / topology.copy_bytes_per_s
