"""Which rows a rank asks of which owner, and what it sends them back in the gradient. Index arithmetic, no exchange.

n tokens, K lookups a token, W ranks, U requested ids, P pairs of a token and an owner of rows it used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from mfdist.sharding.routes.route import LookupArguments

#: Rows a lookup up to which marking the rows that are used beats sorting the ids.
_MARKED_ROWS = 4


@dataclass(frozen=True)
class Requests:
    """The ids of a lookup, grouped by the rank that owns them."""

    row_ids: Tensor  # [U] int32 or int64, counted from the first row of the owner
    counts: list[int]  # of them for each rank
    positions: Tensor  # [n, K] int32 or int64: which of the U each lookup uses

    @classmethod
    def of(cls, lookup: LookupArguments, rows: Sequence[tuple[int, int]], num_rows: int, *, is_unique: bool) -> Self:
        """Group a lookup's ids, which must be in range.

        Args:
            lookup: ids or codes.
            rows: [begin, end) of each rank's rows.
            num_rows: R.
            is_unique: list an id once, however often it is looked up; lookups of one rank are then in ascending order.
        """
        ids = lookup.row_ids.long()
        if lookup.code_stride:
            ids = ids + lookup.code_stride * torch.arange(lookup.num_lookups, device=ids.device)
        # Numbered by owner, so that the ids of rank 0 come first; mostly that is the same number.
        starts = _rank_starts(rows)
        flat = _renumbered(ids.reshape(-1), rows, starts)
        if is_unique:
            listed, positions = _unique(flat, num_rows)
        else:
            owners = torch.bucketize(flat, flat.new_tensor(starts[1:]), right=True)
            order = torch.sort(owners, stable=True).indices
            listed, positions = flat[order], torch.empty_like(order)
            positions[order] = torch.arange(order.numel(), device=order.device)
        bounds = _count_below(listed, starts, is_sorted=is_unique)
        counts = [high - low for low, high in pairwise(bounds)]
        first = flat.new_tensor(starts[:-1]).repeat_interleave(flat.new_tensor(counts), output_size=sum(counts))
        dtype = torch.int32 if num_rows <= torch.iinfo(torch.int32).max else torch.int64
        narrow = torch.int32 if listed.numel() <= torch.iinfo(torch.int32).max else torch.int64
        return cls((listed - first).to(dtype), counts, positions.to(narrow).view(lookup.row_ids.shape))


@dataclass(frozen=True)
class Returns:
    """What goes back to the owners in the gradient: which tokens, and for each its lookups there."""

    tokens: Tensor  # [P] int64, those for rank 0 first, in ascending order for each rank
    runs: Tensor  # [P] int32: how many lookups each has there
    lookups: Tensor  # [n·K] int64: n·K + k in the same order
    places: Tensor  # [n·K] int32 or int64: which of the ids that were asked of the owner each one used
    counts: tuple[list[int], list[int]] = field(default=([], []))  # tokens and lookups for each rank

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors, in the order of the fields."""
        return self.tokens, self.runs, self.lookups, self.places

    @classmethod
    def of(cls, requests: Requests, num_lookups: int) -> Self:
        """Group the lookups of some requests by owner, those of one owner staying in the order of the tokens."""
        flat = requests.positions.reshape(-1).long()
        bounds = flat.new_tensor([0, *requests.counts]).cumsum(0)
        owners = torch.bucketize(flat, bounds[1:], right=True)
        lookups, tokens, runs, counts = _by_owner(owners, num_lookups, len(requests.counts))
        places = (flat - bounds[owners])[lookups].to(requests.positions.dtype)
        return cls(tokens, runs, lookups, places, counts)

    @classmethod
    def nothing(cls, requests: Requests) -> Self:
        """Return what goes back where no gradient is wanted."""
        empty, zeros = requests.row_ids.new_empty(0), [0] * len(requests.counts)
        return cls(empty, empty, empty, empty, (zeros, zeros))


