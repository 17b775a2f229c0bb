"""What refusals say: in one line what must hold, what was given and what to do, and with which status."""

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mfdist.table_server.proto import table_v1_pb2 as pb
from tests.table_server.processes import server
from tests.table_server.raw_client import RawClient, refused, table_names, tensor

LOOKUPS = pb.Lookups(row_ids=tensor(np.array([[3, 9]])), scores=tensor(np.ones((1, 2), np.float32)))


def shard(name: str, **changed: Any) -> pb.Shard:
    made = pb.Shard(
        table=pb.TableSpec(name=name, num_rows=64, row_dim=8, dtype=pb.FLOAT32),
        region=pb.Region(row_end=64, column_end=8),
        optimizer=pb.RowOptimizer(rule=pb.RowOptimizer.SGD, lr=0.1),
        std=1.0,
        seed=3,
    )
    for field, value in changed.items():
        getattr(made, field).CopyFrom(value) if hasattr(value, "CopyFrom") else setattr(made, field, value)
    return made


def create(client: RawClient, made: pb.Shard) -> Any:
    return client.stub.Create(pb.CreateRequest(shard=made), timeout=60)


@pytest.mark.parametrize("std", [float("nan"), float("inf"), -1.0])
def test_first_rows_have_a_spread(client: RawClient, std: float) -> None:
    refused(
        lambda: create(client, shard(next(table_names), std=std)), f"must be finite and 0 or more; got {std} for table"
    )


def test_another_table_of_the_name_is_told_by_what_differs(client: RawClient, table: str) -> None:
    assert create(client, shard(table)).was_there
    aborted = grpc.StatusCode.ABORTED
    says = f'"{table}" is here with seed=3, and was asked for with seed=4; drop it first'
    refused(lambda: create(client, shard(table, seed=4)), says, aborted)
    rate = pb.RowOptimizer(rule=pb.RowOptimizer.SGD, lr=0.5)
    says = "is here with optimizer.lr=0.1, and was asked for with optimizer.lr=0.5;"
    refused(lambda: create(client, shard(table, optimizer=rate)), says, aborted)
    adam = pb.RowOptimizer(rule=pb.RowOptimizer.ADAM, lr=0.1, beta2=0.9, state_dtype=pb.BFLOAT16)
    says = "is here with std=1.0, optimizer=sgd, and was asked for with std=2.0, optimizer=adam;"
    refused(lambda: create(client, shard(table, optimizer=adam, std=2.0)), says, aborted)
    half = pb.Region(row_begin=32, row_end=64, column_end=8)
    refused(lambda: create(client, shard(table, region=half)), "with rows=[0, 64), and was asked for with", aborted)


def test_a_shape_below_zero_is_called_by_its_name(client: RawClient, table: str) -> None:
    ids = pb.Tensor(dtype=pb.INT64, shape=[-1, -2])
    request = pb.LookupRequest(table=table, lookups=pb.Lookups(row_ids=ids, scores=ids))
    says = "row_ids must have one or two dimensions, each in [0, 2**31); got shape [-1, -2]"
    refused(lambda: client.stub.Lookup(iter([request]), timeout=60), says)


def test_there_is_one_client_at_least(client: RawClient) -> None:
    says = "num_clients must be 1 or more; got 0; give how many clients train together"
    refused(lambda: client.stub.Join(pb.JoinRequest(session=1), timeout=60), says)


def test_long_names_are_not_echoed(client: RawClient, table: str) -> None:
    for name in ("x" * 200_000, "𝄞" * 50_000):
        missing = f'got "{name[:40]}…", {len(name)} characters, this server has'
        request = pb.LookupRequest(table=name, lookups=LOOKUPS)
        refused(lambda sent=request: client.stub.Lookup(iter([sent]), timeout=60), missing, grpc.StatusCode.NOT_FOUND)
        said = refused(lambda sent=name: create(client, shard(sent)), 'at most 200 characters without "/"')
        assert len(said) < 300
        state = pb.GatherRequest(table=table, state=name)
        refused(lambda sent=state: client.stub.Gather(sent, timeout=60), f'got "{name[:40]}…"')
    said = refused(
        lambda: client.stub.Load(pb.LoadRequest(directory="/" + "y/" * 1500), timeout=60),
        "check the path",
        grpc.StatusCode.NOT_FOUND,
    )
    assert len(said) <= 1010


def test_no_client_is_called_late_where_none_has_joined(tmp_path: Path) -> None:
    with server(tmp_path / "data", wait_s=0.5) as process:
        client = RawClient(process.address)
        client.create("a")
        request = pb.LookupRequest(table="a", min_version=2, lookups=LOOKUPS)
        refused(
            lambda: client.stub.Lookup(iter([request]), timeout=60),
            "needs clients that push it within 0.5 s; none has joined",
            grpc.StatusCode.UNAVAILABLE,
        )
        refused(
            lambda: client.push(client.message("a", 1)),
            "a push must be of the server's epoch",
            grpc.StatusCode.ABORTED,
        )
        client.epoch = 1
        says = "client 0 has not since this server's start; join, then send it again"
        refused(lambda: client.push(client.message("a", 1)), says, grpc.StatusCode.UNAVAILABLE)
        client.channel.close()


def test_a_checkpoint_that_is_not_there_is_not_called_damaged(client: RawClient, table: str, tmp_path: Path) -> None:
    not_found = grpc.StatusCode.NOT_FOUND

    def load(**fields: Any) -> Any:
        return client.stub.Load(pb.LoadRequest(directory=str(tmp_path), **fields), timeout=60)

    refused(load, "a checkpoint must have been committed", not_found)
    client.stub.Save(pb.SaveRequest(directory=str(tmp_path), step=3), timeout=60)
    refused(lambda: load(step=4), "step 4 must have been committed", not_found)
    other = next(table_names)
    client.create(other)
    refused(load, "a table must be in the checkpoint to be loaded", not_found)
    client.stub.Drop(pb.DropRequest(table=other), timeout=60)
    assert load(step=3).step == 3


def test_a_server_numbers_the_checkpoints_of_its_own_folder(client: RawClient, table: str) -> None:
    first = client.stub.Save(pb.SaveRequest(step=300), timeout=60).step
    assert client.stub.Save(pb.SaveRequest(step=300), timeout=60).step == first + 1 < 300
