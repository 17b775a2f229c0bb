"""Calls through the interceptors of a real server: who is let in, what is refused and how, what is counted."""

import asyncio
import gc
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from mfdist.table_server.auth import ALL_RIGHTS, RIGHTS, SERVICE, right_for
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.sections import LimitsConfig, SecurityConfig
from tests.table_server.served import Config, Served, serving, until

PROTO = Path(__file__).parents[2] / "table_server" / "proto" / "table_v1.proto"
DEADLINE_S = 20.0


def with_token(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def stub_of(channel: grpc.Channel) -> Any:
    return TableServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def plain() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture
def guarded(tmp_path: Path, tokens: dict[str, str]) -> Iterator[Served]:
    with serving(Config(security=SecurityConfig(token_file=tmp_path / "tokens.toml"))) as served:
        yield served


def refused(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def kind_of(error: Any) -> str | None:
    return dict(error.trailing_metadata()).get("mfdist-error")


def test_every_kind_of_call_passes_through(plain: Served) -> None:
    with grpc.insecure_channel(plain.address) as channel:
        stub = stub_of(channel)
        assert stub.Describe(pb.DescribeRequest(), timeout=DEADLINE_S).server_id == "echo"
        rows = stub.Gather(pb.GatherRequest(), timeout=DEADLINE_S)
        assert [row.version for row in rows] == [0, 1, 2]
        sent = [pb.LookupRequest(lookups=pb.Lookups(row_ids=pb.Tensor(data=bytes(size)))) for size in (0, 7, 100_000)]
        replies = stub.Lookup(iter(sent), timeout=DEADLINE_S)
        assert [len(reply.sums.data) for reply in replies] == [0, 7, 100_000]
        assert stub.Write(iter([pb.WriteRequest()] * 5), timeout=DEADLINE_S) == pb.WriteReply()
        assert stub.Write(iter([]), timeout=DEADLINE_S) == pb.WriteReply()


def test_calls_whose_requests_were_not_read_to_the_end_leave_nothing_for_the_collector(plain: Served) -> None:
    request = pb.LookupRequest(table="enough")
    gc.collect()
    gc.disable()
    try:
        with grpc.insecure_channel(plain.address) as channel:
            for _ in range(25):
                assert len(list(stub_of(channel).Lookup(iter([request] * 3), timeout=DEADLINE_S))) == 1
        until(lambda: sum(type(each).__name__ == "_ServicerContext" for each in gc.get_objects()) < 10)
    finally:
        gc.enable()


def test_calls_and_their_bytes_are_counted(plain: Served) -> None:
    request = pb.LookupRequest(lookups=pb.Lookups(row_ids=pb.Tensor(data=bytes(1000))))
    with grpc.insecure_channel(plain.address) as channel:
        replies = list(stub_of(channel).Lookup(iter([request] * 3), timeout=DEADLINE_S))
    assert plain.count('mfdist_requests_total{code="OK",method="Lookup"}') == 1
    assert plain.count('mfdist_request_bytes_total{method="Lookup"}') == 3 * request.ByteSize()
    assert plain.count('mfdist_reply_bytes_total{method="Lookup"}') == sum(reply.ByteSize() for reply in replies)
    assert plain.count('mfdist_request_seconds_count{method="Lookup"}') == 1
    assert plain.count('mfdist_requests_in_flight{method="Lookup"}') == 0


@pytest.mark.parametrize(
    ("table", "code", "kind", "says"),
    [
        ("row", grpc.StatusCode.OUT_OF_RANGE, "row_id", "row id 7 is outside"),
        ("disk", grpc.StatusCode.DATA_LOSS, "checkpoint", "ENOSPC"),
        ("defect", grpc.StatusCode.INTERNAL, "internal", "ZeroDivisionError"),
    ],
)
def test_errors_become_statuses(
    plain: Served, caplog: pytest.LogCaptureFixture, table: str, code: grpc.StatusCode, kind: str, says: str
) -> None:
    with grpc.insecure_channel(plain.address) as channel:
        error = refused(lambda: stub_of(channel).Drop(pb.DropRequest(table=table), timeout=DEADLINE_S))
    assert (error.code(), kind_of(error)) == (code, kind)
    assert says in error.details()
    assert "secret" not in error.details()
    assert plain.count(f'mfdist_requests_total{{code="{code.name}",method="Drop"}}') == 1
    assert ("ZeroDivisionError" in caplog.text) == (table == "defect")  # the traceback is for the operator


def test_a_cancelled_call_leaves_nothing_behind(plain: Served) -> None:
    with grpc.insecure_channel(plain.address) as channel:
        call = stub_of(channel).Drop.future(pb.DropRequest(table="wait"), timeout=DEADLINE_S)
        until(lambda: plain.count('mfdist_requests_in_flight{method="Drop"}') == 1)
        call.cancel()
        until(lambda: plain.count('mfdist_requests_in_flight{method="Drop"}') == 0)
    assert plain.count('mfdist_requests_total{code="CANCELLED",method="Drop"}') == 1


def test_what_is_no_message_of_the_protocol_is_refused(plain: Served, caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(plain.address) as channel:
        for method in ("Describe", "Lookup"):
            call = channel.unary_unary(f"/{SERVICE}/{method}")
            error = refused(partial(call, b"\xff" * 9, timeout=DEADLINE_S))
            assert (error.code(), kind_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "config")
        error = refused(lambda: channel.stream_unary(f"/{SERVICE}/Describe")(iter([]), timeout=DEADLINE_S))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        error = refused(lambda: channel.unary_unary(f"/{SERVICE}/Unknown")(b"", timeout=DEADLINE_S))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert plain.count('mfdist_refusals_total{reason="malformed"}') == 3
    assert "Traceback" not in caplog.text


def test_rights_are_those_of_the_protocol() -> None:
    said = re.findall(r"// [^\n]*Right: (\w+)\.\n\s*rpc (\w+)\(", PROTO.read_text("utf-8"))
    assert {name: right for right, name in said} == RIGHTS
    assert {method.name for method in pb.DESCRIPTOR.services_by_name["TableService"].methods} == set(RIGHTS)
    assert set(RIGHTS.values()) == ALL_RIGHTS
    assert right_for(f"/{SERVICE}/Tomorrow") == "admin"


CALLS = {
    "read": lambda stub, **more: stub.Describe(pb.DescribeRequest(), timeout=DEADLINE_S, **more),
    "push": lambda stub, **more: stub.Join(pb.JoinRequest(), timeout=DEADLINE_S, **more),
    "admin": lambda stub, **more: stub.Drop(pb.DropRequest(), timeout=DEADLINE_S, **more),
}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ((), "got none"),
        ((("authorization", "{token}"),), 'got something else than "Bearer TOKEN"'),
        ((("authorization", "Basic {token}"),), 'got something else than "Bearer TOKEN"'),
        ((("authorization", "Bearer x{token}"),), "got one that is not in the server's file"),
    ],
)
def test_what_is_no_token_is_told_from_none(
    guarded: Served, tokens: dict[str, str], metadata: tuple[tuple[str, str], ...], says: str
) -> None:
    sent = tuple((key, value.format(token=tokens["admin"])) for key, value in metadata)
    with grpc.insecure_channel(guarded.address) as channel:
        error = refused(partial(CALLS["read"], stub_of(channel), metadata=sent))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert f'needs a token in the metadata, "authorization: Bearer TOKEN"; {says}; ' in error.details()
    assert tokens["admin"] not in error.details()


def test_a_token_opens_what_its_rights_say(guarded: Served, tokens: dict[str, str]) -> None:
    allowed = {"reader": {"read"}, "trainer": {"read", "push"}, "admin": {"read", "push", "admin"}}
    with grpc.insecure_channel(guarded.address) as channel:
        for client, rights in allowed.items():
            for right, call in CALLS.items():
                if right in rights:
                    call(stub_of(channel), metadata=with_token(tokens[client]))
                    continue
                error = refused(partial(call, stub_of(channel), metadata=with_token(tokens[client])))
                assert (error.code(), kind_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "config")
                assert f'"{right}"' in error.details()


@pytest.mark.parametrize("sent", [None, "Bearer ", "Bearer wrong", "Basic {reader}", "{reader}", "Bearer {reader}x"])
def test_wrong_tokens_are_refused(
    guarded: Served, tokens: dict[str, str], caplog: pytest.LogCaptureFixture, sent: str | None
) -> None:
    metadata = () if sent is None else (("authorization", sent.format(**tokens)),)
    with grpc.insecure_channel(guarded.address) as channel:
        error = refused(lambda: CALLS["read"](stub_of(channel), metadata=metadata))
    assert (error.code(), kind_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "config")
    assert guarded.count('mfdist_refusals_total{reason="token"}') == 1
    [record] = [record for record in caplog.records if record.message.startswith("refused")]
    assert record.fields == {  # type: ignore[attr-defined]
        "method": "Describe", "client": None, "host": "127.0.0.1", "reason": "token", "code": "UNAUTHENTICATED"
    }  # fmt: skip
    assert not any(token in caplog.text + error.details() for token in tokens.values())


@pytest.mark.parametrize("num_messages", [1, 16])
def test_a_refusal_reaches_a_client_that_is_still_sending(guarded: Served, num_messages: int) -> None:
    """What it sends is taken in, so that gRPC's asyncio client reads the status, and is not looked at."""

    async def requests() -> AsyncIterator[pb.LookupRequest]:
        for _ in range(num_messages):
            yield pb.LookupRequest(lookups=pb.Lookups(row_ids=pb.Tensor(data=bytes(2**20))))

    async def talk() -> list[grpc.StatusCode]:
        codes = []
        for _ in range(5):
            async with grpc.aio.insecure_channel(guarded.address) as channel:
                call = stub_of(channel).Lookup(requests(), timeout=DEADLINE_S)
                with pytest.raises(grpc.aio.AioRpcError):
                    await call.read()
                codes.append(await call.code())
        return codes

    assert asyncio.run(talk()) == [grpc.StatusCode.UNAUTHENTICATED] * 5
    assert guarded.count('mfdist_request_bytes_total{method="Lookup"}') == 0


def test_a_client_that_never_stops_sending_is_answered_all_the_same(guarded: Served) -> None:
    async def talk() -> None:
        async with grpc.aio.insecure_channel(guarded.address) as channel:
            call = stub_of(channel).Lookup(timeout=DEADLINE_S)
            with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
                while True:
                    await call.write(pb.LookupRequest(lookups=pb.Lookups(row_ids=pb.Tensor(data=bytes(2**20)))))
            assert await call.code() is not grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(talk())


def test_wrong_tokens_are_limited_and_right_ones_are_not_kept_out(
    tmp_path: Path, tokens: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    security = SecurityConfig(token_file=tmp_path / "tokens.toml", failed_attempts_per_minute=3)
    with serving(Config(security=security)) as served, grpc.insecure_channel(served.address) as channel:
        errors = [
            refused(partial(CALLS["read"], stub_of(channel), metadata=with_token(f"guess-{number}")))
            for number in range(20)
        ]
        codes = [error.code().name for error in errors]
        assert codes == ["UNAUTHENTICATED"] * 3 + ["RESOURCE_EXHAUSTED"] * 17
        assert int(dict(errors[-1].trailing_metadata())["grpc-retry-pushback-ms"]) > 1000
        CALLS["read"](stub_of(channel), metadata=with_token(tokens["reader"]))
        assert served.count('mfdist_refusals_total{reason="token"}') == 20
    assert caplog.text.count("refused:") == 3
    assert "guess" not in caplog.text


def test_a_token_that_was_taken_back_opens_nothing(tmp_path: Path, guarded: Served, tokens: dict[str, str]) -> None:
    path = tmp_path / "tokens.toml"
    kept = path.read_text("utf-8").split("[tokens.trainer]")[0]
    with grpc.insecure_channel(guarded.address) as channel:
        CALLS["push"](stub_of(channel), metadata=with_token(tokens["trainer"]))
        path.write_text(kept, "utf-8")

        def is_refused() -> bool:
            try:
                CALLS["push"](stub_of(channel), metadata=with_token(tokens["trainer"]))
            except grpc.RpcError as error:
                return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
            return False

        until(is_refused)
        CALLS["read"](stub_of(channel), metadata=with_token(tokens["reader"]))
        path.write_text("not = [toml", "utf-8")  # the operator's slip closes nobody out
        time.sleep(1.1)  # the file is looked at once a second
        CALLS["read"](stub_of(channel), metadata=with_token(tokens["reader"]))


def test_over_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    limits = LimitsConfig(requests_per_s=0.05)  # a burst of one
    with serving(Config(limits=limits)) as served, grpc.insecure_channel(served.address) as channel:
        CALLS["read"](stub_of(channel))
        errors = [refused(lambda: CALLS["read"](stub_of(channel))) for _ in range(30)]
        assert {(error.code(), kind_of(error)) for error in errors} == {
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "unavailable")
        }
        assert 0 < int(dict(errors[0].trailing_metadata())["grpc-retry-pushback-ms"]) <= 20_000
        assert served.count('mfdist_refusals_total{reason="rate"}') == 30
    assert 1 <= caplog.text.count("refused:") <= 12  # the log does not grow with the flood


def test_over_the_bytes_waits_with_the_next_request() -> None:
    request = pb.LookupRequest(lookups=pb.Lookups(row_ids=pb.Tensor(data=bytes(2**20))))
    with serving(Config(limits=LimitsConfig(mib_per_s=0.01))) as served:
        with grpc.insecure_channel(served.address) as channel:
            assert (
                len(list(stub_of(channel).Lookup(iter([request] * 2), timeout=DEADLINE_S))) == 2
            )  # not cut in the middle
            error = refused(lambda: CALLS["read"](stub_of(channel)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "limits.mib_per_s" in error.details()


@pytest.mark.parametrize(("num_messages", "limit"), [(1, "max_message_mib"), (8, "max_request_mib")])
def test_over_the_size(caplog: pytest.LogCaptureFixture, num_messages: int, limit: str) -> None:
    limits = LimitsConfig(max_message_mib=1.0, max_request_mib=4.0)
    size = int(1.5 * 2**20) if num_messages == 1 else 2**20 - 100
    request = pb.WriteRequest(values=pb.Tensor(data=bytes(size)))
    with serving(Config(limits=limits)) as served, grpc.insecure_channel(served.address) as channel:
        error = refused(lambda: stub_of(channel).Write(iter([request] * num_messages), timeout=DEADLINE_S))
        assert (error.code(), kind_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "config")
        assert f"limits.{limit}" in error.details()
        assert served.count('mfdist_refusals_total{reason="size"}') == 1
        far_over = pb.DropRequest(table="x" * (3 * 2**20))
        error = refused(lambda: stub_of(channel).Drop(far_over, timeout=DEADLINE_S))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"limits.{limit}" in caplog.text


def test_over_the_number_in_flight() -> None:
    with serving(Config(limits=LimitsConfig(max_requests_in_flight=2))) as served:  # noqa: SIM117
        with grpc.insecure_channel(served.address) as channel:
            drop = stub_of(channel).Drop
            waiting = [drop.future(pb.DropRequest(table="wait"), timeout=DEADLINE_S) for _ in range(2)]
            until(lambda: served.count('mfdist_requests_in_flight{method="Drop"}') == 2)
            error = refused(lambda: drop(pb.DropRequest(), timeout=DEADLINE_S))
            assert (error.code(), kind_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "unavailable")
            served.loop.call_soon_threadsafe(served.echo.may_go_on.set)
            assert all(call.result().was_there for call in waiting)
            assert drop(pb.DropRequest(), timeout=DEADLINE_S).was_there


def test_a_request_has_a_line_at_debug(plain: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "mfdist.table_server"), grpc.insecure_channel(plain.address) as channel:
        CALLS["read"](stub_of(channel))
        until(lambda: any(record.message == "answered" for record in caplog.records))
    [record] = [record for record in caplog.records if record.message == "answered"]
    assert record.fields["method"] == "Describe"  # type: ignore[attr-defined]
    assert record.fields["code"] == "OK"  # type: ignore[attr-defined]
