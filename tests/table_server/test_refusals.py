"""Requests that a client got wrong: each is refused by name before anything of it is kept."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mfdist.table_server.config import ServerConfig, ServerSection
from mfdist.table_server.interceptors import interceptors
from mfdist.table_server.metrics import Metrics, Observed
from mfdist.table_server.node import Node
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.rpcs import add_service
from mfdist.table_server.service import TableService
from mfdist.table_server.store import Store
from tests.table_server.processes import ServerProcess, server
from tests.table_server.raw_client import RawClient, acknowledged, array, refused, table_names, tensor

PARTS = ("lookups", "grad_output", "row_ids", "row_gradients")
#: What a push may hold that is neither lookups with their gradient nor gradients of rows alone.
NO_FORMS = [
    {name for bit, name in enumerate(PARTS) if number >> bit & 1} for number in range(16) if number not in (3, 12)
]
WRONG_RATES = [float("nan"), float("inf"), float("-inf"), -0.1]


def both_forms(client: RawClient, table: str, step: int = 1) -> pb.PushRequest:
    """Return a push that holds lookups with their gradient, and gradients of rows too."""
    message = client.message(table, step)
    message.lookups.row_ids.CopyFrom(tensor(np.array([[3, 9]])))
    message.lookups.scores.CopyFrom(tensor(np.ones((1, 2), np.float32)))
    message.grad_output.CopyFrom(tensor(np.ones((1, 8), np.float32)))
    return message


def with_parts(message: pb.PushRequest, held: set[str]) -> pb.PushRequest:
    for name in PARTS:
        if name not in held:
            message.ClearField(name)  # type: ignore[arg-type]
    return message


def listed(tokens: list[int], num_tokens: int, ids: list[int] | None = None) -> pb.Lookups:
    return pb.Lookups(
        row_ids=tensor(np.array(ids or range(len(tokens)), np.int64)),
        scores=tensor(np.ones(len(tokens), np.float32)),
        tokens=tensor(np.array(tokens, np.int32)),
        num_tokens=num_tokens,
    )


def check_untouched(client: RawClient, table: str, rows: "np.ndarray[Any, Any]") -> None:
    """Raise unless nothing was taken of what was refused: the first step is still to come."""
    assert np.array_equal(client.rows(table), rows)
    assert client.join()[table] == 0
    assert not acknowledged(client.push(client.message(table, 1))).was_known
    assert np.isfinite(client.rows(table)).all()
    assert not np.array_equal(client.rows(table), rows)


@pytest.mark.parametrize("lr", WRONG_RATES)
def test_a_rate_that_would_ruin_rows_is_refused(client: RawClient, table: str, lr: float) -> None:
    rows = client.rows(table)
    message = client.message(table, 1)
    message.lr = lr
    refused(lambda: client.push(message), "lr must be finite and 0 or more; got")
    step = pb.StepRequest(table=table, session=client.session, epoch=client.epoch, step=1, lr=lr)
    refused(lambda: client.stub.Step(step, timeout=60), "lr must be finite and 0 or more; got")
    check_untouched(client, table, rows)


def test_steps_count_from_one(client: RawClient, table: str) -> None:
    rows = client.rows(table)
    refused(lambda: client.push(client.message(table, 0)), "steps count from 1; got 0 of client 0")
    step = pb.StepRequest(table=table, session=client.session, epoch=client.epoch, lr=0.1)
    refused(lambda: client.stub.Step(step, timeout=60), "steps count from 1; got 0 of client 0")
    check_untouched(client, table, rows)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("held", NO_FORMS)
def test_a_push_holds_one_whole_form(client: RawClient, table: str, held: set[str], is_frozen: bool) -> None:
    rows = client.rows(table)
    message = with_parts(both_forms(client, table), held)
    message.is_frozen = is_frozen
    names = " and ".join(name for name in PARTS if name in held) or "none of them"
    refused(lambda: client.push(message), f"row_gradients in each message; got {names} in message 0")
    check_untouched(client, table, rows)


def test_all_messages_of_a_push_hold_the_same_form(client: RawClient, table: str) -> None:
    rows = client.rows(table)
    lookups, gradients = set(PARTS[:2]), set(PARTS[2:])
    for first, second, says in (
        (lookups, gradients, "got row_ids and row_gradients in message 1 after lookups and grad_output"),
        (gradients, lookups, "got lookups and grad_output in message 1 after row_ids and row_gradients"),
        (gradients, set(PARTS), "got lookups and grad_output and row_ids and row_gradients in message 1"),
        (lookups, set(), "got none of them in message 1"),
    ):
        messages = [with_parts(both_forms(client, table), held) for held in (first, second)]
        messages[0].is_last, messages[1].sequence = False, 1
        refused(lambda sent=messages: client.push(*sent), says)
    check_untouched(client, table, rows)


def test_gradients_of_frozen_rows_are_not_lost_silently(client: RawClient, table: str) -> None:
    message = client.message(table, 1, is_frozen=True)
    refused(lambda: client.push(message), "a push to frozen rows must hold lookups; got gradients of rows")


def test_what_was_logged_before_it_was_refused_is_found_again(tmp_path: Path) -> None:
    """A server starts on a log that an older one wrote: what was acknowledged is applied as it was then."""
    with server(tmp_path / "data") as process:
        client = RawClient(process.address)
        client.create("a")
        client.join()
        acknowledged(client.push(client.message("a", 1)))
        process.kill()
        falling = with_parts(both_forms(client, "a", 2), {"lookups", "grad_output"})
        falling.lookups.CopyFrom(listed([1, 0], 2))
        falling.grad_output.CopyFrom(tensor(np.ones((2, 8), np.float32)))
        half = with_parts(both_forms(client, "a", 3), {"grad_output"})
        ruined = client.message("a", 4)
        ruined.lr = float("nan")
        store = Store(tmp_path / "data")
        (held,) = store.find()
        for message in (falling, half, ruined):
            store.log(held.life).append(message.step, 0, [message.SerializeToString()]).result()
        store.close()
        process.start()
        assert client.join()["a"] == 4
        client.channel.close()


INTEGERS = (pb.UINT8, pb.UINT16, pb.INT32, pb.INT64)


def test_sums_travel_as_floating_point(client: RawClient, table: str) -> None:
    lookups = both_forms(client, table).lookups

    def sums(dtype: int) -> Any:
        request = pb.LookupRequest(table=table, lookups=lookups, reply_dtype=dtype)  # type: ignore[arg-type]
        return client.stub.Lookup(iter([request]), timeout=60)

    for dtype in INTEGERS:
        refused(
            lambda asked=dtype: sums(asked), "reply_dtype must be floating point, one of float32, float16, bfloat16"
        )
    refused(lambda: sums(99), "reply_dtype must name a dtype of the protocol; got 99")
    for dtype in (pb.FLOAT32, pb.FLOAT16, pb.BFLOAT16, pb.FLOAT8_E4M3FN, pb.FLOAT8_E5M2):
        (reply,) = sums(dtype)
        assert reply.sums.dtype == dtype
    integers = with_parts(both_forms(client, table), {"lookups", "grad_output"})
    integers.grad_output.CopyFrom(tensor(np.ones((1, 8), np.int32)))
    refused(lambda: client.push(integers), "must be [1, 8] of a floating dtype; got [1, 8] int32")


@pytest.mark.parametrize(
    ("tokens", "numbers", "says"),
    [
        ([[1, 0]], [2], "tokens of listed lookups must rise"),
        ([[0, 1], [1, 0]], [2, 2], "tokens of listed lookups must rise"),
        ([[0, 3], [1]], [2, 2], "tokens must lie in [0, 2), counted from their message's first; got 3"),
        ([[0, 1], [-1]], [2, 2], "tokens must lie in [0, 2), counted from their message's first; got -1"),
    ],
)
def test_tokens_of_listed_lookups_rise(
    client: RawClient, table: str, tokens: list[list[int]], numbers: list[int], says: str
) -> None:
    rows = client.rows(table)
    messages = []
    for number, (each, num_tokens) in enumerate(zip(tokens, numbers, strict=True)):
        message = with_parts(both_forms(client, table), {"lookups", "grad_output"})
        message.lookups.CopyFrom(listed(each, num_tokens))
        message.grad_output.CopyFrom(tensor(np.ones((num_tokens, 8), np.float32)))
        message.sequence, message.is_last = number, number == len(tokens) - 1
        messages.append(message)
    refused(lambda: client.push(*messages), says)
    check_untouched(client, table, rows)
    if len(messages) == 1:
        request = pb.LookupRequest(table=table, lookups=messages[0].lookups)
        refused(lambda: client.stub.Lookup(iter([request]), timeout=60), says)


def test_listed_lookups_are_listed_in_all_messages(client: RawClient, table: str) -> None:
    messages = [with_parts(both_forms(client, table), {"lookups", "grad_output"}) for _ in range(2)]
    messages[0].is_last, messages[1].sequence = False, 1
    messages[1].lookups.tokens.CopyFrom(tensor(np.zeros((1, 2), np.int32)))
    refused(lambda: client.push(*messages), "lookups must be listed in all messages or in none")


def test_rows_are_named_in_a_list(client: RawClient, table: str) -> None:
    ids, rows = tensor(np.array([[1, 2], [3, 4]])), client.rows(table)
    request = pb.GatherRequest(table=table, row_ids=ids)
    refused(lambda: client.stub.Gather(request, timeout=60), "row_ids must be [U]; got [2, 2]")
    write = pb.WriteRequest(table=table, row_ids=ids, values=tensor(np.ones((2, 8), np.float32)))
    refused(lambda: client.stub.Write(iter([write]), timeout=60), "row_ids must be [U]; got [2, 2]")
    write.row_ids.CopyFrom(tensor(np.array([5, 5])))
    refused(lambda: client.stub.Write(iter([write]), timeout=60), "must name each row once; got 2 ids of 1 rows")
    assert np.array_equal(client.rows(table), rows)


def test_a_write_takes_values_as_they_are_and_the_last_message_of_a_row_holds(client: RawClient, table: str) -> None:
    values = [np.full((1, 8), value, np.float32) for value in (1.0, np.nan, 2.0)]
    messages = [
        pb.WriteRequest(table=table, row_ids=tensor(np.array([row])), values=tensor(each))
        for row, each in zip((5, 6, 5), values, strict=True)
    ]
    client.stub.Write(iter(messages), timeout=60)
    rows = client.rows(table)
    assert (rows[5] == 2.0).all()
    assert np.isnan(rows[6]).all()


def test_a_row_whose_gradient_is_not_finite_is_left_and_the_push_counts(client: RawClient, table: str) -> None:
    rows, message = client.rows(table), client.message(table, 1)
    gradients = array(message.row_gradients).copy()
    gradients[2, 3] = np.nan
    message.row_gradients.CopyFrom(tensor(gradients))
    ids = array(message.row_ids)
    assert acknowledged(client.push(message)).step == 1
    changed = np.nonzero((client.rows(table) != rows).any(1))[0]
    assert changed.tolist() == [row for at, row in enumerate(ids.tolist()) if at != 2]
    assert client.join()[table] == 1


def test_sums_of_a_message_fit_the_length_that_the_page_gives(process: ServerProcess, client: RawClient) -> None:
    """A client that takes 16 MiB gets what is not refused, with scales and head."""
    name = next(table_names)
    client.create(name, 8, 4)
    options = [("grpc.max_receive_message_length", 16 << 20), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(process.address, options=options) as channel:
        stub: Any = TableServiceStub(channel)  # type: ignore[no-untyped-call]
        for dtype, item_bytes in ((pb.FLOAT32, 16), (pb.FLOAT8_E4M3FN, 8)):
            most = ((16 << 20) - 1024) // item_bytes

            def sums(num_tokens: int, asked: Any = dtype) -> Any:
                lookups = listed([0], num_tokens)
                request = pb.LookupRequest(table=name, lookups=lookups, reply_dtype=asked)
                return stub.Lookup(iter([request]), timeout=60)

            (reply,) = sums(most)
            assert (16 << 20) - 1024 - item_bytes < reply.ByteSize() <= 16 << 20
            refused(lambda call=sums, over=most + 1: call(over), "the sums of one message must fit into one of")
    client.stub.Drop(pb.DropRequest(table=name), timeout=60)


def test_a_push_that_is_too_long_is_over_a_limit(tmp_path: Path) -> None:
    """With the service as it is, and a limit that a test can reach."""

    async def pushed() -> grpc.aio.AioRpcError:
        node = Node(ServerSection(data=tmp_path / "data"))
        metrics = Metrics(Observed())
        running = grpc.aio.server(interceptors=interceptors(ServerConfig(), metrics))
        add_service(TableService(node, metrics, max_push_bytes=64), running)
        port = running.add_insecure_port("127.0.0.1:0")
        await running.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub: Any = TableServiceStub(channel)  # type: ignore[no-untyped-call]
                message = pb.PushRequest(table="a", is_last=True, row_ids=tensor(np.arange(9, dtype=np.int64)))
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    [reply async for reply in stub.Push(iter([message]), timeout=60)]
                assert metrics.samples()['mfdist_refusals_total{reason="size"}'] == 1
                return raised.value
        finally:
            await running.stop(0)
            node.close()

    error = asyncio.run(pushed())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "a push must be at most 64 bytes" in str(error.details())
