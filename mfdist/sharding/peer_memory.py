"""Peer memory: GPUs of one host read each other's memory, with nothing in between but NVLink or PCIe.

A message is laid out by each rank where the others can read it, all wait for each other, and each copies what is for
it. All of it is queued in the stream, and copies are made by the copy engines: no kernel of NCCL's has to start.

Two halves of the memory take turns, so that one wait a message is enough: whoever comes to the wait of a message has
read the one before, whose half the next message is laid out in.

W ranks. All calls are for the thread that runs the model, on all ranks alike.
"""

import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_log = logging.getLogger(__name__)
#: Of all of a rank's parts for the others together; a longer message is not worth memory twice its size.
MOST_BYTES = 256 << 20
#: What a GPU's memory is mapped by.
_GRANULE_BYTES = 2 << 20
_ALIGNMENT = 16


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

    def has_room(self, num_bytes: int, agree: Callable[[], object]) -> bool:
        """Return whether messages of at most so many bytes to each go this way; the same on all ranks.

        Args:
            num_bytes: known to all ranks alike.
            agree: raises unless all ranks are doing the same; called before more memory is taken, by all together.
        """
        needed = self._slot_bytes(num_bytes) * (self._world_size - 1)
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

    def swap(self, received: Tensor, sent: Tensor, arriving: Sequence[int], sizes: Sequence[int], largest: int) -> None:
        """Queue an all-to-all in the current stream.

        Args:
            received, sent: flat, contiguous, of one dtype; one rank's part after the other's.
            arriving, sizes: [W] elements from each rank, and for each.
            largest: the most elements any rank sends to any other, known to all ranks alike; `has_room` for them.
        """
        item, rank, world_size = sent.element_size(), self._rank, self._world_size
        parts = sent.detach().view(torch.uint8).split_with_sizes([size * item for size in sizes])
        into = received.view(torch.uint8).split_with_sizes([size * item for size in arriving])
        if largest:
            slot = self._slot_bytes(largest * item)
            self._turn = 1 - self._turn
            begins = [self._turn * self._half_bytes + step * slot for step in range(world_size - 1)]
            for step, begin in enumerate(begins, 1):
                part = parts[(rank + step) % world_size]
                self._memory[rank][begin : begin + part.numel()].copy_(part)
            self._handle.barrier(channel=0, timeout_ms=self._timeout_ms)
            for step, begin in enumerate(begins, 1):
                source = (rank - step) % world_size
                into[source].copy_(self._memory[source][begin : begin + into[source].numel()])
        into[rank].copy_(parts[rank])

    def _rendezvous(self, num_bytes: int) -> tuple[Any, list[Tensor]]:
        import torch.distributed._symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._device)
        handle = symmetric_memory.rendezvous(own, self._payload.group_name)
        get_buffer: Callable[..., Tensor] = handle.get_buffer
        return handle, [get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(self._world_size)]

    @staticmethod
    def _slot_bytes(num_bytes: int) -> int:
        return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _gathered(value: Any, control: Any) -> list[Any]:
    everyones: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(everyones, value, group=control)
    return everyones
