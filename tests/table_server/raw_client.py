"""A client made from the protocol alone: numpy, the generated messages and grpc, nothing of the library."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import grpc
import numpy as np
import pytest

from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub

DTYPES = {"float32": pb.FLOAT32, "uint8": pb.UINT8, "int32": pb.INT32, "int64": pb.INT64}
#: Names for tables, each given once; the tests of a module share a server.
table_names = (f"table {number}" for number in count())


def tensor(array: np.ndarray[Any, Any]) -> pb.Tensor:
    return pb.Tensor(dtype=DTYPES[array.dtype.name], shape=array.shape, data=array.tobytes())


def array(message: pb.Tensor) -> np.ndarray[Any, Any]:
    names = {code: name for name, code in DTYPES.items()}
    return np.frombuffer(message.data, names[message.dtype]).reshape(tuple(message.shape))


class RawClient:
    """One client of one server; `deadline_s` is of each call."""

    def __init__(self, address: str, client: int = 0, num_clients: int = 1, deadline_s: float = 60.0) -> None:
        self.channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub: Any = TableServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.client, self.num_clients, self.deadline_s = client, num_clients, deadline_s
        self.session, self.epoch = np.random.default_rng().integers(1, 1 << 62).item(), 0

    def create(self, table: str, num_rows: int = 64, row_dim: int = 8, lr: float = 0.1) -> None:
        shard = pb.Shard(
            table=pb.TableSpec(name=table, num_rows=num_rows, row_dim=row_dim, dtype=pb.FLOAT32),
            region=pb.Region(row_end=num_rows, column_end=row_dim),
            optimizer=pb.RowOptimizer(rule=pb.RowOptimizer.SGD, lr=lr),
            std=1.0,
            seed=3,
        )
        self.stub.Create(pb.CreateRequest(shard=shard), timeout=self.deadline_s, wait_for_ready=True)

    def join(self) -> dict[str, int]:
        request = pb.JoinRequest(client=self.client, num_clients=self.num_clients, session=self.session)
        reply = self.stub.Join(request, timeout=self.deadline_s, wait_for_ready=True)
        self.epoch = reply.epoch
        return dict(reply.steps)

    def message(self, table: str, step: int, num_rows: int = 64, row_dim: int = 8, **fields: Any) -> pb.PushRequest:
        """Return a push of gradients of a few rows, which only depends on client and step."""
        draw = np.random.default_rng([self.client, step])
        row_ids = np.sort(draw.choice(num_rows, 5, replace=False)).astype(np.int64)
        return pb.PushRequest(
            row_ids=tensor(row_ids),
            row_gradients=tensor(draw.standard_normal((5, row_dim)).astype(np.float32)),
            **({"is_last": True, "table": table, "client": self.client, "session": self.session} | fields),
            epoch=self.epoch,
            step=step,
            lr=0.1,
        )

    def push(self, *messages: pb.PushRequest) -> Iterator[pb.PushReply]:
        return self.stub.Push(iter(messages), timeout=self.deadline_s)  # type: ignore[no-any-return]

    def rows(self, table: str) -> np.ndarray[Any, Any]:
        replies: Sequence[pb.Rows] = list(self.stub.Gather(pb.GatherRequest(table=table), timeout=self.deadline_s))
        return np.concatenate([array(reply.values) for reply in replies])


def acknowledged(replies: Iterator[pb.PushReply]) -> pb.Acknowledged:
    *_, last = replies
    assert last.WhichOneof("answer") == "acknowledged"
    return last.acknowledged


def refused(call: Callable[[], Any], says: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> str:
    """Return what a call was refused with."""
    with pytest.raises(grpc.RpcError) as raised:
        list(made) if hasattr(made := call(), "__next__") else None
    error: Any = raised.value
    assert (error.code(), says in error.details()) == (code, True), error.details()
    return str(error.details())
