"""The exchange between ranks: the only place where messages are sent, by collectives or by peer memory.

Order of a call, on every rank of the group alike:

    opened = exchange.open(call, counts)      # sizes and tags, over the CPU's network
    opened.wait()                             # → what the others' counts are; a tag that differs is an error
    pending = exchange.send(...)              # an all-to-all that is under way; compute meanwhile
    pending.wait()                            # → what arrived
    exchange.swap(...)                        # the same at once, where there is nothing to compute meanwhile
    exchange.lend(...)                        # the same without copies: it is there until the next message

A collective takes a start whatever it carries, so tensors that are there together go by one: `send_together`. Any
number of sends may be under way; they end in the order they were begun. Every wait ends: after the deadline it raises
an error that names the ranks that are not there. After such an error the group is of no further use.

W ranks. All calls are for the thread that runs the model, forward or backward.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mfdist.errors import MfdistError
from mfdist.sharding.host_memory import HostMemory
from mfdist.sharding.mailboxes import GrowingMailboxes, Lent, Mailboxes
from mfdist.sharding.packing import WORD_BYTES, Part, pack, unpack
from mfdist.sharding.peer_memory import PeerMemory, reach_each_other
from mfdist.sharding.sent import Sent, Traffic
from mfdist.sharding.silence import explain_silence
from mfdist.sharding.tag_links import LinkError, check_alike, connect
from mfdist.sharding.tags import Call
from mfdist.sharding.under_way import MAX_MESSAGE_BYTES, Opened, Pending, PendingParts, explained

#: Numbers that travel with a tag besides it.
NUM_COUNTS = 6
#: How much longer than for tags, which name who is late, GPUs wait for each other.
_SPARE_S = 30.0


class Exchange:
    """All-to-alls among some ranks, tagged, counted, and with an end to every wait.

    Args:
        ranks: global ranks that take part, ascending.
        device: where the payload lies. Between ranks of one host tags go by sockets, otherwise by gloo.
        deadline_s: longest wait for the slowest rank.
        chunk_bytes: payload that is worth a chunk of its own, so that it travels while the next is computed; by default
            256 MiB on a GPU, whose links take longer for that than another collective takes to begin, and no chunks on
            a CPU, which has no cores to spare.
        uses_peer_memory: ranks of one host write messages into each other's memory. Between GPUs, NCCL carries what is
            longer than `mfdist.sharding.peer_memory.MOST_BYTES`, what is sent to be waited for later, and everything
            where they do not reach each other.

    Raises:
        ConfigError: another rank has other `chunk_bytes` or `uses_peer_memory`.

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
        self.device = device
        self.deadline_s = deadline_s
        self.traffic = Traffic()
        #: Payloads whose sizes are known, or as good as known, are queued first, and then the tags are sent: a GPU is
        #: at work meanwhile. A CPU would wait for the payload.
        self.is_hasty = device.type == "cuda"
        self._chunk_bytes = chunk_bytes if chunk_bytes or device.type == "cpu" else 256 << 20
        self._names: dict[str, None] = {}
        self._num_calls = 0
        self._control = self._new_group("gloo", deadline_s)
        check_alike((self._chunk_bytes, uses_peer_memory), "chunk_bytes and uses_peer_memory", self._control)
        # NCCL's own deadline ends the process without a word; the tags' comes first and names who is late.
        self._payload = self._control if device.type == "cpu" else self._new_group("nccl", 2 * deadline_s)
        self._tag_links = connect(self._control)
        self._memory: GrowingMailboxes | None = None
        if uses_peer_memory and device.type == "cpu" and self._tag_links is not None:
            self._memory = HostMemory(self._tag_links, deadline_s)
        elif uses_peer_memory and self.world_size > 1 and reach_each_other(device, self._control):
            self._memory = PeerMemory(self._payload, self._control, device, deadline_s + _SPARE_S)

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

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names that `know` was given."""
        return tuple(self._names)

    @property
    def has_peer_memory(self) -> bool:
        """Return whether messages may go by memory of the others, that of GPUs or, on CPUs, of their host."""
        return self._memory is not None and self._memory.works

    def lends(self, num_bytes: int) -> bool:
        """Return whether a message of at most so many bytes to each goes by memory of the others."""
        return self._memory is not None and self._memory.fits(num_bytes)

    @property
    def mailbox_bytes(self) -> int:
        """Return the bytes of this rank that the others write to, which plans do not count."""
        return 0 if self._memory is None else self._memory.num_bytes

    def num_chunks(self, num_bytes: int) -> int:
        """Return into how many chunks a payload of so many bytes is worth splitting."""
        return 1 if self._chunk_bytes is None else min(8, max(1, num_bytes // self._chunk_bytes))

    def open(
        self, call: Call, counts: Sequence[Sequence[int]] | Sequence[int] = (), *, refusal: MfdistError | None = None
    ) -> Opened:
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
        sent = torch.from_numpy(np.array(lines, np.int64))  # which torch would take three times as long to read
        received = torch.empty_like(sent)
        self.traffic.control_bytes += sent.nbytes // self.world_size * (self.world_size - 1)
        opened = Opened(exchange=self, call=call, number=number, sent=sent, received=received, refusal=refusal)
        if not self.is_hasty:
            opened.start()
        return opened

    def send(
        self,
        opened: Opened,
        payload: Tensor,
        sizes: Sequence[int],
        arriving: Sequence[int],
        largest: int,
        *,
        is_beside: bool = True,
    ) -> Pending:
        """Send each rank its part of a flat tensor, and get theirs.

        Args:
            opened: the call this belongs to; its tags may still be under way.
            payload: contiguous, the parts one after the other; not to be written to before the wait.
            sizes: elements for each rank; they add up to the payload.
            arriving: elements from each rank, whose `sizes` must say the same.
            largest: the most elements any rank sends to any other, known to all ranks alike.
            is_beside: there is something to compute meanwhile, on all ranks alike; otherwise see `swap`.

        Returns:
            A handle whose `wait` gives a flat tensor of the payload's dtype, in the order of the ranks.
        """
        payload = payload.reshape(-1)
        self._count(opened.call.phase, [size * payload.element_size() for size in sizes])
        return self._send(opened, payload, sizes, arriving, largest, is_beside)

    def swap(
        self, opened: Opened, payload: Tensor, sizes: Sequence[int], arriving: Sequence[int], largest: int
    ) -> Tensor:
        """Return what arrives; see `send`. On a GPU it runs in the stream itself, where it begins sooner."""
        payload = payload.reshape(-1)
        self._count(opened.call.phase, [size * payload.element_size() for size in sizes])
        return self._send(opened, payload, sizes, arriving, largest, is_beside=False).wait()

    def lend(
        self,
        opened: Opened,
        write: Callable[[int, Tensor], object],
        dtype: torch.dtype,
        sizes: Sequence[int],
        arriving: Sequence[int],
        largest: int,
        *,
        own: Tensor | None = None,
        payload_bytes: Sequence[int] | None = None,
    ) -> Lent:
        """Send each rank what is written for it, and get theirs, which the exchange's next message may overwrite.

        GPUs that reach each other write it where it is to be read; otherwise it is a `swap`.

        Args:
            opened: the call this belongs to; its tags may still be under way.
            write: writes what a rank gets into a flat tensor of `dtype`.
            dtype, sizes, arriving, largest: see `send`.
            own: flat, what stays here, where it need not lie beside what arrives; otherwise it is written too. All
                ranks give one, or none does.
            payload_bytes: [W] of `sizes`, where not all of it is payload.

        Returns:
            What arrived; it is to be used, or the use queued in the same stream, before anything else is sent.
        """
        ranks = [rank for rank in range(self.world_size) if own is None or rank != self.rank]
        self._count(opened.call.phase, payload_bytes or [size * dtype.itemsize for size in sizes])
        boxes = self._boxes(opened, largest * dtype.itemsize, is_lent=True)
        if boxes is not None:
            self._note(Sent(dtype, list(sizes), list(arriving), largest, is_lent=True, has_own=own is not None))
            with explained(opened, LinkError):
                lent = boxes.lend(write, dtype, sizes, arriving, largest, ranks)
            opened.start()
            return lent if own is None else lent.with_part(self.rank, own)
        sent = [size if rank in ranks else 0 for rank, size in enumerate(sizes)]
        expected = [size if rank in ranks else 0 for rank, size in enumerate(arriving)]
        payload = torch.empty(sum(sent), dtype=dtype, device=self.device)
        for rank, part in enumerate(payload.split_with_sizes(sent)):
            if part.numel():
                write(rank, part)
        received = self._send(opened, payload, sent, expected, largest, is_beside=False).wait()
        lent = Lent(list(received.split_with_sizes(expected)), received)
        return lent if own is None else lent.with_part(self.rank, own)

    def lend_pieces(
        self, opened: Opened, payload: Tensor, sizes: Sequence[int], arriving: Sequence[int], largest: int
    ) -> list[Tensor]:
        """Send each rank its piece of a flat tensor; return theirs and this rank's own, each flat; see `lend`."""
        pieces = payload.split_with_sizes(list(sizes))
        if self._memory is None:
            return list(self.swap(opened, payload, sizes, arriving, largest).split_with_sizes(list(arriving)))

        def write(rank: int, part: Tensor) -> None:
            part.copy_(pieces[rank])

        return self.lend(opened, write, payload.dtype, sizes, arriving, largest, own=pieces[self.rank]).parts

    def lend_made(
        self,
        opened: Opened,
        make: Callable[[int], Tensor],
        dtype: torch.dtype,
        sizes: Sequence[int],
        arriving: Sequence[int],
        largest: int,
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> Lent:
        """Send each rank what is made for it, this rank's own last, and get theirs; see `lend`.

        Where GPUs reach each other one part travels while the next is made, or all of them beside `meanwhile`.

        Args:
            opened, dtype, sizes, arriving, largest: see `lend`.
            make: returns what a rank gets, contiguous and of `dtype`; called for this rank, and for each that gets any.
            meanwhile: what is computed once all is made; then this rank's own part lies beside what arrives.
        """
        self._count(opened.call.phase, [size * dtype.itemsize for size in sizes])
        boxes = self._boxes(opened, largest * dtype.itemsize, is_lent=True)
        if boxes is None:
            payload = torch.cat([make(rank).view(-1) for rank in range(self.world_size)])
            pending = self._send(opened, payload, sizes, arriving, largest, is_beside=meanwhile is not None)
            if meanwhile is not None:
                meanwhile()
            received = pending.wait()
            return Lent(list(received.split_with_sizes(list(arriving))), received)
        assert self._memory is not None
        put, made, own = self._memory.put, [], []
        ranks = [rank for rank in range(self.world_size) if meanwhile is not None or rank != self.rank]

        def write(rank: int, part: Tensor) -> None:
            made.append((part, make(rank).view(-1)))
            if meanwhile is None:
                put(made)

        def compute() -> None:
            if meanwhile is None:
                own.append(make(self.rank).view(-1))
            else:
                put(made)  # together, which takes a host less time, and GPUs no more beside so much
                meanwhile()

        has_own = meanwhile is None
        self._note(Sent(dtype, list(sizes), list(arriving), largest, is_lent=True, has_own=has_own))
        with explained(opened, LinkError):
            lent = boxes.lend(write, dtype, sizes, arriving, largest, ranks, compute)
        opened.start()
        return lent.with_part(self.rank, own[0]) if has_own else lent

    def send_together(self, opened: Opened, parts: Sequence[Part], *, is_beside: bool = True) -> PendingParts:
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
        self.traffic.control_bytes += packed.num_filling_bytes
        largest = sum(part.largest_words for part in parts)
        numbers = (packed.sizes, packed.arriving, largest)
        if not is_beside and self.lends(largest * WORD_BYTES):
            own, sent_bytes = packed.nothing, packed.payload_bytes
            lent = self.lend(opened, packed.write, own.dtype, *numbers, own=own, payload_bytes=sent_bytes)
            found = unpack(lent.parts, parts, self.rank, is_lent=True)
            return PendingParts(lambda: found)
        self._count(opened.call.phase, packed.payload_bytes)
        pending = self._send(opened, packed.joined(), *numbers, is_beside)
        return PendingParts(lambda: unpack(pending.wait().split_with_sizes(packed.arriving), parts, self.rank))

    def _send(
        self,
        opened: Opened,
        payload: Tensor,
        sizes: Sequence[int],
        arriving: Sequence[int],
        largest: int,
        is_beside: bool,
    ) -> Pending:
        self._note(Sent(payload.dtype, list(sizes), list(arriving), largest))
        is_alone = payload.device.type == self.device.type and not (is_beside and self.is_hasty)
        boxes = self._boxes(opened, largest * payload.element_size(), is_lent=False) if is_alone else None
        if boxes is not None:
            with explained(opened, LinkError):
                received = boxes.swap(payload, sizes, arriving, largest)
            opened.start()
            return Pending(exchange=self, opened=opened, received=received, is_beside=False)
        received = payload.new_empty(sum(arriving))
        pending = Pending(exchange=self, opened=opened, received=received, is_beside=is_beside)
        pending.start(payload, arriving, sizes, largest)
        return pending

    def _boxes(self, opened: Opened, num_bytes: int, *, is_lent: bool) -> Mailboxes | None:
        """Return what carries a message of at most so many bytes to each; None: a collective."""
        if self._memory is None:
            return None
        if not self.is_hasty:
            opened.wait()  # all ranks do the same, and wait for each other's writing as often
        with explained(opened):
            return self._memory.boxes(num_bytes, opened.wait, is_lent=is_lent)

    def _note(self, sent: Sent) -> None:
        if self.traffic.sends is not None:
            self.traffic.sends.append(sent)

    def _count(self, phase: str, sizes: Sequence[int]) -> None:
        others = [size for rank, size in enumerate(sizes) if rank != self.rank and size]
        self.traffic.num_bytes[phase] += sum(others)
        self.traffic.num_messages += sum(-(-size // MAX_MESSAGE_BYTES) for size in others)

    def start_tags(self, received: Tensor, sent: Tensor) -> Any:
        """Begin to tell all ranks [W, L] numbers each; return its work."""
        if self._tag_links is not None:
            return self._tag_links.start(received, sent, self.deadline_s)
        ones = [1] * self.world_size
        return self.start_swap(received, sent, ones, ones)

    def start_swap(
        self, received: Tensor, sent: Tensor, arriving: Sequence[int], sizes: Sequence[int], *, is_beside: bool = True
    ) -> Any:
        """Begin an all-to-all of flat tensors; return its work."""
        group = self._payload if sent.is_cuda else self._control
        if sent.dtype == torch.uint16:  # which neither backend knows; nothing is computed with it
            received, sent = received.view(torch.float16), sent.view(torch.float16)
        return dist.all_to_all_single(received, sent, list(arriving), list(sizes), group=group, async_op=is_beside)

    def start_large_swap(
        self, received: Tensor, sent: Tensor, arriving: Sequence[int], sizes: Sequence[int], *, is_beside: bool = True
    ) -> Any:
        """Begin an all-to-all between GPUs, of more elements than 32 bits count; return its work."""
        into, pieces = received.split_with_sizes(list(arriving)), sent.split_with_sizes(list(sizes))
        return dist.all_to_all(list(into), list(pieces), group=self._payload, async_op=is_beside)

    def explain(self, told: str, cause: BaseException) -> MfdistError:
        """Return the error for what torch.distributed raised in a call; the group is of no further use."""
        explained = explain_silence(told, self.ranks, cause, self.deadline_s)
        if self._memory is not None:
            self._memory.give_up()
        return explained
