"""What the benchmark of servers looks up, drawn the same every time, and how it keeps them busy."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mfdist.sharding.kinds import column_wise
from mfdist.spec import TableSpec
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from mfdist.tables.local import LocalTable


@dataclass(frozen=True)
class Case:
    """A lookup: tokens, slots a token, rows a slot, row width."""

    name: str
    num_tokens: int
    num_slots: int
    stride: int
    row_dim: int


IN_FLIGHT = 8  # lookups at full load

CASES = (Case("decode", 64, 64, 256, 512), Case("tiny-train", 4096, 64, 256, 512))


def drawn(case: Case) -> tuple[TableSpec, Tensor, Tensor]:
    """Return the table's spec, codes [N, K] in uint8 and scores [N, K] in fp32."""
    generator = torch.Generator().manual_seed(0)
    spec = TableSpec(name=case.name, num_rows=case.num_slots * case.stride, row_dim=case.row_dim, dtype=torch.float32)
    codes = torch.randint(0, case.stride, (case.num_tokens, case.num_slots), generator=generator).to(torch.uint8)
    return spec, codes, torch.randn(case.num_tokens, case.num_slots, generator=generator)


def made(case: Case, servers: TableServers) -> tuple[RemoteTable, LocalTable, Tensor, Tensor]:
    """Return a table on the first server, one of the same rows in this process, codes and scores."""
    spec, codes, scores = drawn(case)
    remote, local = RemoteTable(column_wise(spec, [0]), servers, seed=1), LocalTable(spec)
    with torch.no_grad():
        local.weight.copy_(remote.rows())
    return remote, local, codes, scores


async def full_load(call: Callable[[], Awaitable[object]], seconds: float) -> float:
    """Return how many calls a second came to their end while `IN_FLIGHT` were under way all the time."""
    began, count = time.perf_counter(), 0

    async def one() -> None:
        nonlocal count
        while time.perf_counter() < began + seconds:
            await call()
            count += 1

    await asyncio.gather(*(one() for _ in range(IN_FLIGHT)))
    return count / (time.perf_counter() - began)
