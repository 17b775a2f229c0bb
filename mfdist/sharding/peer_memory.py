"""Peer memory: GPUs of one host write into each other's memory, with nothing in between but NVLink or PCIe.

Messages go by mailboxes in torch's symmetric memory, all of it queued in the stream. No kernel of NCCL's has to start,
and nothing is copied on the way. Beside `exchange.py` only this calls collectives: to agree that memory is there.

All calls are for the thread that runs the model, on all ranks alike.
"""

import atexit
import contextlib
import logging
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mfdist.sharding.mailboxes import GrowingMailboxes, Mailboxes
from mfdist.sharding.tag_links import gathered

_Made = TypeVar("_Made")
_log = logging.getLogger(__name__)
#: Of a message; see `GrowingMailboxes`.
MOST_BYTES = 256 << 20
#: How long a GPU may go on with what is queued, once its host leaves, before the others are taken not to come.
_GRACE_S = 3.0


def reach_each_other(device: torch.device, control: Any) -> bool:
    """Return whether a group's ranks are processes of one host, each with a GPU that the others see and can write to.

    Args:
        device: this rank's.
        control: the process group, on the CPU's network.

    Called on: all ranks of the group.
    """
    if device.type != "cuda":
        return False
    named = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    own = device.index if device.index is not None else torch.cuda.current_device()
    everyones = gathered((socket.gethostname(), named[own]), control)
    gpus = [uuid for _, uuid in everyones]
    is_one_host = len({host for host, _ in everyones}) == 1 and len(set(gpus)) == len(gpus)
    reaches = is_one_host and all(
        uuid in named and (uuid == named[own] or torch.cuda.can_device_access_peer(own, named.index(uuid)))
        for uuid in gpus
    )
    return all(gathered(reaches, control))


class PeerMemory(GrowingMailboxes):
    """Mailboxes in the memory of GPUs that reach each other (`reach_each_other`), as large as messages need.

    Args:
        payload, control: process groups of the same ranks, NCCL's and the CPU's.
        device: this rank's GPU.
        timeout_s: after which a wait for the others is an error of the GPU's, which ends the process.
    """

    def __init__(self, payload: Any, control: Any, device: torch.device, timeout_s: float) -> None:
        super().__init__(dist.get_world_size(payload), MOST_BYTES, in_parts=False)
        self._payload, self._control, self._device = payload, control, device
        self._rank = dist.get_rank(payload)
        self._timeout_ms = int(timeout_s * 1e3)
        self._handle: Any = None
        self._stream: torch.cuda.Stream | None = None  # of the last message
        self._beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied: list[tuple[Tensor, Tensor]] = []  # until the stream has waited for them
        self._releases: list[tuple[Tensor, Tensor]] = []
        atexit.register(_leave, weakref.ref(self))  # or the process could not end before the wait's time is out

    def _make(self, num_bytes: int) -> Mailboxes | None:
        torch.cuda.synchronize(self._device)  # nobody uses the old memory any more once all have come here
        # In two steps: a rank that has no memory left must not leave the others waiting for its address.
        own = self._made_by_all(lambda: self._take(num_bytes))
        made = None if own is None else self._made_by_all(lambda: self._rendezvous(own))
        if made is None:
            return None
        self._handle, memory = made
        self._prepare_to_give_up()
        return Mailboxes(self._rank, memory, self._wait)

    def _made_by_all(self, make: Callable[[], _Made]) -> _Made | None:
        """Return what this rank makes; None where a rank could not."""
        error, made = "", None
        try:
            made = make()
        except (ImportError, RuntimeError) as cause:
            error = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        errors = [each for each in gathered(error, self._control) if each]
        if not errors:
            return made
        _log.warning("GPUs do not write into each other's memory; NCCL carries everything (%s)", errors[0])
        return None

    def put(self, made: list[tuple[Tensor, Tensor]]) -> None:
        """Copy into parts, beside what is computed next."""
        computing = torch.cuda.current_stream(self._device)
        self._ready.record(computing)
        self._copying.wait_event(self._ready)
        with torch.cuda.device(self._device):  # which streams that are set bring with them
            torch.cuda.set_stream(self._copying)
            try:
                for part, values in made:
                    part.copy_(values)
            finally:
                torch.cuda.set_stream(computing)
        self._copied += made
        made.clear()

    def _wait(self) -> None:
        self._stream = torch.cuda.current_stream(self._device)
        if self._copied:
            self._stream.wait_stream(self._copying)
            self._copied.clear()
        self._handle.barrier(channel=0, timeout_ms=self._timeout_ms)

    def give_up(self) -> None:
        """Let this GPU past its waits for the others, which nobody may end any more; what it computes is of no use."""
        with contextlib.suppress(RuntimeError):  # a GPU that has failed does not wait
            if self._stream is not None and not _is_done(self._stream, _GRACE_S):
                self._release(self._stream)

    def _release(self, stuck: torch.cuda.Stream) -> None:
        _log.warning("not all ranks came; this GPU goes on without them, to be able to stop")
        until_s = time.monotonic() + _GRACE_S
        with torch.cuda.stream(self._beside):
            while not _is_done(stuck) and time.monotonic() < until_s:
                for pad, release in self._releases:
                    pad.copy_(release, non_blocking=True)
                self._beside.synchronize()

    def _prepare_to_give_up(self) -> None:
        """Have at hand what `give_up` needs: while a kernel waits, none that was not used before can be loaded.

        A wait puts a 1 into each other rank's signal pad, once there is a 0, and then takes one out of its own.
        """
        pads = [self._handle.get_signal_pad(rank, dtype=torch.int32) for rank in range(self._world_size)]
        self._releases = [
            (pad, torch.full(pad.shape, int(rank == self._rank), dtype=torch.int32, device="cpu", pin_memory=True))
            for rank, pad in enumerate(pads)
        ]

    def _take(self, num_bytes: int) -> Tensor:
        import torch.distributed._symmetric_memory as symmetric_memory

        return symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _rendezvous(self, own: Tensor) -> tuple[Any, list[Tensor]]:
        """Return the handle of all ranks' memory, and a view of each."""
        import torch.distributed._symmetric_memory as symmetric_memory

        handle = symmetric_memory.rendezvous(own, self._payload.group_name)
        get_buffer: Callable[..., Tensor] = handle.get_buffer
        return handle, [get_buffer(rank, own.shape, torch.uint8) for rank in range(self._world_size)]


def _is_done(stream: torch.cuda.Stream, within_s: float = 0.0) -> bool:
    until_s = time.monotonic() + within_s
    while not stream.query():
        if time.monotonic() >= until_s:
            return False
        time.sleep(0.01)
    return True


def _leave(peers: "weakref.ref[PeerMemory]") -> None:
    if (found := peers()) is not None:
        found.give_up()
