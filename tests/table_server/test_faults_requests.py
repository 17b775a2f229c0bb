"""Pushes that come twice, late, in another order, or from someone who may not: what a real server makes of them."""

import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from mfdist.table_server.proto import table_v1_pb2 as pb
from tests.table_server.processes import ServerProcess, server
from tests.table_server.raw_client import RawClient, acknowledged, array, tensor

NUM_CLIENTS = 3
_names = (f"table {number}" for number in itertools.count())


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def clients(process: ServerProcess) -> Iterator[list[RawClient]]:
    made = [RawClient(process.address, number, NUM_CLIENTS) for number in range(NUM_CLIENTS)]
    for client in made:
        client.join()
    yield made
    for client in made:
        client.channel.close()


@pytest.fixture
def table(clients: list[RawClient]) -> str:
    name = next(_names)
    clients[0].create(name)
    return name


def in_order(clients: list[RawClient], num_steps: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """Return the rows after these steps of a table that nobody disturbed."""
    name = next(_names)
    clients[0].create(name)
    for step in range(1, num_steps + 1):
        for pushing in [client.push(client.message(name, step)) for client in clients]:
            acknowledged(pushing)
    return clients[0].rows(name)


def aborted(replies: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        list(replies)  # type: ignore[call-overload]
    return raised.value


def test_pushes_in_any_order_and_number_are_one_update_a_step(clients: list[RawClient], table: str) -> None:
    draw, num_steps = random.Random(1), 8
    pushes = [(client, step) for client in clients for step in range(1, num_steps + 1)] * 3
    draw.shuffle(pushes)
    with ThreadPoolExecutor(len(pushes)) as threads:
        doing = [
            threads.submit(lambda client, step: acknowledged(client.push(client.message(table, step))), client, step)
            for client, step in pushes
        ]
        answers = [one.result(60) for one in doing]
    assert [answer.step for answer in answers] == [step for _, step in pushes]
    assert np.array_equal(clients[0].rows(table), in_order(clients, num_steps))
    assert clients[1].join()[table] == num_steps


def test_a_push_sent_again_is_answered_again_and_changes_nothing(clients: list[RawClient], table: str) -> None:
    ids = tensor(np.arange(12, dtype=np.int64).reshape(3, 4))
    scores, grad = np.ones((3, 4), np.float32), np.ones((3, 8), np.float32)

    def lookups(client: RawClient) -> pb.PushRequest:
        message = client.message(table, 1)
        for name in ("row_ids", "row_gradients"):
            message.ClearField(name)
        message.lookups.row_ids.CopyFrom(ids)
        message.lookups.scores.CopyFrom(tensor(scores))
        message.grad_output.CopyFrom(tensor(grad))
        return message

    others = [client.push(lookups(client)) for client in clients[1:]]
    gradients, first = clients[0].push(lookups(clients[0]))
    for other in others:
        acknowledged(other)
    rows = clients[0].rows(table)
    for _ in range(3):
        again, known = clients[0].push(lookups(clients[0]))
        assert np.array_equal(array(again.score_gradients), array(gradients.score_gradients))
        assert known.acknowledged.was_known
        assert not first.acknowledged.was_known
    assert np.array_equal(clients[0].rows(table), rows)


def test_a_push_sent_again_while_it_is_applied_is_answered_as_the_first(process: ServerProcess) -> None:
    """The update runs in a thread; whoever asks meanwhile must neither miss its answer nor hear of a disk too early."""
    client, name, num_rows, row_dim = RawClient(process.address), next(_names), 20_000, 128
    client.create(name, num_rows, row_dim)
    client.join()
    draw = np.random.default_rng(0)
    message = client.message(name, 1, num_rows, row_dim)
    for field in ("row_ids", "row_gradients"):
        message.ClearField(field)
    message.lookups.row_ids.CopyFrom(tensor(draw.integers(0, num_rows, (8_000, 16))))
    message.lookups.scores.CopyFrom(tensor(np.ones((8_000, 16), np.float32)))
    message.grad_output.CopyFrom(tensor(draw.standard_normal((8_000, row_dim)).astype(np.float32)))
    with ThreadPoolExecutor(12) as threads:

        def send(number: int) -> list[pb.PushReply]:
            time.sleep(0.03 * number)
            return list(client.push(message))

        answers = list(threads.map(send, range(12)))
    gradients = [b"".join(reply.score_gradients.data for reply in replies) for replies in answers]
    assert set(gradients) == {gradients[0]}
    assert len(gradients[0]) == 4 * 8_000 * 16
    assert client.join()[name] == 1


def test_a_late_push_is_acknowledged_and_changes_nothing(clients: list[RawClient], table: str) -> None:
    for step in (1, 2, 3):
        for pushing in [client.push(client.message(table, step)) for client in clients]:
            acknowledged(pushing)
    rows = clients[0].rows(table)
    answer = acknowledged(clients[2].push(clients[2].message(table, 1)))
    assert answer.was_known
    assert np.array_equal(clients[0].rows(table), rows)


def test_a_push_sent_again_with_other_contents_is_refused(clients: list[RawClient], table: str) -> None:
    first = clients[0].message(table, 1)
    waiting = clients[0].push(first)
    time.sleep(0.3)
    other = clients[0].message(table, 1)
    other.row_gradients.CopyFrom(tensor(np.zeros((5, 8), np.float32)))
    error = aborted(clients[0].push(other))
    assert error.code() is grpc.StatusCode.ABORTED
    assert "a push sent again must be the same; client 0, step 1" in error.details()
    for pushing in [*(client.push(client.message(table, 1)) for client in clients[1:]), waiting]:
        acknowledged(pushing)
    assert np.array_equal(clients[0].rows(table), in_order(clients, 1))


def test_a_client_that_is_late_is_named(clients: list[RawClient], table: str) -> None:
    for client in clients[:2]:
        client.deadline_s = 10.0  # the server answers a tenth of it before
    waiting = [client.push(client.message(table, 1)) for client in clients[:2]]
    for pushing in waiting:
        error = aborted(pushing)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "needs the pushes of all 3 clients within" in error.details()
        assert "late: client 2" in error.details()
    for client in clients:
        client.deadline_s = 60.0
    for pushing in [client.push(client.message(table, 1)) for client in clients]:  # all try again
        acknowledged(pushing)
    assert np.array_equal(clients[0].rows(table), in_order(clients, 1))


def test_a_gap_in_steps_waits_for_what_is_missing(clients: list[RawClient], table: str) -> None:
    early = [client.push(client.message(table, 2)) for client in clients]
    time.sleep(0.2)
    for pushing in [client.push(client.message(table, 1)) for client in clients] + early:
        acknowledged(pushing)
    assert np.array_equal(clients[0].rows(table), in_order(clients, 2))


def test_one_who_was_replaced_or_did_not_join_is_refused(clients: list[RawClient], table: str) -> None:
    later = RawClient(clients[0].channel._channel.target().decode(), 1, NUM_CLIENTS)
    later.join()
    error = aborted(clients[1].push(clients[1].message(table, 1)))
    assert error.code() is grpc.StatusCode.ABORTED
    assert "one process at a time may be client 1; another one has joined after this one" in error.details()
    clients[0].epoch += 1
    error = aborted(clients[0].push(clients[0].message(table, 1)))
    assert error.code() is grpc.StatusCode.ABORTED
    assert "a push must be of the server's epoch" in error.details()
    clients[0].epoch -= 1
    for pushing in [client.push(client.message(table, 1)) for client in (clients[0], later, clients[2])]:
        acknowledged(pushing)
    later.channel.close()


def test_messages_of_a_push_come_whole_and_in_order_or_it_is_not_taken(clients: list[RawClient], table: str) -> None:
    rows = clients[0].rows(table)

    def parts(*sequences: int, last: int) -> list[pb.PushRequest]:
        made = []
        for number in sequences:
            message = clients[0].message(table, 1, is_last=number == last, sequence=number)
            ids = np.arange(5, dtype=np.int64) + 5 * number
            message.row_ids.CopyFrom(tensor(ids))
            made.append(message)
        return made

    for messages in (parts(0, 2, last=2), parts(1, last=1), parts(0, 0, 1, last=1), parts(0, 1, last=9), []):
        error = aborted(clients[0].push(*messages))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    assert np.array_equal(clients[0].rows(table), rows)
    whole = clients[0].push(*parts(0, 1, 2, last=2))
    others = [client.push(client.message(table, 1)) for client in clients[1:]]
    for pushing in (whole, *others):
        assert not acknowledged(pushing).was_known
