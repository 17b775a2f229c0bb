"""The exchange between ranks: the only place where collectives are called.

Order of a call, on every rank of the group alike:

    opened = exchange.open(call, counts)      # sizes and tags, over the CPU's network
    opened.wait()                             # → what the others' counts are; a tag that differs is an error
    pending = exchange.send(...)              # an all-to-all that is under way; compute meanwhile
    pending.wait()                            # → what arrived
    exchange.swap(...)                        # the same at once, where there is nothing to compute meanwhile

A collective takes a start whatever it carries, so tensors that are there together go by one: `send_together`. Any
number of sends may be under way; they end in the order they were begun. Every wait ends: after the deadline it raises
an error that names the ranks that are not there. After such an error the group is of no further use.

W ranks. All calls are for the thread that runs the model, forward or backward.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfdist.errors import ConfigError, ConsistencyError, MfdistError
from mfdist.sharding.packing import Part, pack, unpack
from mfdist.sharding.peer_memory import PeerMemory, reach_each_other
from mfdist.sharding.sent import Sent, Traffic
from mfdist.sharding.silence import explain_silence
from mfdist.sharding.tags import TAG_SIZE, Call, check_tags

#: Numbers that travel with a tag besides it.
NUM_COUNTS = 6
#: A message to one rank is split into pieces of at most so many bytes, for libraries that count in 32 bits.
_MAX_MESSAGE_BYTES = 1 << 30
_REFUSED = TAG_SIZE


class Exchange:
    """All-to-alls among some ranks, tagged, counted, and with an end to every wait.

    Args:
        ranks: global ranks that take part, ascending.
        device: where the payload lies; NCCL carries it on a GPU, gloo on a CPU, and tags always travel by gloo.
        deadline_s: longest wait for the slowest rank.
        chunk_bytes: payload that is worth a chunk of its own, so that it travels while the next is computed; by default
            256 MiB on a GPU, whose links take longer for that than another collective takes to begin, and no chunks on
            a CPU, which has no cores to spare.
        uses_peer_memory: GPUs of one host that reach each other read each other's memory where there is nothing to
            compute meanwhile, up to `mfdist.sharding.peer_memory.MOST_BYTES`; otherwise NCCL carries it.

    Called on: all of `ranks`, in the same order for all exchanges of a process.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        device: torch.device,
        *,
        deadline_s: float = 300.0,
        chunk_bytes: int | None = None,
        uses_peer_memory: bool = True,
    ) -> None:
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.world_size = len(self.ranks)
        self.deadline_s = deadline_s
        self.traffic = Traffic()
        #: Payloads whose sizes are known, or as good as known, are queued first, and then the tags are sent: a GPU is
        #: at work meanwhile. A CPU would wait for the payload.
        self.is_hasty = device.type == "cuda"
        self._chunk_bytes = chunk_bytes if chunk_bytes or device.type == "cpu" else 256 << 20
        self._names: dict[str, None] = {}
        self._num_calls = 0
        self._control = self._new_group("gloo", deadline_s)
        # NCCL's own deadline ends the process without a word; the tags' comes first and names who is late.
        self._payload = self._control if device.type == "cpu" else self._new_group("nccl", 2 * deadline_s)
        self._peers: PeerMemory | None = None
        if uses_peer_memory and self.world_size > 1 and reach_each_other(device, self._control):
            self._peers = PeerMemory(self._payload, self._control, device, 2 * deadline_s)

    def _new_group(self, backend: str, timeout_s: float) -> Any:
        is_part = self.world_size < dist.get_world_size()
        return dist.new_group(
            list(self.ranks),
            timeout=timedelta(seconds=timeout_s),
            backend=backend,
            use_local_synchronization=is_part,
        )

    def know(self, *names: str) -> None:
        """Remember names of tables and kinds, so that errors can name what other ranks do."""
        self._names.update(dict.fromkeys(names))

    def num_chunks(self, num_bytes: int) -> int:
        """Return into how many chunks a payload of so many bytes is worth splitting."""
        return 1 if self._chunk_bytes is None else min(8, max(1, num_bytes // self._chunk_bytes))

    def open(
        self, call: Call, counts: Sequence[Sequence[int]] | Sequence[int] = (), *, refusal: MfdistError | None = None
    ) -> "Opened":
        """Tell all ranks what this one does, and how much.

        Args:
            call: what every rank must be doing.
            counts: up to `NUM_COUNTS` numbers for all ranks, or a list of them for each rank.
            refusal: why this rank cannot take part; it is raised here and makes the call an error everywhere.

        Returns:
            A handle; nothing was waited for.
        """
        self.know(call.table, call.kind)
        number = self._num_calls
        self._num_calls += 1
        each = counts if counts and isinstance(counts[0], Sequence) else [counts] * self.world_size
        head = [*call.encode(number), int(refusal is not None)]
        lines = [[*head, *line, *[0] * (NUM_COUNTS - len(line))] for line in each]  # type: ignore[misc, arg-type]
        sent = torch.tensor(lines, dtype=torch.int64, device="cpu")
        received = torch.empty_like(sent)
        self.traffic.control_bytes += sent.nbytes // self.world_size * (self.world_size - 1)
        opened = Opened(exchange=self, call=call, number=number, sent=sent, received=received, refusal=refusal)
        if not self.is_hasty:
            opened.start()
        return opened

    def agree(self, what: str, text: str) -> None:
        """Raise unless all ranks give the same text.

        Args:
            what: the text is, as the error names it.
            text: compared by its digest; sent only where they differ, to show how.

        Raises:
            ConfigError: a rank has another one; the message shows the first line that differs.
        """
        digest = hashlib.blake2b(text.encode(), digest_size=32).digest()
        words = [int.from_bytes(digest[start : start + 7], "little") for start in range(0, 28, 7)]
        call = Call(table="", kind=what, phase="check")
        everyones = [line[:4] for line in self.open(call, words).wait()]
        if all(theirs == words for theirs in everyones):
            return
        payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        opened = self.open(call, [payload.numel()])
        sizes = [line[0] for line in opened.wait()]
        sent = [payload.numel()] * self.world_size
        texts = (
            self.send(opened, payload.repeat(self.world_size), sent, sizes, max(sizes)).wait().split_with_sizes(sizes)
        )
        rank = next(rank for rank, theirs in enumerate(everyones) if theirs != words)
        theirs, own = (bytes(part.tolist()).decode().splitlines() for part in (texts[rank], payload))
        pairs = itertools.zip_longest(own, theirs, fillvalue="nothing")
        here, there = next(((one, other) for one, other in pairs if one != other), ("", ""))
        raise ConfigError(
            f"all ranks must have the same {what}; got {here.strip()!r} on rank {self.ranks[self.rank]} and "
            f"{there.strip()!r} on rank {self.ranks[rank]}; start all ranks with one configuration"
        )

    def send(
        self,
        opened: "Opened",
        payload: Tensor,
        sizes: Sequence[int],
        arriving: Sequence[int],
        largest: int,
        *,
        is_beside: bool = True,
    ) -> "Pending":
        """Send each rank its part of a flat tensor, and get theirs.

        Args:
            opened: the call this belongs to; its tags may still be under way.
            payload: contiguous, the parts one after the other; not to be written to before the wait.
            sizes: elements for each rank; they add up to the payload.
            arriving: elements from each rank, whose `sizes` must say the same.
            largest: the most elements any rank sends to any other, known to all ranks alike.
            is_beside: there is something to compute meanwhile; otherwise see `swap`.

        Returns:
            A handle whose `wait` gives a flat tensor of the payload's dtype, in the order of the ranks.
        """
        payload = payload.reshape(-1)
        self._count(opened.call.phase, [size * payload.element_size() for size in sizes])
        return self._send(opened, payload, sizes, arriving, largest, is_beside)

    def swap(
        self, opened: "Opened", payload: Tensor, sizes: Sequence[int], arriving: Sequence[int], largest: int
    ) -> Tensor:
        """Return what arrives; see `send`. On a GPU it runs in the stream itself, where it begins sooner."""
        return self.send(opened, payload, sizes, arriving, largest, is_beside=False).wait()

    def send_together(self, opened: "Opened", parts: Sequence[Part], *, is_beside: bool = True) -> "PendingParts":
        """Send each rank its pieces of several tensors in one message, and get theirs.

        Args:
            opened: the call this belongs to; its tags may still be under way.
            parts: the tensors, the same number of them on all ranks; they may be written to afterwards.
            is_beside: compute meanwhile; otherwise it is as quick as `swap`.

        Returns:
            A handle whose `wait` gives for each part a flat tensor, in the order of the ranks. What stays here is not
            copied where nothing else is there, so that it may be the piece itself.
        """
        packed = pack(parts, self.rank)
        self._count(opened.call.phase, packed.payload_bytes)
        self.traffic.control_bytes += packed.words.nbytes - sum(packed.payload_bytes)
        largest = sum(part.largest_words for part in parts)
        pending = self._send(opened, packed.words, packed.sizes, packed.arriving, largest, is_beside)
        return PendingParts(pending, tuple(parts))

    def _send(
        self,
        opened: "Opened",
        payload: Tensor,
        sizes: Sequence[int],
        arriving: Sequence[int],
        largest: int,
        is_beside: bool,
    ) -> "Pending":
        if self.traffic.sends is not None:
            self.traffic.sends.append(Sent(payload.dtype, list(sizes), list(arriving), largest))
        received = payload.new_empty(sum(arriving))
        pending = Pending(exchange=self, opened=opened, received=received, is_beside=is_beside)
        if not is_beside and payload.is_cuda and self._peers is not None:
            with _explained(opened):
                is_carried = self._peers.has_room(largest * payload.element_size(), opened.wait)
                if is_carried:
                    self._peers.swap(received, payload, arriving, sizes, largest)
                    opened.start()
            if is_carried:
                return pending
        step = max(1, _MAX_MESSAGE_BYTES // payload.element_size())
        if largest <= step:
            pending.start(received, payload, arriving, sizes)
            return pending
        for first in range(0, largest, step):
            pieces = [_pieces(part, first, step) for part in (sizes, arriving)]
            piece = torch.cat([payload[begin:end] for begin, end in pieces[0]])
            into = payload.new_empty(sum(end - begin for begin, end in pieces[1]))
            pending.start(into, piece, *[[end - begin for begin, end in part] for part in reversed(pieces)])
            pending.scatter(into, pieces[1])
        return pending

    def _count(self, phase: str, sizes: Sequence[int]) -> None:
        others = [size for rank, size in enumerate(sizes) if rank != self.rank and size]
        self.traffic.num_bytes[phase] += sum(others)
        self.traffic.num_messages += sum(-(-size // _MAX_MESSAGE_BYTES) for size in others)

    def _swap(
        self, received: Tensor, sent: Tensor, arriving: Sequence[int], sizes: Sequence[int], *, is_beside: bool = True
    ) -> Any:
        group = self._payload if sent.is_cuda else self._control
        if sent.dtype == torch.uint16:  # which neither backend knows; nothing is computed with it
            received, sent = received.view(torch.float16), sent.view(torch.float16)
        return dist.all_to_all_single(received, sent, list(arriving), list(sizes), group=group, async_op=is_beside)

    def _explain(self, told: str, cause: BaseException) -> MfdistError:
        return explain_silence(told, self.ranks, cause, self.deadline_s)


@dataclass(kw_only=True)
class Opened:
    """A call whose tags are under way."""

    exchange: Exchange
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
        ones = [1] * self.exchange.world_size
        with _explained(self):
            self._work = self.exchange._swap(self.received, self.sent, ones, ones)

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
        with _explained(self):
            self._work.wait()
        lines = self.received.tolist()
        exchange = self.exchange
        tags = {exchange.ranks[index]: line[:TAG_SIZE] for index, line in enumerate(lines)}
        check_tags(self.call, self.number, tags, exchange.ranks[exchange.rank], tuple(exchange._names))
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

    exchange: Exchange
    opened: Opened
    received: Tensor
    is_beside: bool
    _works: list[Any] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list)  # until it has been sent
    _scattered: list[tuple[Tensor, list[tuple[int, int]]]] = field(default_factory=list)

    def start(self, received: Tensor, sent: Tensor, arriving: Sequence[int], sizes: Sequence[int]) -> None:
        """Begin one all-to-all."""
        self._kept.append(sent)
        with _explained(self.opened):
            work = self.exchange._swap(received, sent, arriving, sizes, is_beside=self.is_beside)
        if self.is_beside:
            self._works.append(work)
        self.opened.start()

    def scatter(self, piece: Tensor, places: list[tuple[int, int]]) -> None:
        """Remember where a piece belongs once it is there."""
        self._scattered.append((piece, places))

    def wait(self) -> Tensor:
        """Return what arrived, once; on a GPU the stream waits and not the caller.

        Raises:
            UnavailableError, ConsistencyError: see `Opened.wait`.
        """
        with _explained(self.opened):
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

    pending: Pending
    parts: tuple[Part, ...]

    def wait(self) -> list[Tensor]:
        """Return what arrived of each part, once; see `Pending.wait`."""
        return unpack(self.pending.wait(), self.parts, self.pending.exchange.rank)


@dataclass(frozen=True)
class _explained:
    """Turns what torch.distributed raises into an error that names ranks and calls."""

    opened: Opened

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and isinstance(error, RuntimeError) and not isinstance(error, MfdistError):
            raise self.opened.exchange._explain(self.opened.told, error) from error


def _pieces(sizes: Sequence[int], first: int, step: int) -> list[tuple[int, int]]:
    """Return where [first, first + step) of each part lies, the parts lying one after the other."""
    places, start = [], 0
    for size in sizes:
        places.append((start + min(first, size), start + min(first + step, size)))
        start += size
    return places
