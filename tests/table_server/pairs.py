"""Pairs of real servers, what they say of themselves, and a client that trains one table on them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from mfdist.sharding.kinds import column_wise
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from tests.table_server.processes import DEADLINE_S, ServerProcess, until
from tests.table_server.raw_client import RawClient
from tests.table_server.training import OPTIMIZER, STRIDE, batch, spec_of

PLAN = column_wise(spec_of("one"), [0])


@contextlib.contextmanager
def running_pair(folder: Path, **settings: Any) -> Iterator[list[ServerProcess]]:
    processes = [ServerProcess(folder / name, **settings) for name in "ab"]
    try:
        for process, other in zip(processes, reversed(processes), strict=True):
            process.peer = other.address
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.is_running:
                process.kill()


def described(process: ServerProcess) -> pb.DescribeReply:
    with grpc.insecure_channel(process.address) as channel:
        stub = TableServiceStub(channel)  # type: ignore[no-untyped-call]
        reply: pb.DescribeReply = stub.Describe(pb.DescribeRequest(), timeout=DEADLINE_S, wait_for_ready=True)
        return reply


def counters_of(process: ServerProcess) -> dict[str, float]:
    with grpc.insecure_channel(process.address) as channel:
        stub = TableServiceStub(channel)  # type: ignore[no-untyped-call]
        return dict(stub.Stats(pb.StatsRequest(), timeout=DEADLINE_S).counters)


def primary_of(pair: list[ServerProcess]) -> int:
    """Return which is the primary, once it is and the other one has all that it has."""
    found: list[int] = []

    def is_in_sync() -> bool:
        replies = [described(process) for process in pair]
        found[:] = [n for n, reply in enumerate(replies) if reply.role == pb.PRIMARY and reply.is_in_sync]
        # Until the replica knows that it is, at the primary's epoch, it does not take over.
        return len(found) == 1 and all(reply.is_in_sync and reply.epoch == replies[0].epoch for reply in replies)

    until(is_in_sync)
    return found[0]


def rows_of(process: ServerProcess, table: str = "one") -> np.ndarray:
    client = RawClient(process.address)
    try:
        return client.rows(table)
    finally:
        client.channel.close()


def connected(pair: list[ServerProcess], **settings: object) -> TableServers:
    settings = {"replicas": 2, "failover_s": 1.0, "deadline_s": DEADLINE_S, **settings}
    return TableServers([process.address for process in pair], **settings)  # type: ignore[arg-type]


def made(servers: TableServers) -> RemoteTable:
    return RemoteTable(PLAN, servers, std=1.0, seed=7, fuse=OPTIMIZER)


def step(table: RemoteTable, number: int) -> None:
    codes, scores, grad = batch(0, number, 0)
    table(codes, scores.requires_grad_(), code_stride=STRIDE).backward(grad)
