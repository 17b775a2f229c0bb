"""What is under way in an exchange: the tags of a call, payloads, and what goes wrong with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfdist.errors import ConsistencyError, MfdistError
from mfdist.sharding.packing import places_of
from mfdist.sharding.tags import TAG_SIZE, Call, check_tags

if TYPE_CHECKING:
    from mfdist.sharding.exchange import Exchange

_REFUSED = TAG_SIZE
#: What is longer to one rank goes another way, since libraries count in 32 bits: between CPUs in such pieces.
MAX_MESSAGE_BYTES = 1 << 30


@dataclass(kw_only=True)
class Opened:
    """A call whose tags are under way."""

    exchange: "Exchange"
    call: Call
    number: int
    sent: Tensor
    received: Tensor
    refusal: MfdistError | None
    _work: Any = None
    _counts: list[list[int]] | None = None

    def start(self) -> None:
        """Send the tags, once; `wait` and the call's first payload do it too."""
        if self._work is not None:
            return
        with explained(self):
            self._work = self.exchange.start_tags(self.received, self.sent)

    def wait(self) -> list[list[int]]:
        """Return the counts of each rank; waiting again gives them again.

        Raises:
            MfdistError: the refusal this rank gave.
            ConsistencyError: a rank does something else, or refused.
            UnavailableError: a rank did not come before the deadline.
        """
        if self._counts is not None:
            return self._counts
        self.start()
        with explained(self):
            self._work.wait()
        lines = self.received.tolist()
        exchange = self.exchange
        tags = {exchange.ranks[index]: line[:TAG_SIZE] for index, line in enumerate(lines)}
        check_tags(self.call, self.number, tags, exchange.ranks[exchange.rank], exchange.names)
        if self.refusal is not None:
            raise self.refusal
        refused = [exchange.ranks[index] for index, line in enumerate(lines) if line[_REFUSED]]
        if refused:
            raise ConsistencyError(
                f"all ranks must be able to make {self.told}; rank {refused[0]} refused it; see the error there"
            )
        self._counts = [line[_REFUSED + 1 :] for line in lines]
        return self._counts

    @property
    def told(self) -> str:
        """Return the call as messages name it."""
        return self.call.told(self.number)


@dataclass(kw_only=True)
class Pending:
    """A payload that is under way."""

    exchange: "Exchange"
    opened: Opened
    received: Tensor
    is_beside: bool
    _works: list[Any] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list)  # until it has been sent
    _scattered: list[tuple[Tensor, list[tuple[int, int]]]] = field(default_factory=list)

    def start(self, sent: Tensor, arriving: Sequence[int], sizes: Sequence[int], largest: int) -> None:
        """Begin the all-to-alls of a flat tensor; see `Exchange.send`."""
        step = max(1, MAX_MESSAGE_BYTES // sent.element_size())
        if largest <= step:
            self._start(self.exchange.start_swap, self.received, sent, arriving, sizes)
        elif sent.is_cuda:
            self._start(self.exchange.start_large_swap, self.received, sent, arriving, sizes)
        else:
            for first in range(0, largest, step):
                places, into_places = [places_of(part, first, step) for part in (sizes, arriving)]
                piece = torch.cat([sent[begin:end] for begin, end in places])
                into = sent.new_empty(sum(end - begin for begin, end in into_places))
                lengths = [[end - begin for begin, end in part] for part in (into_places, places)]
                self._start(self.exchange.start_swap, into, piece, *lengths)
                self._scattered.append((into, into_places))

    def _start(
        self,
        swap: Callable[..., Any],
        received: Tensor,
        sent: Tensor,
        arriving: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        self._kept.append(sent)
        with explained(self.opened):
            work = swap(received, sent, arriving, sizes, is_beside=self.is_beside)
        if self.is_beside:
            self._works.append(work)
        self.opened.start()

    def wait(self) -> Tensor:
        """Return what arrived, once; on a GPU the stream waits and not the caller.

        Raises:
            UnavailableError, ConsistencyError: see `Opened.wait`.
        """
        with explained(self.opened):
            for work in self._works:
                work.wait()
        for piece, places in self._scattered:
            for part, (begin, end) in zip(
                piece.split_with_sizes([end - begin for begin, end in places]), places, strict=True
            ):
                self.received[begin:end] = part
        self._kept.clear()
        return self.received


@dataclass(frozen=True)
class PendingParts:
    """Several tensors that are under way in one message."""

    arrived: Callable[[], list[Tensor]]

    def wait(self) -> list[Tensor]:
        """Return what arrived of each part, once; see `Pending.wait`."""
        return self.arrived()


@dataclass(frozen=True)
class explained:
    """Turns what torch.distributed raises into an error that names ranks and calls."""

    opened: Opened
    kind: type[RuntimeError] = RuntimeError

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and isinstance(error, self.kind) and not isinstance(error, MfdistError):
            raise self.opened.exchange.explain(self.opened.told, error) from error
