"""Traffic: the bytes a lookup and its backward put on the wire, for each kind of sharding.

Counted a rank and a micro-batch, without what a rank keeps for itself and without the tags and sizes that precede it.
Shape letters: W ranks, n tokens a rank, K lookups a token, D row width, U different rows a rank asks for (n·K where
they are not deduplicated), P pairs of a token and another rank that owns rows it used; i, j, s, f, g bytes of a code, a
row id, a score, a number forward, a number backward. Where a table is cut evenly, a rank sends

    row_wise     forward U·(j + D·f)·(W−1)/W                   backward P·(D·g + 4) + n·K·(j + 2·s)·(W−1)/W
    … pooled     forward n·K·(j + s)·(W−1)/W + P·(D·f + 4)     backward P·D·g + n·K·s·(W−1)/W
    column_wise  forward n·K·(i + s)·(W−1) + n·D·f·(W−1)/W     backward n·D·g·(W−1)/W + n·K·s·(W−1)
    table_wise   forward n·K·(i + s)·(W−1)/W + n·D·f·(W−1)     backward n·D·g·(W−1) + n·K·s·(W−1)/W
    replicated   forward nothing                               backward 2·R·D·g·(W−1)/W
    grid         column_wise within a host; within its columns, row_wise or table_wise between hosts

and where it is not, in proportion to what each rank holds. Row-wise Adagrad in backward adds the squares of the rows
that all ranks read, 4 bytes each to every rank that has other columns of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from mfdist.sharding.holdings import Floats, Holdings
from mfdist.sharding.table_plan import TablePlan
from mfdist.sharding.workload import TableLoad, Workload, reads_most_rows

Phase = Literal["forward", "backward"]
Axis = Literal["world", "inside", "between"]

SCORE_BYTES = 4
_SQUARE_BYTES = 4
_RUN_BYTES = 4  # how many of a token's lookups an owner has
_SCALE_BYTES = 4  # of each row that travels in fp8


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One all-to-all of a lookup or its backward.

    Args:
        what: what travels.
        phase: forward or backward.
        axis: who takes part: all ranks, those of a host, or those of the same place on every host.
        sent, received: [C] bytes of a rank of each class of `Holdings`.
        is_control: tags and sizes, which travel between the hosts' processors and not the accelerators.
    """

    what: str
    phase: Phase
    axis: Axis
    sent: Floats
    received: Floats
    is_control: bool = False


def transfers(
    plan: TablePlan, held: Holdings, workload: Workload, num_tokens: int, ranks_per_host: int
) -> list[Transfer]:
    """Return what travels in a lookup of `num_tokens` tokens a rank and in its backward.

    Args:
        plan: of the table.
        held: what it gives to the ranks.
        workload: how the table is read and trained.
        num_tokens: n.
        ranks_per_host: for a grid, whose axes are a host's ranks and the hosts.
    """
    world_size = held.world_size
    if world_size == 1:
        return []
    match plan.kind:
        case "row_wise":
            group = _Group(plan, held, workload, "world", world_size, num_tokens)
            return group.of_slots() if sums_slots(plan, workload.load(plan.name)) else group.of_rows()
        case "table_wise":
            return _Group(plan, held, workload, "world", world_size, num_tokens).of_slots()
        case "column_wise":
            return _Group(plan, held, workload, "world", world_size, num_tokens).of_columns()
        case "replicated":
            return _of_copies(plan, workload, world_size)
        case "grid":
            num_hosts = world_size // ranks_per_host
            found = []
            if ranks_per_host > 1:
                found += _Group(plan, held, workload, "inside", ranks_per_host, num_tokens).of_columns()
            if num_hosts > 1:
                across = _Group(plan, held, workload, "between", num_hosts, num_tokens * ranks_per_host)
                is_by_slots = sums_slots(plan, workload.load(plan.name))
                found += across.of_slots() if is_by_slots else across.of_rows()
            return found


def sums_slots(plan: TablePlan, load: TableLoad) -> bool:
    """Return whether owners sum whole slots: where they are what is cut, or are not cut where rows are pooled."""
    stride = load.code_stride
    return plan.code_stride > 0 or (plan.pooled and stride > 0 and not any(cut % stride for cut in plan.row_cuts))


