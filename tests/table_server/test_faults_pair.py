"""Pairs of servers: the second goes on when the first is gone, and nothing acknowledged is lost."""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from mfdist.errors import ConfigError, ConsistencyError, UnavailableError
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from mfdist.table_server.proto import table_v1_pb2 as pb
from tests.table_server.pairs import (
    PLAN,
    connected,
    counters_of,
    described,
    made,
    primary_of,
    rows_of,
    running_pair,
    step,
)
from tests.table_server.processes import DEADLINE_S, ServerProcess, until
from tests.table_server.proxy import Proxy
from tests.table_server.raw_client import RawClient, acknowledged, tensor
from tests.table_server.training import OPTIMIZER, Clients, check_undisturbed


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[ServerProcess]]:
    with running_pair(tmp_path) as processes:
        yield processes


def error_of(call: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        list(call)  # type: ignore[call-overload]
    return raised.value


def kind_of(error: grpc.RpcError) -> str:
    return dict(error.trailing_metadata())["mfdist-error"]


@pytest.mark.parametrize("num_kills", [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])])
def test_training_ends_in_the_bits_of_a_run_that_nobody_disturbed(pair: list[ServerProcess], num_kills: int) -> None:
    """Any of the two is killed, mostly the primary; it comes back while training goes on, and has the same bits."""
    draw = random.Random(num_kills)
    clients = Clients([process.address for process in pair], [PLAN], replicas=2, failover_s=1.0)
    for _ in range(num_kills):
        clients.go_on(draw.randrange(1, 5))
        primary = primary_of(pair)
        killed = pair[primary if draw.random() < 0.8 else 1 - primary]
        time.sleep(draw.random() * draw.choice((0.01, 0.1)))
        killed.kill()
        clients.go_on(draw.randrange(1, 3))  # without it
        killed.start()
    last_step = clients.finish()
    check_undisturbed(clients, last_step)
    primary_of(pair)
    for process in pair:
        assert np.array_equal(rows_of(process), clients.rows[0].numpy())
        assert [shard.version for shard in described(process).shards] == [last_step]


def test_an_old_primary_that_wakes_up_is_fenced(pair: list[ServerProcess]) -> None:
    with connected(pair) as servers:
        table = made(servers)
        step(table, 1)
        servers.flush()
        old = primary_of(pair)
        before = described(pair[old])
        late = RawClient(pair[old].address, deadline_s=DEADLINE_S)
        late.join()  # in the place of the other client, which will join again
        os.kill(pair[old].pid, signal.SIGSTOP)
        pushed = late.push(late.message("one", 2, row_dim=PLAN.row_dim))
        step(table, 2)  # another push of the same number, at the new primary
        servers.flush()
        after = described(pair[1 - old])
        assert after.role == pb.PRIMARY
        assert after.epoch > before.epoch
        os.kill(pair[old].pid, signal.SIGCONT)
        error = error_of(pushed)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert primary_of(pair) == 1 - old
        error = error_of(late.push(late.message("one", 2, row_dim=PLAN.row_dim)))
        assert kind_of(error) == "not_primary"
        assert "rows must be changed at the primary; this server is the replica" in error.details()
        assert pair[1 - old].address in error.details()
        step(table, 3)
        servers.flush()
        late.channel.close()
        assert np.array_equal(rows_of(pair[old]), rows_of(pair[1 - old]))
        with connected(pair) as others:
            assert np.array_equal(made(others).rows().numpy(), rows_of(pair[old]))


def test_a_replica_that_was_away_catches_up_by_the_log_or_by_a_copy(pair: list[ServerProcess]) -> None:
    with connected(pair) as servers:
        table = made(servers)
        for number in range(1, 4):
            step(table, number)
        servers.flush()
        replica = pair[1 - primary_of(pair)]
        for is_saved in (False, True):
            replica.kill()
            for number in range(table.num_updates + 1, table.num_updates + 4):
                step(table, number)
            servers.flush()
            if is_saved:  # what it lacks is in no log any more
                servers.wait(servers.all(lambda owner: owner.once("Save", pb.SaveRequest())))
            replica.start()
            primary_of(pair)
            assert np.array_equal(rows_of(replica), table.rows().numpy())
            counters = counters_of(replica)
            assert counters.get("copied_shards", 0) == is_saved
            assert counters.get("followed_pushes", 0) == (0 if is_saved else 3)


def test_a_replica_that_lacks_what_was_acknowledged_does_not_take_over(pair: list[ServerProcess]) -> None:
    with connected(pair, deadline_s=6.0) as servers:
        table = made(servers)
        step(table, 1)
        servers.flush()
        primary = primary_of(pair)
        pair[1 - primary].kill()
        step(table, 2)
        servers.flush()  # the primary goes on alone, and this client knows
        pair[primary].kill()
        pair[1 - primary].start()
        with pytest.raises(UnavailableError, match="a replica must have all that was acknowledged to take over"):
            table.rows()
        pair[primary].start()
        assert table.rows().isfinite().all()
        assert primary_of(pair) == primary
        step(table, 3)
        servers.flush()
        assert np.array_equal(rows_of(pair[1 - primary]), table.rows().numpy())


