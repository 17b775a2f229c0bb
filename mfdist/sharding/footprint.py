"""Footprints: the memory that a table takes on each rank.

Shape letters: W ranks, n tokens a rank, K lookups a token, D row width, U different rows a rank asks for.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mfdist.sharding.holdings import Floats, Holdings
from mfdist.sharding.table_plan import TablePlan
from mfdist.sharding.traffic import SCORE_BYTES, Transfer, owner_hits, row_id_bytes, summed_rows, sums_slots
from mfdist.sharding.workload import TableLoad, Workload

_INDEX_BYTES = 8  # of a token's or a lookup's number
_RUN_BYTES = 4
#: Of a lookup while it is put in order with others that were listed: two words, a row and a number.
_SORTING_BYTES = 28
_ACCUMULATOR_BYTES = 4
SUM_BYTES = 4  # what rows' gradients are summed in


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a table on a rank of each class of `Holdings`, [C].

    Args:
        weights: the rows held.
        gradients: their gradient, where every weight has one.
        states: what the row optimiser keeps.
        saved: kept from a lookup to its backward; adds up over the tables of a model.
        transient: lives during one exchange, a rank's share of its own included, with the gradients that come and go
            by it, and where rows' gradients are summed or listed before they are used, or lookups put in order, those;
            the largest table's counts.
    """

    weights: Floats
    gradients: Floats
    states: Floats
    saved: Floats
    transient: Floats

    @cached_property
    def lasting(self) -> Floats:
        """Return what all tables of a model add up to."""
        return self.weights + self.gradients + self.states + self.saved


def footprint(
    plan: TablePlan,
    held: Holdings,
    load: TableLoad,
    workload: Workload,
    exchanges: list[Transfer],
    num_tokens: int,
    ranks_per_host: int,
) -> Footprint:
    """Return what a table takes on each rank.

    Args:
        plan, held, load: the table's.
        workload: for its rule, and whether gradients are fused away.
        exchanges: the table's `transfers`.
        num_tokens: n.
        ranks_per_host: for a grid.
    """
    cells = held.rows * held.columns
    weights = cells * plan.dtype.itemsize
    return Footprint(
        weights=weights,
        gradients=0 * cells if workload.is_fused else weights,
        states=state_bytes(held, workload),
        saved=_saved(plan, held, load, num_tokens, ranks_per_host) + _copy_bytes(plan, cells, workload),
        transient=_transient(plan, held, load, workload, exchanges, num_tokens, ranks_per_host),
    )


def state_bytes(held: Holdings, workload: Workload) -> Floats:
    """Return the bytes of the row optimiser's states on each rank."""
    match workload.rule:
        case "sgd":
            return 0 * held.rows
        case "rowwise_adagrad":
            return np.where(held.columns > 0, held.rows * _ACCUMULATOR_BYTES, 0)
        case "adam":
            return 2 * held.rows * held.columns * workload.state_dtype.itemsize


