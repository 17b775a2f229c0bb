"""Mailboxes: memory of each rank that all ranks write to. Pure; the memory, and how ranks wait, are the caller's.

A message goes in two steps: each rank writes what it has for the others where they will read it, and all wait for each
other. Two halves of the memory take turns, so that one wait a message is enough: who has come to the wait of a message
has used what the one before brought, whose half the next is written to.

W ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16
#: What memory is mapped by.
_GRANULE_BYTES = 2 << 20
#: Messages of so many sizes have their places kept, because a host takes its time to view memory.
_MOST_KNOWN = 256


def slot_bytes(num_bytes: int) -> int:
    """Return what a part of at most so many bytes takes in a half."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def room_each(half_bytes: int, world_size: int) -> int:
    """Return the most bytes to each for which a half has room."""
    return half_bytes // world_size // _ALIGNMENT * _ALIGNMENT


@dataclass(frozen=True)
class Lent:
    """What arrived, in memory that the next message may overwrite.

    Args:
        parts: [W] flat, of each rank.
        whole: all of them, one after the other, where they lie so.
    """

    parts: list[Tensor]
    whole: Tensor | None

    def joined(self) -> Tensor:
        """Return all parts in one tensor, in the order of the ranks."""
        return torch.cat(self.parts) if self.whole is None else self.whole

    def with_part(self, rank: int, part: Tensor) -> "Lent":
        """Return these with another part of one rank."""
        return Lent([*self.parts[:rank], part, *self.parts[rank + 1 :]], None)


class _Places(NamedTuple):
    """Where a message is written, in the order of the ranks it goes to, and what arrives."""

    written: list[tuple[int, Tensor]]
    read: Lent


