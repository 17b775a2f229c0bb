"""Several tensors in one message to each rank, their bytes one after the other. Pure; no collectives.

What a rank has for itself is not packed; it is handed back as it is. W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

#: Each piece begins at a multiple of it, so that what arrives can be viewed in any dtype, and is copied by words.
WORD_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor that travels together with others.

    Args:
        pieces: [W] flat, contiguous, of one dtype: what each rank gets; several ranks may get the same tensor.
        arriving: elements from each rank, whose `pieces` must have as many.
        largest: the most elements any rank has for any other, known to all ranks alike.
    """

    pieces: Sequence[Tensor]
    arriving: Sequence[int]
    largest: int

    @classmethod
    def cut(cls, values: Tensor, sizes: Sequence[int], arriving: Sequence[int], largest: int) -> Self:
        """Return the part that gives each rank so many elements of a flat tensor, one rank's after the other's."""
        return cls(pieces=values.split_with_sizes(list(sizes)), arriving=arriving, largest=largest)

    @property
    def dtype(self) -> torch.dtype:
        """Return what the pieces are of."""
        return self.pieces[0].dtype

    @property
    def largest_words(self) -> int:
        """Return the most words any rank has for any other."""
        return _words(self.largest * self.dtype.itemsize)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Messages to all ranks but one's own.

    Args:
        pieces: [W], of which each message consists, all in words or all in bytes.
        nothing: a message without words.
        sizes: [W] words to each rank.
        arriving: [W] words from each rank.
        payload_bytes: [W] of `sizes`, without what fills up words.
    """

    pieces: list[list[Tensor]]
    nothing: Tensor
    sizes: list[int]
    arriving: list[int]
    payload_bytes: list[int]

    @property
    def num_filling_bytes(self) -> int:
        """Return how many bytes only fill up words."""
        return sum(self.sizes) * WORD_BYTES - sum(self.payload_bytes)

    def write(self, rank: int, words: Tensor) -> None:
        """Write a message that is not empty."""
        _write(self.pieces[rank], words)

    def joined(self) -> Tensor:
        """Return the messages one after the other."""
        words = self.nothing.new_empty(sum(self.sizes))
        _write([piece for message in self.pieces for piece in message], words)
        return words


def pack(parts: Sequence[Part], own: int) -> Packed:
    """Return what this rank, the `own`-th, sends to each of the others; nothing is copied yet."""
    ranks = range(len(parts[0].pieces))
    num_bytes = [[0 if rank == own else part.pieces[rank].nbytes for part in parts] for rank in ranks]
    arriving = [
        sum(_words(part.arriving[rank] * part.dtype.itemsize) for part in parts) if rank != own else 0 for rank in ranks
    ]
    nothing = parts[0].pieces[own].new_empty(0, dtype=torch.int64)
    pieces = [[] if rank == own else [part.pieces[rank].detach() for part in parts] for rank in ranks]
    if all(_is_whole(piece) for message in pieces for piece in message):
        pieces = [[piece.view(torch.int64) for piece in message] for message in pieces]
    else:
        filling = nothing.new_zeros(WORD_BYTES, dtype=torch.uint8)
        pieces = [
            [each for piece in message for each in (piece.view(torch.uint8), filling[: -piece.nbytes % WORD_BYTES])]
            for message in pieces
        ]
    return Packed(
        pieces=pieces,
        nothing=nothing,
        sizes=[sum(map(_words, line)) for line in num_bytes],
        arriving=arriving,
        payload_bytes=[sum(line) for line in num_bytes],
    )


def _write(pieces: list[Tensor], words: Tensor) -> None:
    if pieces:
        torch.cat(pieces, out=words.view(pieces[0].dtype))


def unpack(messages: Sequence[Tensor], parts: Sequence[Part], own: int, *, is_lent: bool = False) -> list[Tensor]:
    """Return each part's elements from all ranks, in their order.

    Args:
        messages: [W] words, from each rank.
        parts: of which this rank, the `own`-th, has its own pieces.
        own: its number.
        is_lent: the messages will be overwritten; else they may be viewed and not copied, as this rank's pieces may.
    """
    found: list[list[Tensor]] = [[] for _ in parts]
    for rank, message in enumerate(messages):
        arrived, begin = message.view(torch.uint8), 0
        for part, pieces in zip(parts, found, strict=True):
            if rank == own:
                pieces.append(part.pieces[own].detach())
                continue
            size = part.arriving[rank] * part.dtype.itemsize
            pieces.append(arrived[begin : begin + size].view(part.dtype))
            begin += _words(size) * WORD_BYTES
    return [_joined(pieces, own, is_lent=is_lent) for pieces in found]


def _joined(pieces: list[Tensor], own: int, *, is_lent: bool) -> Tensor:
    filled = [rank for rank, piece in enumerate(pieces) if piece.numel()]
    if len(filled) > 1:
        return torch.cat([pieces[rank] for rank in filled])
    only = filled[0] if filled else own
    return pieces[only].clone() if is_lent and only != own else pieces[only]


def _words(num_bytes: int) -> int:
    return -(-num_bytes // WORD_BYTES)


def _is_whole(piece: Tensor) -> bool:
    """Return whether a piece is of whole words that lie as words do."""
    return not piece.nbytes % WORD_BYTES and not piece.storage_offset() * piece.element_size() % WORD_BYTES


def columns_apart(values: Tensor, begin: int, end: int) -> Tensor:
    """Return columns [begin, end) of [n, D], contiguous; copied, if they are, by words where they consist of such."""
    each = WORD_BYTES // values.element_size()
    is_whole = values.numel() > 0 and values.is_contiguous() and _is_whole(values)
    if begin % each or end % each or values.shape[1] % each or not is_whole:
        return values[:, begin:end].contiguous()
    return values.view(torch.int64)[:, begin // each : end // each].contiguous().view(values.dtype)


def places_of(sizes: Sequence[int], first: int, step: int) -> list[tuple[int, int]]:
    """Return where [first, first + step) of each part lies, the parts lying one after the other."""
    places, start = [], 0
    for size in sizes:
        places.append((start + min(first, size), start + min(first + step, size)))
        start += size
    return places