def owner_hits(plan: TablePlan, held: Holdings, load: TableLoad) -> Floats:
    """Return the chance [C] that a token uses a row of a rank, if ids are drawn evenly from the table or its slots."""
    if load.code_stride:
        return np.minimum(1.0, held.rows / load.code_stride)
    return 1 - (1 - held.rows / plan.num_rows) ** load.num_lookups


def summed_rows(plan: TablePlan, load: TableLoad, num_tokens: float) -> float:
    """Return the rows whose gradients are summed before they are updated: those read, or all where that is most."""
    if plan.kind == "column_wise" and reads_most_rows(num_tokens * load.num_lookups, plan.num_rows):
        return float(plan.num_rows)
    return load.num_unique(plan.num_rows, num_tokens)


def row_id_bytes(num_rows: int) -> int:
    """Return the bytes of a row id on the wire."""
    return 4 if num_rows < 1 << 31 else 8


def wire_bytes(rows: torch.dtype, wire: torch.dtype, width: Floats) -> Floats:
    """Return the bytes [C] of `width` numbers of a row on the wire; what is narrow already stays as it is."""
    item_bytes = min(rows.itemsize, wire.itemsize)
    scale = _SCALE_BYTES if item_bytes == 1 else 0
    return width * item_bytes + scale


def _of_copies(plan: TablePlan, workload: Workload, world_size: int) -> list[Transfer]:
    """Return the sum of the copies' gradients: each rank's share of the rows, then the sums; which rows, if fused."""
    wire = plan.backward_dtype
    if workload.is_fused and wire.itemsize >= plan.dtype.itemsize:
        wire = torch.float32  # rounded once, at the update
    dtype = wire if workload.is_fused else plan.dtype
    width = wire_bytes(dtype, wire, np.full(1, float(plan.row_dim))) + workload.is_fused
    share = plan.num_rows * width * (world_size - 1) / world_size
    parts = ("shares of row gradients", "row gradients")
    return [
        _tags("backward", "world", share, world_size),
        *(Transfer(what=what, phase="backward", axis="world", sent=share, received=share) for what in parts),
    ]


def _tags(phase: Phase, axis: Axis, like: Floats, group: int) -> Transfer:
    size = np.full_like(like, 100.0 * (group - 1))
    return Transfer(what="tags and sizes", phase=phase, axis=axis, sent=size, received=size, is_control=True)


