"""Advice: what to say where no plan fits: which tables, by how much, and the smallest changes that would fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from mfdist.sharding.cost import dense_bytes
from mfdist.sharding.planner import Decision, decide
from mfdist.sharding.topology import Topology
from mfdist.sharding.workload import Workload
from mfdist.spec import TableSpec

#: No world larger than this is looked for.
_LARGEST_WORLD = 1 << 14
#: No rank is asked to look up fewer tokens at once, to save memory.
_FEWEST_TOKENS = 256
_GIB = 1 << 30

_Setting = tuple[Sequence[TableSpec], Topology, Workload]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something to change, alone or together with others.

    Args:
        what: in words.
        rank_bytes: what the fullest rank would need.
        fits: whether that would do.
    """

    what: str
    rank_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Unplaced:
    """A table for which no memory is left once smaller ones have theirs, and what its leanest plan takes of a rank."""

    name: str
    rank_bytes: int


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What is missing and what would help.

    Args:
        rank_bytes, usable_bytes: what the fullest rank of the leanest plan needs, and what it may use.
        unplaced: the tables that do not fit, largest first.
        changes: single changes and then, where none of them fits, the smallest combination that does; those that fit
            first.
    """

    rank_bytes: int
    usable_bytes: int
    unplaced: tuple[Unplaced, ...]
    changes: tuple[Change, ...]

    @property
    def missing_bytes(self) -> int:
        """Return what the fullest rank lacks."""
        return self.rank_bytes - self.usable_bytes

    def summary(self) -> str:
        """Return it as one line, as errors are."""
        names = ", ".join(f'"{table.name}" ({size(table.rank_bytes)} a rank)' for table in self.unplaced[:3])
        more = f" and {len(self.unplaced) - 3} more" if len(self.unplaced) > 3 else ""
        fitting = [change.what for change in self.changes if change.fits]
        remedy = "; or ".join(fitting) if fitting else "no single change mends it"
        return (
            f"every rank must hold its part of the tables; got {size(self.rank_bytes)} for {size(self.usable_bytes)} "
            f"usable, {size(self.missing_bytes)} too much: no room is left for {names}{more}; what would fit: {remedy}"
        )


def size(num_bytes: float) -> str:
    """Return a size in TiB, GiB or MiB."""
    value = num_bytes / _GIB
    if value >= 1000:
        return f"{value / 1024:.1f} TiB"
    return f"{value:.1f} GiB" if value >= 0.1 else f"{value * 1024:.3g} MiB"


def advise(decision: Decision) -> Advice:
    """Return what is missing in a decision that does not fit, and what would help."""
    topology, workload = decision.topology, decision.workload
    specs = [table.spec for table in decision.plan.tables]
    setting: _Setting = (specs, topology, workload)
    singles = [(what, change(setting)) for what, change in _changes(setting)]
    found = [_tried(what, changed) for what, changed in singles]
    if not any(change.fits for change in found):
        found += _combined(setting)
    found += _larger_world(setting)
    found += _host_memory(setting)
    return Advice(
        rank_bytes=decision.rank_bytes,
        usable_bytes=topology.usable_bytes,
        unplaced=_unplaced(decision),
        changes=tuple(sorted(found, key=lambda change: not change.fits)),
    )


def _unplaced(decision: Decision) -> tuple[Unplaced, ...]:
    """Return the tables left over when memory is given to the smallest first."""
    beside = dense_bytes(decision.topology, decision.workload) + decision.cost.buffer_bytes
    left = decision.topology.usable_bytes - beside
    found = []
    needed = [(int(cost.footprint.lasting.max()), cost.plan.name) for cost in decision.cost.tables]
    for rank_bytes, name in sorted(needed, key=lambda table: table[0]):
        left -= rank_bytes
        if left < 0:
            found.append(Unplaced(name=name, rank_bytes=rank_bytes))
    return tuple(reversed(found))


def _changes(setting: _Setting) -> Iterator[tuple[str, Callable[[_Setting], _Setting]]]:
    """Yield the changes that are not made yet, the mildest first."""
    specs, topology, workload = setting
    times = 1
    while workload.tokens_per_exchange(topology.world_size * times) > _FEWEST_TOKENS:
        times *= 2
    if times > 1 and not workload.is_fused:
        yield (
            f"{times * workload.micro_batches} micro-batches a step (training.micro_batches)",
            lambda it: (*it[:2], replace(it[2], micro_batches=times * it[2].micro_batches)),
        )
    if not workload.is_fused and workload.micro_batches == 1:
        yield (
            f"rows updated in backward (optimizer.tables.rule={workload.rule})",
            lambda it: (*it[:2], replace(it[2], is_fused=True)),
        )
    if workload.rule == "adam" and workload.state_dtype.itemsize > 2:
        yield (
            "Adam's states in bf16 (optimizer.tables.state_dtype)",
            lambda it: (*it[:2], replace(it[2], state_dtype=torch.bfloat16)),
        )
    if workload.rule == "adam" and workload.state_dtype.itemsize > 1:
        yield (
            "Adam's states in a byte each (optimizer.tables.state_dtype=fp8)",
            lambda it: (*it[:2], replace(it[2], state_dtype=torch.uint8)),
        )
    if workload.rule == "adam":
        yield (
            "row-wise Adagrad instead of Adam (optimizer.tables.rule)",
            lambda it: (*it[:2], replace(it[2], rule="rowwise_adagrad")),
        )
    if any(spec.dtype.itemsize > 2 for spec in specs):
        yield (
            "rows in bf16 (model.table_dtype)",
            lambda it: ([replace(spec, dtype=torch.bfloat16) for spec in it[0]], *it[1:]),
        )


def _tried(what: str, setting: _Setting) -> Change:
    decision = decide(*setting)
    return Change(what=what, rank_bytes=decision.rank_bytes, fits=decision.fits)


def _combined(setting: _Setting) -> list[Change]:
    """Return the first combination that fits, of as few changes as do."""
    changes = list(_changes(setting))
    for number in range(2, len(changes) + 1):
        for chosen in combinations(changes, number):
            words = " and ".join(what for what, _ in chosen)
            if "micro-batches" in words and "in backward" in words:
                continue  # each backward would be an update
            changed = setting
            for _, change in chosen:
                changed = change(changed)
            if (tried := _tried(words, changed)).fits:
                return [tried]
    return []


def _larger_world(setting: _Setting) -> list[Change]:
    """Return the smallest world in which it fits; hosts are added whole."""
    specs, topology, workload = setting
    step = topology.ranks_per_host

    def at(num_hosts: int) -> Change:
        return _tried(f"{num_hosts * step} ranks", (specs, topology.resized(num_hosts * step), workload))

    too_few, enough = topology.num_hosts, topology.num_hosts * 2
    if workload.num_dense_parameters * 16 > topology.usable_bytes:
        return []  # what every rank holds does not shrink
    while not (best := at(enough)).fits:
        if enough * step * 2 > _LARGEST_WORLD:
            return []
        too_few, enough = enough, enough * 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if (tried := at(middle)).fits:
            best, enough = tried, middle
        else:
            too_few = middle
    return [best]


def _host_memory(setting: _Setting) -> list[Change]:
    """Return whether table servers in the hosts' memory could hold all rows and states."""
    specs, topology, workload = setting
    if not topology.host_memory_bytes:
        return []
    alone = decide(specs, topology.resized(1), replace(workload, is_fused=True, micro_batches=1))
    total = sum(float(cost.footprint.weights.sum() + cost.footprint.states.sum()) for cost in alone.cost.tables)
    each = int(total / topology.num_hosts)
    return [
        Change(
            what=f"table servers in host memory, {size(each)} of {size(topology.host_memory_bytes)} a host",
            rank_bytes=each,
            fits=each <= topology.host_memory_bytes,
        )
    ]