def _transient(
    plan: TablePlan,
    held: Holdings,
    load: TableLoad,
    workload: Workload,
    exchanges: list[Transfer],
    num_tokens: int,
    ranks_per_host: int,
) -> Floats:
    """Return the bytes of the fullest exchange, and of the gradients that are made and summed meanwhile."""
    if not exchanges:
        return 0 * held.rows
    group = {"world": held.world_size, "inside": ranks_per_host, "between": held.world_size // ranks_per_host}
    fullest = {"forward": 0 * held.rows, "backward": 0 * held.rows}
    for transfer in exchanges:
        # What stays on a rank lies in the same buffers as what leaves it.
        whole = (transfer.sent + transfer.received) * group[transfer.axis] / (group[transfer.axis] - 1)
        fullest[transfer.phase] = np.maximum(fullest[transfer.phase], whole)
    # The gradient over the number of ranks, and that of the scores.
    own = num_tokens * (plan.row_dim * plan.dtype.itemsize + load.num_lookups * SCORE_BYTES)
    fullest["backward"] = fullest["backward"] + own
    if plan.kind == "column_wise":  # of the scores of all tokens, to which each rank's columns add
        fullest["backward"] = fullest["backward"] + num_tokens * held.world_size * load.num_lookups * SCORE_BYTES
    if plan.kind == "replicated" and workload.is_fused:  # this rank's sums, beside those that arrive
        fullest["backward"] = fullest["backward"] + held.rows * held.columns * SUM_BYTES
    is_by_rows = plan.kind in ("row_wise", "grid") and not sums_slots(plan, load)
    has_squares = workload.is_fused and workload.rule == "rowwise_adagrad" and plan.kind in ("column_wise", "grid")
    if is_by_rows or has_squares:
        touched = summed_rows(plan, load, num_tokens * held.world_size) / plan.num_rows
        item_bytes = max(plan.dtype.itemsize, SUM_BYTES if workload.is_fused else 0)
        listed = touched * held.rows * held.columns * item_bytes
        if is_by_rows and workload.is_fused:  # on a CPU; a GPU numbers and sorts lookups
            tokens = float(num_tokens * held.world_size)
            shares = tokens * owner_hits(plan, held, load) * load.num_lookups * SCORE_BYTES
            sorting = tokens * load.num_lookups * held.rows / plan.num_rows * _SORTING_BYTES
            listed = np.maximum(listed, shares + sorting)
        fullest["backward"] = fullest["backward"] + listed
    return np.maximum(fullest["forward"], fullest["backward"])


def _copy_bytes(plan: TablePlan, cells: Floats, workload: Workload) -> Floats:
    """Return the bytes of the rows as they are read, where that is not how they are kept."""
    read = workload.read_dtype(plan.dtype)
    return 0 * cells if read == plan.dtype else cells * read.itemsize


def _saved(plan: TablePlan, held: Holdings, load: TableLoad, num_tokens: int, ranks_per_host: int) -> Floats:
    """Return what backward needs again: codes and scores of what a rank sums; row-wise, who used which row."""
    world_size, num_hosts = held.world_size, held.world_size // ranks_per_host
    lookups = np.full(len(held.rows), float(num_tokens * load.num_lookups))
    lookup_bytes = load.id_bytes + SCORE_BYTES
    share = held.rows / plan.num_rows
    match plan.kind:
        case "column_wise":
            return lookups * world_size * lookup_bytes
        case "table_wise":
            return lookups * world_size * share * lookup_bytes
        case "row_wise":
            if sums_slots(plan, load):
                return lookups * world_size * share * lookup_bytes
            return _saved_requests(plan, held, load, num_tokens, world_size)
        case "replicated":
            return lookups * lookup_bytes
        case "grid":
            if sums_slots(plan, load) or num_hosts == 1:
                return lookups * ranks_per_host * share * num_hosts * lookup_bytes
            return _saved_requests(plan, held, load, num_tokens * ranks_per_host, num_hosts)


def _saved_requests(plan: TablePlan, held: Holdings, load: TableLoad, num_tokens: int, group: int) -> Floats:
    """Return the ids asked of a rank, and its own lookups in the order of their owners with scores and places.

    Where rows are pooled the owners have scores too, and no places are needed.
    """
    lookups = float(num_tokens * load.num_lookups)
    unique = load.num_unique(plan.num_rows, num_tokens) if plan.deduplicate else lookups
    id_bytes = row_id_bytes(plan.num_rows)
    hits = owner_hits(plan, held, load)
    pairs = num_tokens * float(hits @ held.counts) * group / held.world_size
    if plan.pooled:
        everyones = lookups * group * held.rows / plan.num_rows * (SCORE_BYTES + id_bytes)
        everyones = everyones + num_tokens * group * hits * _RUN_BYTES
        return everyones + lookups * (SCORE_BYTES + _INDEX_BYTES) + pairs * _INDEX_BYTES
    own = lookups * (SCORE_BYTES + id_bytes + _INDEX_BYTES) + pairs * (_INDEX_BYTES + _RUN_BYTES)
    return own + unique * group * held.rows / plan.num_rows * id_bytes