def test_one_that_goes_on_alone_acknowledges_nothing_until_all_clients_know(tmp_path: Path) -> None:
    """Asynchronous, so that a push is an update by itself, and waits for nothing but the other client's knowing."""
    with running_pair(tmp_path, consistency="asynchronous") as pair:
        with connected(pair, num_clients=2) as servers:
            made(servers).resume()
        primary = primary_of(pair)
        clients = [RawClient(pair[primary].address, number, 2) for number in range(2)]
        for client in clients:
            client.join()
        pair[1 - primary].kill()
        until(lambda: not described(pair[primary]).is_in_sync)
        stale = error_of(clients[0].push(clients[0].message("one", 1, row_dim=PLAN.row_dim)))
        assert stale.code() is grpc.StatusCode.UNAVAILABLE
        assert "join again" in stale.details()
        clients[0].join()
        clients[0].deadline_s = 2.0
        unknown = error_of(clients[0].push(clients[0].message("one", 1, row_dim=PLAN.row_dim)))
        assert unknown.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: described(pair[primary]).shards[0].version == 1)  # it is applied, and was not acknowledged
        clients[1].join()
        clients[0].deadline_s = DEADLINE_S
        answer = acknowledged(clients[0].push(clients[0].message("one", 1, row_dim=PLAN.row_dim)))
        assert answer.was_known
        for client in clients:
            client.channel.close()


def test_a_client_that_does_nothing_joins_again_too(pair: list[ServerProcess]) -> None:
    """Another one's acknowledgement waits for all clients, and this one has nothing to ask for."""
    with connected(pair, num_clients=2) as servers:
        table = made(servers)
        primary = primary_of(pair)
        other = RawClient(pair[primary].address, 1, 2)
        other.join()
        message = other.message("one", 1, row_dim=PLAN.row_dim)
        message.lr = OPTIMIZER.lr
        pushed = other.push(message)
        step(table, 1)
        servers.flush()
        assert acknowledged(pushed).step == 1
        pair[1 - primary].kill()
        until(lambda: not described(pair[primary]).is_in_sync)
        other.join()
        message.session, message.epoch = other.session, other.epoch
        assert acknowledged(other.push(message)).was_known
        assert table.rows().isfinite().all()
        other.channel.close()


def test_what_is_acknowledged_may_wait_for_another_client(pair: list[ServerProcess]) -> None:
    """The server that goes on holds the push and has not applied it: nothing is lost, and nobody says so."""
    with connected(pair, num_clients=2) as servers:
        table = made(servers)
        primary = primary_of(pair)
        table.resume()
        clients = [RawClient(pair[primary].address, number, 2, deadline_s=3.0) for number in range(2)]
        clients[1].join()
        message = clients[1].message("one", 1, row_dim=PLAN.row_dim)
        message.lr = OPTIMIZER.lr
        assert error_of(clients[1].push(message)).code() in (
            grpc.StatusCode.DEADLINE_EXCEEDED,  # it is not applied: client 0 has not pushed
            grpc.StatusCode.UNAVAILABLE,
        )
        until(lambda: counters_of(pair[1 - primary]).get("followed_pushes", 0) >= 1)
        pair[primary].kill()
        with connected(pair, client=1, num_clients=2) as others:
            owner = others.owner(0)
            others.wait(owner.join())
            assert owner.steps["one"] == 0
            owner.acknowledged["one"] = 1
            others.wait(owner.join())  # it holds step 1
            owner.acknowledged["one"] = 2
            with pytest.raises(ConsistencyError, match=r"must have what was acknowledged; .* has 1 of 2 steps"):
                others.wait(owner.join())
        for client in clients:
            client.channel.close()


def test_two_clients_that_reach_different_servers_end_at_one(pair: list[ServerProcess]) -> None:
    """The first client loses the primary, the primary its replica: both servers would go on, and one of them may."""
    proxies = [Proxy(process.address) for process in pair]
    between = [Proxy(process.address) for process in pair]
    try:
        for process, proxy in zip(pair, reversed(between), strict=True):
            process.kill()
            process.peer = proxy.address
            process.start()
        with (
            TableServers([proxy.address for proxy in proxies], num_clients=2, replicas=2, failover_s=0.5) as one,
            connected(pair, client=1, num_clients=2) as other,
        ):
            tables = [made(one), made(other)]

            def both(number: int) -> None:
                with ThreadPoolExecutor(2) as threads:
                    list(threads.map(step, tables, (number, number)))
                assert [table.num_updates for table in tables] == [number, number]

            both(1)
            one.flush()
            other.flush()
            primary = primary_of(pair)
            proxies[primary].cut()
            for proxy in between:
                proxy.cut()
            for number in range(2, 6):
                both(number)
            one.flush()
            other.flush()
            assert described(pair[1 - primary]).role == pb.PRIMARY
            for proxy in between:
                proxy.mend()
            assert primary_of(pair) == 1 - primary
            both(6)
            one.flush()
            other.flush()
            assert np.array_equal(rows_of(pair[0]), rows_of(pair[1]))
            assert described(pair[primary]).shards[0].version == 6
    finally:
        for proxy in (*proxies, *between):
            proxy.close()


