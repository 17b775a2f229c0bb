"""The planner: chooses how each table is split so that a step is fast and every rank's memory suffices.

A step's time is a sum over tables, so each table may take its fastest plan until memory is short. Then memory is bought
where it costs least time: tables move along the convex hull of (bytes, time) of their plans, least time lost a byte
saved first, until all fit; what is left over goes back to the tables that gain most. Where memory is ample the result
is the fastest there is; else it is at most one such move away from the fastest that fits with room for what uneven
pieces add, of the limits on buffers that are tried.
"""

import heapq
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from mfdist.errors import ConfigError
from mfdist.sharding.cost import PlanCost, TableCost, dense_bytes, price, price_table
from mfdist.sharding.layout import candidates, lay_out
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.topology import Topology
from mfdist.sharding.workload import Workload
from mfdist.spec import TableSpec

#: How many limits on the largest exchange buffer are tried.
_NUM_LIMITS = 12
#: How often the memory left for tables is corrected by what uneven pieces add.
_NUM_CORRECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the planner came to.

    Args:
        plan, cost: the plan, priced as it is.
        options: for each table in the plan's order, what it could have been, fastest first.
        topology, workload: what it was made for.
    """

    plan: ShardingPlan
    cost: PlanCost
    options: tuple[tuple[TableCost, ...], ...]
    topology: Topology
    workload: Workload

    @property
    def rank_bytes(self) -> int:
        """Return what the fullest rank needs; buffers are priced by averages, so a part of a byte counts as one."""
        return math.ceil(float(self.cost.rank_bytes.max()))

    @property
    def missing_bytes(self) -> int:
        """Return by how much the fullest rank exceeds what it may use; 0 or less where the plan fits."""
        return self.rank_bytes - self.topology.usable_bytes

    @property
    def fits(self) -> bool:
        """Return whether every rank's memory suffices."""
        return self.missing_bytes <= 0


def choose_plan(tables: Sequence[TableSpec], topology: Topology, workload: Workload) -> ShardingPlan:
    """Return the plan for a model's tables.

    Raises:
        ConfigError: nothing fits; the message says what is missing, and what would fit.
    """
    decision = decide(tables, topology, workload)
    if not decision.fits:
        from mfdist.sharding.advice import advise

        raise ConfigError(advise(decision).summary())
    return decision.plan


def decide(tables: Sequence[TableSpec], topology: Topology, workload: Workload) -> Decision:
    """Return a fast plan that fits, with what it was chosen from; where none does, what misses least."""
    if not tables:
        raise ConfigError("there must be a table to plan for; got a model without tables")
    options = _options(tables, topology, workload)
    budget = topology.usable_bytes - dense_bytes(topology, workload)
    found = []
    for _ in range(_NUM_CORRECTIONS):
        chosen = _choose(options, budget)
        found.append(_decision(chosen, options, topology, workload))
        if found[-1].fits:
            return found[-1]
        # What uneven pieces add is kept free, and more where the same plans would be chosen again.
        budget = min(budget - found[-1].missing_bytes, _num_bytes(chosen) - 1)
    found.append(_decision(_choose(options, 0), options, topology, workload))  # the leanest
    return min(found, key=lambda decision: decision.missing_bytes)


def _decision(
    chosen: Sequence[TableCost], options: Sequence[Sequence[TableCost]], topology: Topology, workload: Workload
) -> Decision:
    plan = ShardingPlan(topology.world_size, lay_out((cost.plan for cost in chosen), topology))
    return Decision(
        plan=plan,
        cost=price(plan, topology, workload),
        options=tuple(tuple(kinds) for kinds in options),
        topology=topology,
        workload=workload,
    )


def judge(plan: ShardingPlan, tables: Sequence[TableSpec], topology: Topology, workload: Workload) -> Decision:
    """Return a plan written by hand as if it had been chosen.

    Raises:
        ConfigError: it is not for these tables or this world.
    """
    plan.validate(tables, topology.world_size)
    options = _options([table.spec for table in plan.tables], topology, workload)
    return Decision(
        plan=plan,
        cost=price(plan, topology, workload),
        options=tuple(tuple(kinds) for kinds in options),
        topology=topology,
        workload=workload,
    )