@dataclass(frozen=True)
class OwnerLookups:
    """A lookup grouped by owner, what one owner answers staying in the order of the tokens."""

    row_ids: Tensor  # [n·K] int32 or int64, counted from the first row of the owner
    lookups: Tensor  # [n·K] int64: n·K + k in the same order
    tokens: Tensor  # [P] int64: which tokens, those for rank 0 first
    runs: Tensor  # [P] int32: how many lookups each has there
    counts: tuple[list[int], list[int]]  # tokens and lookups for each rank

    @classmethod
    def of(cls, lookup: LookupArguments, rows: Sequence[tuple[int, int]], num_rows: int) -> Self:
        """Group a lookup's ids, which must be in range; see `Requests.of`."""
        ids = lookup.row_ids.long()
        if lookup.code_stride:
            ids = ids + lookup.code_stride * torch.arange(lookup.num_lookups, device=ids.device)
        starts = _rank_starts(rows)
        flat = _renumbered(ids.reshape(-1), rows, starts)
        owners = torch.bucketize(flat, flat.new_tensor(starts[1:]), right=True)
        lookups, tokens, runs, counts = _by_owner(owners, lookup.num_lookups, len(rows))
        local = (flat - flat.new_tensor(starts)[owners])[lookups]
        dtype = torch.int32 if num_rows <= torch.iinfo(torch.int32).max else torch.int64
        return cls(local.to(dtype), lookups, tokens, runs, counts)


def _by_owner(
    owners: Tensor, num_lookups: int, world_size: int
) -> tuple[Tensor, Tensor, Tensor, tuple[list[int], list[int]]]:
    """Return the lookups in the order of their owners, the tokens and runs of each, and both counted for each rank."""
    lookups = torch.sort(owners.to(torch.int16), stable=True).indices
    tokens = lookups // max(1, num_lookups)
    by_owner = owners[lookups]
    is_first = torch.ones_like(tokens, dtype=torch.bool)
    is_first[1:] = (tokens[1:] != tokens[:-1]) | (by_owner[1:] != by_owner[:-1])
    firsts = is_first.nonzero().squeeze(1)
    runs = torch.diff(firsts, append=firsts.new_tensor([tokens.numel()]))
    counted = torch.stack([torch.bincount(owner, minlength=world_size) for owner in (by_owner[firsts], owners)])
    in_tokens, in_lookups = counted.tolist()
    return lookups, tokens[firsts], runs.int(), (in_tokens, in_lookups)


def _rank_starts(rows: Sequence[tuple[int, int]]) -> list[int]:
    """Return the first number of each rank's rows when all rows are numbered rank by rank, and their total."""
    starts = [0]
    for begin, end in rows:
        starts.append(starts[-1] + end - begin)
    return starts


def _renumbered(ids: Tensor, rows: Sequence[tuple[int, int]], starts: Sequence[int]) -> Tensor:
    """Return ids as they count when all rows are numbered rank by rank."""
    parts = sorted((begin, rank) for rank, (begin, end) in enumerate(rows) if end > begin)
    shifts = [starts[rank] - begin for begin, rank in parts]
    if not any(shifts):
        return ids
    part = torch.bucketize(ids, ids.new_tensor([begin for begin, _ in parts[1:]]), right=True)
    return ids + ids.new_tensor(shifts)[part]


def _unique(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the different ids, ascending, and where each of `ids` is among them."""
    if num_rows > _MARKED_ROWS * ids.numel():
        unique, positions = torch.unique(ids, return_inverse=True)
        return unique, positions
    is_used = torch.zeros(num_rows, dtype=torch.bool, device=ids.device)
    is_used[ids] = True
    places = is_used.cumsum(0, dtype=torch.int64) - 1
    return is_used.nonzero().squeeze(1), places[ids]


def _count_below(ids: Tensor, bounds: Sequence[int], *, is_sorted: bool) -> list[int]:
    """Return how many ids lie below each bound; ids that are not sorted are at least grouped by them."""
    limits = ids.new_tensor(bounds)
    if is_sorted:
        return [int(count) for count in torch.searchsorted(ids, limits).tolist()]
    owners = torch.bucketize(ids, limits[1:], right=True)
    counted = torch.bincount(owners, minlength=len(bounds) - 1).cumsum(0).tolist()
    return [0, *map(int, counted)]