def test_what_is_not_a_push_is_on_both_too(pair: list[ServerProcess], tmp_path: Path) -> None:
    """Tables made, written, saved, trained otherwise, loaded and dropped; each time the other one has it at once."""
    with connected(pair, failover_s=0.3) as servers:

        def fail_over() -> None:
            killed = pair[primary_of(pair)]
            killed.kill()
            servers.flush()
            servers.describe()
            killed.start()

        table = made(servers)
        written = torch.randn(PLAN.num_rows, PLAN.row_dim)
        primary_of(pair)
        table.load_rows(written)
        fail_over()
        assert torch.equal(table.rows(), written)
        step(table, 1)
        servers.save(str(tmp_path / "saved"), 1)
        saved = table.rows()
        primary_of(pair)
        table.fuse(None)
        table.fuse(OPTIMIZER)
        fail_over()
        assert torch.equal(table.rows(), saved)
        step(table, 2)
        servers.flush()
        primary_of(pair)
        servers.load(str(tmp_path / "saved"))
        table.resume()
        fail_over()
        assert table.num_updates == 1
        assert torch.equal(table.rows(), saved)
        primary_of(pair)
        servers.drop("one")
        fail_over()
        primary_of(pair)
        assert [len(described(process).shards) for process in pair] == [0, 0]


def test_asynchronous_pushes_survive_too(tmp_path: Path) -> None:
    """Gradients are powers of two, whose sums do not depend on their order."""
    with running_pair(tmp_path, consistency="asynchronous") as pair:
        with connected(pair) as servers:
            made(servers).resume()
        plan_rows, steps, client = None, 0, None
        for _ in range(2):
            primary = primary_of(pair)
            client = RawClient(pair[primary].address)
            if plan_rows is None:
                client.create("sums", row_dim=4, lr=1.0)
                plan_rows = client.rows("sums")
            assert client.join()["sums"] == steps
            for number in range(steps + 1, steps + 6):
                message = client.message("sums", number, row_dim=4)
                message.row_ids.CopyFrom(tensor(np.arange(2, dtype=np.int64)))
                message.row_gradients.CopyFrom(tensor(np.full((2, 4), 2.0, np.float32)))
                acknowledged(client.push(message))
            steps += 5
            client.channel.close()
            pair[primary].kill()
            connected(pair).close()
            pair[primary].start()
        primary_of(pair)
        for process in pair:
            rows = rows_of(process, "sums")
            assert np.allclose(rows[:2], plan_rows[:2] - 0.1 * 2.0 * steps, atol=1e-4)
            assert np.array_equal(rows[2:], plan_rows[2:])
        assert np.array_equal(rows_of(pair[0], "sums"), rows_of(pair[1], "sums"))


def test_servers_that_are_no_pair_are_told_so(tmp_path: Path) -> None:
    processes = [ServerProcess(tmp_path / name).start() for name in "ab"]
    try:
        addresses = [process.address for process in processes]
        with pytest.raises(ConfigError, match="servers of a pair must be told of each other"):
            TableServers(addresses, replicas=2, deadline_s=5.0)
        with pytest.raises(ConfigError, match="replicas=2 and 1 addresses"):
            TableServers(addresses[:1], replicas=2)
        client = RawClient(addresses[0])
        with pytest.raises(grpc.RpcError) as raised:
            client.stub.Promote(pb.PromoteRequest(), timeout=DEADLINE_S)
        assert kind_of(raised.value) == "config"
        client.channel.close()
    finally:
        for process in processes:
            process.kill()
    unlogged = ServerProcess(tmp_path / "c", durability="checkpoint")
    unlogged.peer = addresses[0]
    with pytest.raises(ConfigError, match="servers of a pair must log pushes"):
        unlogged.start()


def test_an_update_that_is_gone_is_noticed(pair: list[ServerProcess]) -> None:
    """Both copies are lost, and the client is told, not left to go on with other rows."""
    with connected(pair, deadline_s=5.0) as servers:
        table = made(servers)
        step(table, 1)
        servers.flush()
        primary_of(pair)
        for process in pair:
            process.kill()
            process.data = process.data.with_name(process.data.name + "-new")
        for process in pair:
            process.start()
        with connected(pair) as others:
            RemoteTable(PLAN, others, std=1.0, seed=7, fuse=OPTIMIZER)
        with pytest.raises(
            (ConsistencyError, UnavailableError), match=r"must have (all|what) (that )?was acknowledged"
        ):
            servers.wait(servers.all(lambda owner: owner.join()))
