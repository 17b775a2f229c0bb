"""Peer memory: GPUs of one host write into each other's memory, with nothing in between but NVLink or PCIe.

A message goes in two steps, both queued in the stream: each rank writes what it has for the others where they will
read it, and all wait for each other. No kernel of NCCL's has to start, and nothing is copied on the way.

Two halves of the memory take turns, so that one wait a message is enough: who has come to the wait of a message has
used what the one before brought, whose half the next is written to.

W ranks. All calls are for the thread that runs the model, on all ranks alike.
"""

import atexit
import contextlib
import logging
import socket
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_log = logging.getLogger(__name__)
#: Of all ranks' parts for a rank together; a longer message is not worth memory twice its size.
MOST_BYTES = 256 << 20
#: What a GPU's memory is mapped by.
_GRANULE_BYTES = 2 << 20
_ALIGNMENT = 16
#: How long a GPU may go on with what is queued, once its host leaves, before the others are taken not to come.
_GRACE_S = 3.0


def reach_each_other(device: torch.device, control: Any) -> bool:
    """Return whether all ranks of a group are processes of one host, each with a GPU that the others see and can read.

    Args:
        device: this rank's.
        control: the process group, on the CPU's network.

    Called on: all ranks of the group.
    """
    if device.type != "cuda":
        return False
    named = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    own = device.index if device.index is not None else torch.cuda.current_device()
    everyones = _gathered((socket.gethostname(), named[own]), control)
    gpus = [uuid for _, uuid in everyones]
    is_one_host = len({host for host, _ in everyones}) == 1 and len(set(gpus)) == len(gpus)
    reaches = is_one_host and all(
        uuid in named and (uuid == named[own] or torch.cuda.can_device_access_peer(own, named.index(uuid)))
        for uuid in gpus
    )
    return all(_gathered(reaches, control))


