"""What the memory does at best on this machine, in this run."""

from dataclasses import dataclass

import torch

from mfdist.benchmarks.timing import Work, timings

_BUFFER_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Bytes a second: of a large copy, read and written together, and of a sum over a large buffer, read only."""

    copy_bytes_per_s: float
    read_bytes_per_s: float

    def of(self, kind: str) -> float:
        """Return the ceiling of a kind, "copy" or "read"."""
        return {"copy": self.copy_bytes_per_s, "read": self.read_bytes_per_s}[kind]


def measure(device: str, seconds: float) -> Ceilings:
    """Return both ceilings."""
    size = _BUFFER_BYTES[device]
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    # A GPU's own copy, when a graph holds it, falls short of what a kernel copies.
    copies = [Work(lambda _: target.copy_(source)), Work(lambda _: torch.neg(source, out=target))]
    works = [*copies, Work(lambda _: source.sum())]
    for work in works:
        work.call(0)
    *copies_us, read_us = (each.median_us for each in timings(works, device, seconds))
    return Ceilings(copy_bytes_per_s=2e6 * size / min(copies_us), read_bytes_per_s=1e6 * size / read_us)