class _Group:
    """The formulas above over ranks that share a table, or in a grid a part of it."""

    def __init__(
        self, plan: TablePlan, held: Holdings, workload: Workload, axis: Axis, group: int, num_tokens: int
    ) -> None:
        self.plan, self.held, self.workload, self.axis, self.group = plan, held, workload, axis, group
        self.load = load = workload.load(plan.name)
        self.num_tokens = num_tokens
        self.num_lookups = float(num_tokens * load.num_lookups)
        self.share = held.rows / plan.num_rows

    def of_rows(self) -> list[Transfer]:
        """Return the exchange of ids and rows, or of what is pooled of them; and of gradients by token and owner."""
        unique = self.num_lookups
        if self.plan.deduplicate:
            unique = self.load.num_unique(self.plan.num_rows, self.num_tokens)
        asked, served = unique * (1 - self.share), unique * (self.group - 1) * self.share
        id_bytes = row_id_bytes(self.plan.num_rows)
        width = np.full(len(self.share), self.held.columns.max())  # a rank without rows gets whole ones all the same
        hits = owner_hits(self.plan, self.held, self.load)
        all_hits = float(hits @ self.held.counts) * self.group / self.held.world_size
        pairs, their_pairs = self.num_tokens * (all_hits - hits), self.num_tokens * (self.group - 1) * hits
        lookups = self.num_lookups * (1 - self.share)
        their_lookups = self.num_lookups * (self.group - 1) * self.share
        lookup_bytes = id_bytes + SCORE_BYTES
        listed = lookups * lookup_bytes + pairs * _RUN_BYTES
        their_listed = their_lookups * lookup_bytes + their_pairs * _RUN_BYTES
        if self.plan.pooled:
            return [
                *self._phase(
                    "forward",
                    ("row ids, scores and runs", listed, their_listed, 1),
                    ("partial sums", their_pairs, pairs, self._wire("forward", width)),
                ),
                *self._phase(
                    "backward",
                    ("gradients", pairs, their_pairs, self._wire("backward", width)),
                    ("score gradients", their_lookups, lookups, SCORE_BYTES),
                ),
            ]
        return [
            *self._phase(
                "forward",
                ("row ids", asked, served, id_bytes),
                ("rows", served, asked, self._wire("forward", width)),
            ),
            *self._phase(
                "backward",
                ("gradients", pairs, their_pairs, self._wire("backward", width)),
                ("places, scores and runs", listed, their_listed, 1),
                ("score gradients", their_lookups, lookups, SCORE_BYTES),
            ),
        ]

    def of_slots(self) -> list[Transfer]:
        """Return the exchange of codes, and of partial sums of all columns a rank has."""
        asked, served = self.num_lookups * (1 - self.share), self.num_lookups * (self.group - 1) * self.share
        width = np.full(len(self.share), self.held.columns.max())
        is_owner = (self.share > 0).astype(np.float64)
        num_owners = float(is_owner @ self.held.counts) * self.group / self.held.world_size
        given, got = self.num_tokens * (self.group - 1) * is_owner, self.num_tokens * (num_owners - is_owner)
        return [
            *self._phase(
                "forward",
                ("codes and scores", asked, served, self.load.id_bytes + SCORE_BYTES),
                ("partial sums", given, got, self._wire("forward", width)),
            ),
            *self._phase(
                "backward",
                ("gradients", got, given, self._wire("backward", width)),
                ("score gradients", served, asked, SCORE_BYTES),
            ),
        ]

    def of_columns(self) -> list[Transfer]:
        """Return the exchange of all codes, and of sums of columns."""
        codes = np.full(len(self.share), self.num_lookups * (self.group - 1))
        tokens = np.full(len(self.share), float(self.num_tokens))
        every = np.full(len(self.share), float(self.plan.row_dim))
        elsewhere, here = (tokens * size for size in self._columns("forward", every))
        asked, served = (tokens * size for size in self._columns("backward", every))
        return [
            *self._phase(
                "forward",
                ("codes and scores", codes, codes, self.load.id_bytes + SCORE_BYTES),
                ("sums", here, elsewhere, 1),
            ),
            *self._phase("backward", ("gradients", asked, served, 1), ("score gradients", codes, codes, SCORE_BYTES)),
            *self._squares(),
        ]

    def _squares(self) -> Iterator[Transfer]:
        """Yield what row-wise Adagrad needs of the columns of others: the squares of every row that was read."""
        if self.workload.is_fused and self.workload.rule == "rowwise_adagrad":
            touched = summed_rows(self.plan, self.load, self.num_tokens * self.held.world_size)
            has_columns = (self.held.columns > 0).astype(np.float64)
            num_others = float(has_columns @ self.held.counts) * self.group / self.held.world_size - has_columns
            squares = touched * self.share * has_columns * num_others
            yield from self._phase("backward", ("squares", squares, squares, _SQUARE_BYTES))

    def _columns(self, phase: Phase, every: Floats) -> tuple[Floats, Floats]:
        """Return the bytes of a token's columns that lie elsewhere, and of its columns here for all other ranks."""
        # Sums are whole, and travel as what they are rounded to in the end; gradients do where a rank's share is exact.
        dtype = self.workload.summed_dtype(self.plan.dtype)
        is_exact = not self.held.world_size & (self.held.world_size - 1) and dtype != torch.float16
        dtype = dtype if phase == "forward" or is_exact else self.plan.dtype
        own = self._wire(phase, self.held.columns, dtype)
        item_bytes = self._wire(phase, every + 1, dtype) - self._wire(phase, every, dtype)
        scales = self._wire(phase, 0 * every, dtype) * (self.group - 1)
        return (every - self.held.columns) * item_bytes + scales, own * (self.group - 1)

    def _wire(self, phase: Phase, width: Floats, dtype: torch.dtype | None = None) -> Floats:
        wire = self.plan.forward_dtype if phase == "forward" else self.plan.backward_dtype
        return wire_bytes(dtype or self.plan.dtype, wire, width)

    def _phase(self, phase: Phase, *parts: tuple[str, Floats, Floats, Floats | int]) -> Iterator[Transfer]:
        """Yield the transfers of one phase, tags and sizes first; parts are (what, sent, received, bytes of each)."""
        yield _tags(phase, self.axis, self.share, self.group)
        for what, sent, received, each in parts:
            yield Transfer(what=what, phase=phase, axis=self.axis, sent=sent * each, received=received * each)
