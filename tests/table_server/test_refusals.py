"""Requests that a client got wrong: each is refused by name before anything of it is kept."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.store import Store
from tests.table_server.processes import ServerProcess, server
from tests.table_server.raw_client import RawClient, acknowledged, array, tensor

_names = (f"table {number}" for number in count())
INVALID = grpc.StatusCode.INVALID_ARGUMENT
PARTS = ("lookups", "grad_output", "row_ids", "row_gradients")
#: What a push may hold that is neither lookups with their gradient nor gradients of rows alone.
NO_FORMS = [
    {name for bit, name in enumerate(PARTS) if number >> bit & 1} for number in range(16) if number not in (3, 12)
]
WRONG_RATES = [float("nan"), float("inf"), float("-inf"), -0.1]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(process: ServerProcess) -> Iterator[RawClient]:
    made = RawClient(process.address)
    made.join()
    yield made
    made.channel.close()


@pytest.fixture
def table(client: RawClient) -> str:
    name = next(_names)
    client.create(name)
    return name


def refused(call: Callable[[], Any], says: str, code: grpc.StatusCode = INVALID) -> str:
    """Return what a call was refused with."""
    with pytest.raises(grpc.RpcError) as raised:
        list(made) if hasattr(made := call(), "__next__") else None
    error: Any = raised.value
    assert (error.code(), says in error.details()) == (code, True), error.details()
    return str(error.details())


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


# What messages say.


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
    refused(lambda: create(client, shard(next(_names), std=std)), f"must be finite and 0 or more; got {std} for table")


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
        request = pb.LookupRequest(table=name, lookups=both_forms(client, table).lookups)
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
        request = pb.LookupRequest(table="a", min_version=2, lookups=both_forms(client, "a").lookups)
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
    other = next(_names)
    client.create(other)
    refused(load, "a table must be in the checkpoint to be loaded", not_found)
    client.stub.Drop(pb.DropRequest(table=other), timeout=60)
    assert load(step=3).step == 3


def test_a_server_numbers_the_checkpoints_of_its_own_folder(client: RawClient, table: str) -> None:
    first = client.stub.Save(pb.SaveRequest(step=300), timeout=60).step
    assert client.stub.Save(pb.SaveRequest(step=300), timeout=60).step == first + 1 < 300