class PeerMemory:
    """What ranks that reach each other (`reach_each_other`) read each other's messages in.

    Args:
        payload, control: process groups of the same ranks, NCCL's and the CPU's.
        device: this rank's GPU.
        timeout_s: after which a wait for the others is an error of the GPU's, which ends the process.
    """

    def __init__(self, payload: Any, control: Any, device: torch.device, timeout_s: float) -> None:
        self._payload, self._control, self._device = payload, control, device
        self._rank, self._world_size = dist.get_rank(payload), dist.get_world_size(payload)
        self._timeout_ms = int(timeout_s * 1e3)
        self._half_bytes = 0
        self._turn = 0
        self._handle: Any = None
        self._memory: list[Tensor] = []  # [W] uint8, of each rank
        self._works = True
        self._stream: torch.cuda.Stream | None = None  # of the last message
        atexit.register(_give_up, weakref.ref(self))  # or the process could not end before the wait's time is out

    def has_room(self, num_bytes: int, agree: Callable[[], object]) -> bool:
        """Return whether messages of at most so many bytes to each go this way; the same on all ranks.

        Args:
            num_bytes: known to all ranks alike.
            agree: raises unless all ranks are doing the same; called before more memory is taken, by all together.
        """
        needed = self._slot_bytes(num_bytes) * self._world_size
        if needed > MOST_BYTES or not self._works:
            return False
        if needed <= self._half_bytes:
            return True
        agree()
        return self._grow(max(needed, min(self._half_bytes * 3 // 2, MOST_BYTES)))

    def _grow(self, half_bytes: int) -> bool:
        """Take memory twice, or return False because a rank could not, and then for good."""
        half_bytes = -(-half_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        torch.cuda.synchronize(self._device)  # nobody reads the old memory any more once all have come here
        error = ""
        try:
            handle, memory = self._rendezvous(2 * half_bytes)
        except (ImportError, RuntimeError) as cause:
            error = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        errors = [each for each in _gathered(error, self._control) if each]
        if errors:
            self._works = False
            _log.warning("GPUs do not read each other's memory; NCCL carries everything (%s)", errors[0])
            return False
        self._handle, self._memory, self._half_bytes = handle, memory, half_bytes
        return True

    def lend(
        self,
        write: Callable[[int, Tensor], object],
        dtype: torch.dtype,
        sizes: Sequence[int],
        arriving: Sequence[int],
        largest: int,
        ranks: Sequence[int],
    ) -> "Lent":
        """Queue an all-to-all in the current stream; what arrives is there until the next one.

        Args:
            write: writes what a rank gets into a flat tensor of `dtype`, which lies in that rank's memory.
            dtype, sizes, arriving: of the elements for each rank, and from each, [W].
            largest: the most elements any rank sends to any other, known to all ranks alike; `has_room` for them.
            ranks: those that `write` is called for, and whose parts are of use afterwards.
        """
        item, rank, world_size = dtype.itemsize, self._rank, self._world_size
        if not largest:
            nothing = torch.empty(0, dtype=dtype, device=self._device)
            return Lent([nothing] * world_size, nothing)
        slot = self._slot_bytes(largest * item)
        self._turn = 1 - self._turn
        begin = self._turn * self._half_bytes
        for step in range(1, world_size + 1):
            peer = (rank + step) % world_size
            if peer in ranks and sizes[peer]:
                start = begin + rank * slot
                write(peer, self._memory[peer][start : start + sizes[peer] * item].view(dtype))
        self._stream = torch.cuda.current_stream(self._device)
        self._handle.barrier(channel=0, timeout_ms=self._timeout_ms)
        own = self._memory[rank][begin : begin + world_size * slot]
        parts = [own[source * slot : source * slot + size * item].view(dtype) for source, size in enumerate(arriving)]
        return Lent(parts, own.view(dtype) if all(size * item == slot for size in arriving) else None)

    def swap(self, payload: Tensor, sizes: Sequence[int], arriving: Sequence[int], largest: int) -> Tensor:
        """Queue an all-to-all of a flat tensor in the current stream; return what arrives; see `lend`."""
        dtype = payload.dtype
        if dtype == torch.uint16:  # which not all kernels know; nothing is computed with it
            payload = payload.view(torch.float16)
        pieces = payload.split_with_sizes(list(sizes))
        others = [rank for rank in range(self._world_size) if rank != self._rank]

        def write(rank: int, part: Tensor) -> None:
            part.copy_(pieces[rank])

        lent = self.lend(write, payload.dtype, sizes, arriving, largest, others)
        return torch.cat(lent.with_part(self._rank, pieces[self._rank]).parts).view(dtype)

    def give_up(self) -> None:
        """Let this GPU past its waits for the others, which nobody may end any more; what it computes is of no use."""
        stuck = self._stream
        if stuck is None or _is_done(stuck, _GRACE_S):
            return
        _log.warning("not all ranks came; this GPU goes on without them, to be able to stop")
        pads = [self._handle.get_signal_pad(rank, dtype=torch.int32) for rank in range(self._world_size)]
        beside, until_s = torch.cuda.Stream(self._device), time.monotonic() + _GRACE_S  # type: ignore[no-untyped-call]
        with torch.cuda.stream(beside):
            while not _is_done(stuck) and time.monotonic() < until_s:
                for rank, pad in enumerate(pads):
                    pad.fill_(int(rank == self._rank))  # everyone has come, and takes notice of what this rank tells
                beside.synchronize()

    def _rendezvous(self, num_bytes: int) -> tuple[Any, list[Tensor]]:
        import torch.distributed._symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._device)
        handle = symmetric_memory.rendezvous(own, self._payload.group_name)
        get_buffer: Callable[..., Tensor] = handle.get_buffer
        return handle, [get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(self._world_size)]

    @staticmethod
    def _slot_bytes(num_bytes: int) -> int:
        return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


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


def _is_done(stream: torch.cuda.Stream, within_s: float = 0.0) -> bool:
    until_s = time.monotonic() + within_s
    while not stream.query():
        if time.monotonic() >= until_s:
            return False
        time.sleep(0.01)
    return True


def _give_up(peers: "weakref.ref[PeerMemory]") -> None:
    if (found := peers()) is not None:
        with contextlib.suppress(RuntimeError):  # a GPU that has failed does not wait
            found.give_up()


def _gathered(value: Any, control: Any) -> list[Any]:
    everyones: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(everyones, value, group=control)
    return everyones
