"""Which rows a rank asks of which owner, and what it sends them back in the gradient. Index arithmetic, no exchange.

What is counted is fetched at once, and whether ids lie in the table with it, so that the host waits for a GPU a single
time. Until then ids outside are held at the table's ends; what was made of them is of no use.

n tokens, K lookups a token, M = n·K; W ranks, U requested ids, P pairs of a token and an owner of rows it used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mfdist.kernels.row_id_check import can_be_bad
from mfdist.sharding.routes.rank_rows import RankRows
from mfdist.sharding.routes.route import LookupArguments

#: Rows a lookup up to which marking the rows that are used beats sorting the ids.
_MARKED_ROWS = 4


@dataclass(frozen=True)
class Requests:
    """The ids of a lookup, grouped by the rank that owns them."""

    row_ids: Tensor  # [U] int32 or int64, counted from the first row of the owner
    counts: list[int]  # of them for each rank
    positions: Tensor  # [n, K] int32 or int64: which of the U each lookup uses


@dataclass(frozen=True)
class Returns:
    """What goes back to the owners in the gradient: which tokens, and for each its lookups there."""

    tokens: Tensor  # [P] int64, those for rank 0 first, in ascending order for each rank
    runs: Tensor  # [P] int32: how many lookups each has there
    lookups: Tensor  # [M] int64: n·K + k in the same order
    places: Tensor  # [M] int32 or int64: which of the ids that were asked of the owner each one used
    counts: tuple[list[int], list[int]]  # tokens and lookups for each rank

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors, in the order of the fields."""
        return self.tokens, self.runs, self.lookups, self.places


@dataclass(frozen=True)
class OwnerLookups:
    """A lookup grouped by owner, what one owner answers staying in the order of the tokens."""

    row_ids: Tensor  # [M] int32 or int64, counted from the first row of the owner
    lookups: Tensor  # [M] int64: n·K + k in the same order
    tokens: Tensor  # [P] int64: which tokens, those for rank 0 first
    runs: Tensor  # [P] int32: how many lookups each has there
    counts: tuple[list[int], list[int]]  # tokens and lookups for each rank


def requested(
    lookup: LookupArguments, rows: RankRows, *, is_unique: bool, is_training: bool
) -> tuple[Requests, Returns] | None:
    """Group a lookup's ids by owner, and what goes back; None where an id lies outside the table.

    Args:
        lookup: ids or codes.
        rows: which rank has which.
        is_unique: list an id once, however often it is looked up; lookups of one rank are then in ascending order.
        is_training: a gradient is wanted; otherwise nothing goes back.
    """
    asked = _Asked.of(lookup, rows)
    groups = _Groups.of(asked.owners, lookup.num_lookups, rows.world_size) if is_training or not is_unique else None
    if is_unique:
        listed = _unique(asked.numbers, rows)
    else:
        assert groups is not None
        listed = _all(asked.numbers, groups)
    to_count = [listed.below] if groups is None else [listed.below, groups.pairs_below, groups.lookups_below]
    counted = asked.fetch(to_count)
    if counted is None:
        return None
    numbers = listed.made(sum(counted[0]))
    local = numbers - rows.starts(numbers.device)[rows.owners(numbers)]
    narrow = torch.int32 if numbers.numel() <= torch.iinfo(torch.int32).max else torch.int64
    requests = Requests(
        local.to(_id_dtype(rows.num_rows)), counted[0], listed.positions.to(narrow).view(lookup.row_ids.shape)
    )
    if not is_training or groups is None:
        empty, zeros = requests.row_ids.new_empty(0), [0] * rows.world_size
        return requests, Returns(empty, empty, empty, empty, (zeros, zeros))
    places = (listed.positions - listed.below[asked.owners])[groups.lookups].to(narrow)
    tokens, runs = groups.pairs(sum(counted[1]))
    return requests, Returns(tokens, runs, groups.lookups, places, (counted[1], counted[2]))


def by_owner(lookup: LookupArguments, rows: RankRows) -> OwnerLookups | None:
    """Group a lookup's ids by owner as they are; None where one lies outside the table."""
    asked = _Asked.of(lookup, rows)
    groups = _Groups.of(asked.owners, lookup.num_lookups, rows.world_size)
    counted = asked.fetch([groups.pairs_below, groups.lookups_below])
    if counted is None:
        return None
    local = (asked.numbers - rows.starts(asked.numbers.device)[asked.owners])[groups.lookups]
    tokens, runs = groups.pairs(sum(counted[0]))
    return OwnerLookups(local.to(_id_dtype(rows.num_rows)), groups.lookups, tokens, runs, (counted[0], counted[1]))


