"""How many tokens each rank has: taken to be as many as before until the ranks have told each other.

Ranks tell each other by way of their processors, which on GPUs takes longer than sending codes. So where the last two
of the same lookups had the same numbers of tokens, the next is begun with those, and the numbers that arrive meanwhile
say whether it stands or is made again. All ranks see the same numbers and have the same past, so all do the same.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from mfdist.sharding.routes.route import LookupArguments
from mfdist.sharding.under_way import Opened

_Made = TypeVar("_Made")
_IDS = {1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}


class TokenCounts:
    """What was learned from the lookups of one table."""

    def __init__(self) -> None:
        self._key: object = None
        self._last: list[int] | None = None
        self._guess: list[int] | None = None

    def make(
        self,
        opened: Opened,
        lookup: LookupArguments,
        dtype: torch.dtype,
        look_up: Callable[[LookupArguments, list[int]], _Made],
    ) -> _Made:
        """Return what a lookup gives.

        Args:
            opened: with the number of this rank's tokens; where this rank has refused, it sends zeros in place of its
                lookup as long as nobody knows.
            lookup: this rank's.
            dtype: of the rows, which decides how much travels.
            look_up: makes a lookup, given everyone's number of tokens, and changes nothing.

        Raises:
            MfdistError: see `Opened.wait`; nothing was learned.
        """
        key = (opened.call, dtype)
        guess = self._guess if opened.exchange.is_hasty and key == self._key else None
        made = None if guess is None else look_up(self._as_guessed(opened, lookup, guess), guess)
        counts = [line[0] for line in opened.wait()]
        self._guess = counts if (key, counts) == (self._key, self._last) else None
        self._key, self._last = key, counts
        return look_up(lookup, counts) if made is None or counts != guess else made

    @staticmethod
    def _as_guessed(opened: Opened, lookup: LookupArguments, guess: list[int]) -> LookupArguments:
        exchange, call = opened.exchange, opened.call
        num_tokens = guess[exchange.rank]
        if opened.refusal is None and num_tokens == lookup.num_tokens:
            return lookup
        # As many bytes as the others count on, whatever dtype or device was refused.
        shape = (num_tokens, call.num_lookups)
        ids = torch.zeros(shape, dtype=_IDS[call.id_bytes], device=exchange.device)
        scores = torch.zeros(shape, dtype=torch.float32, device=exchange.device)
        return LookupArguments(ids, scores, lookup.code_stride, lookup.dtype)