class Mailboxes:
    """One rank's view of all ranks' memory.

    Args:
        rank: this one's number.
        memory: [W] uint8, of each rank, equally long; all ranks can write to all of it.
        wait: until all ranks have come as often; what they wrote before is there then. On a GPU it is only queued, as
            is all that is written.

    Called on: all ranks, in the same order.
    """

    def __init__(self, rank: int, memory: Sequence[Tensor], wait: Callable[[], object]) -> None:
        self._rank, self._memory, self._wait = rank, list(memory), wait
        self._half_bytes = memory[0].numel() // 2
        self._turn = 0
        self._known: dict[tuple[object, ...], _Places] = {}

    def have_room(self, num_bytes: int) -> bool:
        """Return whether a message of at most so many bytes to each fits."""
        return slot_bytes(num_bytes) * len(self._memory) <= self._half_bytes

    def lend(
        self,
        write: Callable[[int, Tensor], object],
        dtype: torch.dtype,
        sizes: Sequence[int],
        arriving: Sequence[int],
        largest: int,
        ranks: Sequence[int],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Lent:
        """Exchange one message; what arrives is there until the next one is sent.

        Args:
            write: writes what a rank gets into a flat tensor of `dtype`, which lies in that rank's memory.
            dtype, sizes, arriving: of the elements for each rank, and from each, [W].
            largest: the most elements any rank sends to any other, known to all ranks alike; there is room for them.
            ranks: those that `write` is called for, and whose parts are of use afterwards.
            meanwhile: what is computed once all is written, while it travels.
        """
        self._turn = 1 - self._turn
        key = (self._turn, dtype, *sizes, *arriving, largest)
        places = self._known.get(key)
        if places is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            places = self._known[key] = self._places(dtype, sizes, arriving, largest)
        for peer, part in places.written:
            if peer in ranks:
                write(peer, part)
        meanwhile()
        self._wait()
        return places.read

    @torch.inference_mode(False)  # what an evaluation views is written to in training, too
    def _places(self, dtype: torch.dtype, sizes: Sequence[int], arriving: Sequence[int], largest: int) -> "_Places":
        item, rank, world_size = dtype.itemsize, self._rank, len(self._memory)
        slot = slot_bytes(largest * item)
        begin = self._turn * self._half_bytes
        start = begin + rank * slot
        peers = ((rank + step) % world_size for step in range(1, world_size + 1))  # not all to one at a time
        written = [
            (peer, self._memory[peer][start : start + sizes[peer] * item].view(dtype)) for peer in peers if sizes[peer]
        ]
        own = self._memory[rank][begin : begin + world_size * slot]
        starts = [source * slot for source in range(world_size)]
        parts = [own[start : start + size * item].view(dtype) for start, size in zip(starts, arriving, strict=True)]
        whole = own.view(dtype) if all(size * item == slot for size in arriving) else None
        return _Places(written, Lent(parts, whole))

    def swap(self, payload: Tensor, sizes: Sequence[int], arriving: Sequence[int], largest: int) -> Tensor:
        """Exchange the pieces of a flat tensor; return what arrives, copied; see `lend`.

        What there is no room for at once goes one part after the other.
        """
        dtype = payload.dtype
        if dtype == torch.uint16:  # which not all kernels know; nothing is computed with it
            payload = payload.view(torch.float16)
        pieces = payload.split_with_sizes(list(sizes))
        others = [rank for rank in range(len(self._memory)) if rank != self._rank]

        def write(rank: int, part: Tensor) -> None:
            part.copy_(pieces[rank])

        if self.have_room(largest * payload.element_size()):
            lent = self.lend(write, payload.dtype, sizes, arriving, largest, others)
            return torch.cat(lent.with_part(self._rank, pieces[self._rank]).parts).view(dtype)
        received = payload.new_empty(sum(arriving))
        into = received.split_with_sizes(list(arriving))
        into[self._rank].copy_(pieces[self._rank])
        step = room_each(self._half_bytes, len(self._memory)) // payload.element_size()
        for first in range(0, largest, step):
            sent, expected = ([min(max(size - first, 0), step) for size in each] for each in (sizes, arriving))
            writes = partial(_write_from, pieces, first)
            lent = self.lend(writes, payload.dtype, sent, expected, min(step, largest - first), others)
            for rank in others:
                into[rank][first : first + step] = lent.parts[rank]
        return received.view(dtype)


def _write_from(pieces: Sequence[Tensor], first: int, rank: int, part: Tensor) -> None:
    part.copy_(pieces[rank][first : first + part.numel()])


class GrowingMailboxes(ABC):
    """Mailboxes as large as messages need.

    Args:
        world_size: W.
        most_bytes: of a message, all ranks' parts for one rank together; twice that is the most memory that is taken.
        in_parts: what is longer goes one part after the other, and not another way.
    """

    def __init__(self, world_size: int, most_bytes: int, *, in_parts: bool) -> None:
        self._world_size, self._most_bytes, self._in_parts = world_size, most_bytes, in_parts
        self._made: Mailboxes | None = None
        self._half_bytes = 0
        #: Whether messages may go this way; no more once a rank could not take memory.
        self.works = True

    def boxes(self, num_bytes: int, agree: Callable[[], object], *, is_lent: bool) -> Mailboxes | None:
        """Return mailboxes for messages of at most so many bytes to each; None: they do not go this way.

        Args:
            num_bytes: known to all ranks alike; all get the same answer.
            agree: raises unless all ranks are doing the same; called before more memory is taken, by all together.
            is_lent: they have to fit as they are.
        """
        if self._in_parts and not is_lent:
            num_bytes = min(num_bytes, room_each(self._most_bytes, self._world_size))
        if not self.fits(num_bytes):
            return None
        needed = slot_bytes(num_bytes) * self._world_size
        if self._made is None or not self._made.have_room(num_bytes):
            agree()
            wanted = max(needed, min(self._half_bytes * 3 // 2, self._most_bytes))
            self._half_bytes = -(-wanted // _GRANULE_BYTES) * _GRANULE_BYTES
            with torch.inference_mode(False):
                self._made = self._make(2 * self._half_bytes)
            self.works = self._made is not None
        return self._made

    def fits(self, num_bytes: int) -> bool:
        """Return whether a message of at most so many bytes to each goes this way as it is."""
        return 0 < slot_bytes(num_bytes) * self._world_size <= self._most_bytes and self.works

    @property
    def num_bytes(self) -> int:
        """Return the bytes of this rank that the others write to."""
        return 2 * self._half_bytes if self._made is not None else 0

    def put(self, made: list[tuple[Tensor, Tensor]]) -> None:
        """Copy into parts that are to be written, within `Mailboxes.lend`; what comes next need not wait for it.

        Args:
            made: parts and what they get; it is emptied.
        """
        for part, values in made:
            part.copy_(values)
        made.clear()

    @abstractmethod
    def _make(self, num_bytes: int) -> Mailboxes | None:
        """Return mailboxes of so many bytes a rank; None: some rank could not have them. All ranks call it together."""

    @abstractmethod
    def give_up(self) -> None:
        """Let this rank go on, whose others may be gone; what was under way is of no use."""