def _options(tables: Sequence[TableSpec], topology: Topology, workload: Workload) -> list[list[TableCost]]:
    """Return each table's priced plans, fastest first; tables of one shape, read alike, are priced once."""
    known: dict[Hashable, list[TableCost]] = {}
    found = []
    for spec in tables:
        key = (spec.num_rows, spec.row_dim, spec.dtype, workload.load(spec.name))
        if key not in known:
            priced = [price_table(plan, topology, workload) for plan in candidates(spec, topology, workload)]
            known[key] = sorted(priced, key=lambda cost: cost.step_s)
        found.append([cost.renamed(spec.name) for cost in known[key]])
    return found


def _choose(options: Sequence[Sequence[TableCost]], budget: float) -> list[TableCost]:
    """Return one plan a table: of the limits on exchange buffers, the one under which the step is fastest."""
    buffers = sorted({cost.buffer_bytes for kinds in options for cost in kinds})
    least = max(min(cost.buffer_bytes for cost in kinds) for kinds in options)
    allowed = [size for size in buffers if size >= least]
    limits = {allowed[round(place)] for place in np.linspace(0, len(allowed) - 1, min(len(allowed), _NUM_LIMITS))}
    best: tuple[bool, float, list[TableCost]] | None = None
    for limit in sorted(limits, reverse=True):
        kept = [[cost for cost in kinds if cost.buffer_bytes <= limit] for kinds in options]
        chosen, num_bytes = _fill(kept, budget - limit)
        missing = num_bytes + limit - budget
        rank = (missing > 0, missing if missing > 0 else sum(cost.step_s for cost in chosen), chosen)
        if best is None or rank[:2] < best[:2]:
            best = rank
    assert best is not None
    return best[2]


def _num_bytes(chosen: Sequence[TableCost]) -> float:
    """Return what plans need of a rank, were their pieces even."""
    return sum(cost.lasting_bytes for cost in chosen) + max(cost.buffer_bytes for cost in chosen)


def _fill(options: Sequence[Sequence[TableCost]], budget: float) -> tuple[list[TableCost], float]:
    """Return one plan a table with their bytes: the fastest, then leaner ones while there are too many bytes."""
    hulls = [_hull(kinds) for kinds in options]
    places = [0] * len(hulls)
    num_bytes = sum(hull[0].lasting_bytes for hull in hulls)
    moves = [(_price_of_a_byte(hull, 0), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(moves)
    while num_bytes > budget and moves:
        _, index = heapq.heappop(moves)
        hull, place = hulls[index], places[index]
        num_bytes += hull[place + 1].lasting_bytes - hull[place].lasting_bytes
        places[index] += 1
        if place + 2 < len(hull):
            heapq.heappush(moves, (_price_of_a_byte(hull, place + 1), index))
    chosen = [hull[place] for hull, place in zip(hulls, places, strict=True)]
    return _spend(options, chosen, num_bytes, budget)


def _spend(
    options: Sequence[Sequence[TableCost]], chosen: list[TableCost], num_bytes: float, budget: float
) -> tuple[list[TableCost], float]:
    """Give the bytes left over to the tables that gain most time by them."""
    gains = sorted(
        (cost.step_s - chosen[index].step_s, index, place)
        for index, kinds in enumerate(options)
        for place, cost in enumerate(kinds)
        if cost.step_s < chosen[index].step_s
    )
    for _, index, place in gains:
        cost = options[index][place]
        more = cost.lasting_bytes - chosen[index].lasting_bytes
        if cost.step_s < chosen[index].step_s and num_bytes + more <= budget:
            chosen[index], num_bytes = cost, num_bytes + more
    return chosen, num_bytes


def _hull(kinds: Sequence[TableCost]) -> list[TableCost]:
    """Return the plans, from the fastest to the leanest, that no mixture of two others beats in both."""
    hull: list[TableCost] = []
    for cost in kinds:
        if hull and cost.lasting_bytes >= hull[-1].lasting_bytes:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], cost):
            hull.pop()
        hull.append(cost)
    return hull


def _price_of_a_byte(hull: Sequence[TableCost], place: int) -> float:
    return _slope(hull[place], hull[place + 1])


def _slope(faster: TableCost, leaner: TableCost) -> float:
    """Return the time lost for a byte saved."""
    return (leaner.step_s - faster.step_s) / (faster.lasting_bytes - leaner.lasting_bytes)