@dataclass(frozen=True)
class _Asked:
    """The ids of a lookup as they are numbered rank by rank, and whose they are."""

    numbers: Tensor  # [M] int64
    owners: Tensor  # [M] int64
    extremes: tuple[Tensor, ...]  # the lowest and the highest id as it was given, where they are to be looked at
    limit: int  # which no id may reach

    @classmethod
    def of(cls, lookup: LookupArguments, rows: RankRows) -> "_Asked":
        ids, stride = lookup.row_ids.long(), lookup.code_stride
        limit = stride or rows.num_rows
        extremes: tuple[Tensor, ...] = ()
        if ids.numel() and can_be_bad(lookup.row_ids, limit):
            extremes = tuple(ids.aminmax())
            ids = ids.clamp(0, limit - 1)
        if stride:
            ids = ids + stride * torch.arange(lookup.num_lookups, device=ids.device)
        numbers = rows.numbered(ids.reshape(-1))
        return cls(numbers, rows.owners(numbers), extremes, limit)

    def fetch(self, below: Sequence[Tensor]) -> list[list[int]] | None:
        """Return from how many there are below each rank's, [W + 1], how many each has; None if an id lies outside."""
        fetched = torch.cat([*below, *(each[None] for each in self.extremes)]).tolist()
        size = below[0].numel()
        if self.extremes and not 0 <= fetched[-2] <= fetched[-1] < self.limit:
            return None
        parts = [fetched[size * index : size * (index + 1)] for index in range(len(below))]
        return [[int(high - low) for low, high in pairwise(part)] for part in parts]


@dataclass(frozen=True)
class _Groups:
    """Lookups in the order of their owners, those of one owner in the order of the tokens; nothing counted yet."""

    lookups: Tensor  # [M] int64: n·K + k
    tokens: Tensor  # [M] int64
    firsts: "_Marks"  # of each pair of a token and an owner
    pairs_below: Tensor  # [W + 1] int64: how many pairs there are with owners below each, and lookups
    lookups_below: Tensor

    @classmethod
    def of(cls, owners: Tensor, num_lookups: int, world_size: int) -> "_Groups":
        in_order, lookups = torch.sort(owners.to(torch.int16), stable=True)
        tokens = lookups // max(1, num_lookups)
        firsts = _Marks.of(_is_first(torch.add(tokens, in_order, alpha=owners.numel())))
        ranks = torch.arange(world_size + 1, dtype=in_order.dtype, device=owners.device)
        lookups_below = torch.searchsorted(in_order, ranks)
        return cls(lookups, tokens, firsts, firsts.before[lookups_below], lookups_below)

    def pairs(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the tokens [P] of all pairs, and how many lookups [P] int32 each has."""
        begins = self.firsts.places(number + 1)
        return self.tokens[begins[:-1]], begins.diff().int()


@dataclass(frozen=True)
class _Marks:
    """Some marked places among many."""

    is_marked: Tensor  # [M] bool
    before: Tensor  # [M + 1] int64: how many are marked before each place, and in all

    @classmethod
    def of(cls, is_marked: Tensor) -> "_Marks":
        before = is_marked.new_zeros(is_marked.numel() + 1, dtype=torch.int64)
        torch.cumsum(is_marked, 0, dtype=torch.int64, out=before[1:])
        return cls(is_marked, before)

    def places(self, number: int) -> Tensor:
        """Return so many marked places, and M in place of any more: `nonzero` would have a GPU count them again."""
        return torch.nonzero_static(self.is_marked, size=number, fill_value=self.is_marked.numel()).view(-1)


@dataclass(frozen=True)
class _Listed:
    """Ids to be requested, not counted yet."""

    positions: Tensor  # [M] int64: which of them each lookup uses
    below: Tensor  # [W + 1] int64: how many of them are of ranks below each
    numbers: Tensor  # of them, among others
    marks: _Marks | None = None  # which; where it is None, all

    def made(self, number: int) -> Tensor:
        """Return the ids [U] by number, of which there are so many."""
        return self.numbers if self.marks is None else self.numbers[self.marks.places(number)]


def _unique(numbers: Tensor, rows: RankRows) -> _Listed:
    """List each id once, ascending."""
    starts = rows.starts(numbers.device)
    if rows.num_rows <= _MARKED_ROWS * numbers.numel():
        is_used = torch.zeros(rows.num_rows, dtype=torch.bool, device=numbers.device)
        is_used[numbers] = True
        marks = _Marks.of(is_used)
        everyone = torch.arange(rows.num_rows, device=numbers.device)
        return _Listed(marks.before[numbers], marks.before[starts], everyone, marks)
    in_order, lookups = torch.sort(numbers)
    marks = _Marks.of(_is_first(in_order))
    positions = torch.empty_like(lookups).scatter_(0, lookups, marks.before[1:] - 1)
    return _Listed(positions, marks.before[torch.searchsorted(in_order, starts)], in_order, marks)


def _is_first(values: Tensor) -> Tensor:
    """Return which of a list's values differ from the one before."""
    is_first = torch.ones_like(values, dtype=torch.bool)
    torch.ne(values[1:], values[:-1], out=is_first[1:])
    return is_first


def _all(numbers: Tensor, groups: _Groups) -> _Listed:
    """List each lookup's id, grouped by owner."""
    places = torch.arange(numbers.numel(), device=numbers.device)
    positions = torch.empty_like(places).scatter_(0, groups.lookups, places)
    return _Listed(positions, groups.lookups_below, numbers[groups.lookups])


def _id_dtype(num_rows: int) -> torch.dtype:
    return torch.int32 if num_rows <= torch.iinfo(torch.int32).max else torch.int64
