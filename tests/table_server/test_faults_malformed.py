"""Requests that make no sense, as messages and as raw bytes: refused, and nothing of them is left."""

import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mfdist.table_server.proto import table_v1_pb2 as pb
from tests.table_server.processes import ServerProcess, server
from tests.table_server.raw_client import RawClient, acknowledged, tensor

SERVICE = pb.DESCRIPTOR.services_by_name["TableService"]
#: Save and Load name folders, which are tested apart.
METHODS = [method for method in SERVICE.methods if method.name not in ("Save", "Load", "Stats")]
#: Threads that ask at once.
_ASKING = 8
CHANGING = {"Create", "Drop", "Train", "Write"}
NUMBERS = (0, 1, 2, 3, 5, 8, 64, 65, 255, 1 << 16, (1 << 31) - 1, 1 << 40, (1 << 62), -1, -(1 << 40))
#: What most requests have, so that they come further than its check.
LIKELY = {
    "min_version": 0,
    "version": 1,
    "epoch": 1,
    "dtype": 1,
    "reply_dtype": 1,
    "rule": 1,
    "client": 0,
    "num_rows": 64,
}
LIKELY |= {"row_begin": 0, "row_end": 64, "column_begin": 0, "column_end": 8, "row_dim": 8, "code_stride": 0}
REFUSALS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,  # for what waits, and for clients that did not join
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Maker:
    """Makes messages of any type from a source of numbers: mostly of the right kind, and mostly wrong."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def tensor(self) -> pb.Tensor:
        draw = self.draw
        name = draw.choice(("float32", "int64", "int32", "uint8"))
        shape = [draw.choice((0, 1, 2, 3, 8)) for _ in range(draw.choice((1, 2, 2, 2, 3)))]
        size = int(np.prod(shape))
        numbers = [draw.choice((0, 1, 7, 63, 64, 200)) for _ in range(size)]
        made = tensor(np.array(numbers, np.int64).astype(name).reshape(shape))
        fault = draw.randrange(8)
        if fault == 0:
            made.shape[draw.randrange(len(shape))] = draw.choice(NUMBERS)
        elif fault == 1:
            made.data = made.data[1:] + bytes(draw.choice((0, 1, 4)))
        elif fault == 2:
            made.dtype = draw.choice((0, 2, 3, 4, 5, 7, 10, 99))
        elif fault == 3:
            made.crc32c = draw.randrange(1 << 32)
        elif fault == 4:
            made.row_scales = bytes(draw.choice((0, 4, 8, 12)))
        elif fault == 5:
            made.shape.extend([draw.choice(NUMBERS), 0])
        return made

    def message(self, descriptor: Descriptor, table: str) -> Message:
        if descriptor.name == "Tensor":
            return self.tensor()
        draw, made = self.draw, GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if field.name == "table" and field.type == FieldDescriptor.TYPE_STRING:
                made.table = table
            elif draw.random() < 0.25 or (field.message_type is not None and field.is_repeated):
                continue
            elif field.message_type is not None:
                getattr(made, field.name).CopyFrom(self.message(field.message_type, table))
            else:
                self._set(made, field)
        return made

    def _set(self, made: Message, field: FieldDescriptor) -> None:
        draw = self.draw
        if field.is_repeated:
            getattr(made, field.name).extend(draw.choice(NUMBERS[:8]) for _ in range(draw.randrange(3)))
        elif field.type == FieldDescriptor.TYPE_STRING:
            setattr(made, field.name, draw.choice(("", "other", "exp_avg", "ü", "x" * 300, "a/b")))
        elif field.type == FieldDescriptor.TYPE_BYTES:
            setattr(made, field.name, bytes(draw.randrange(20)))
        elif field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
            setattr(made, field.name, draw.choice((0.0, 0.1, -1.0, float("nan"), float("inf"), 1e300)))
        elif field.type == FieldDescriptor.TYPE_BOOL:
            setattr(made, field.name, draw.random() < 0.5)
        else:
            number = draw.choice(NUMBERS)
            if field.name == "session":
                number = draw.getrandbits(64)
            elif field.name in LIKELY and draw.random() < 0.9:
                number = LIKELY[field.name]
            is_small = field.type in (
                FieldDescriptor.TYPE_INT32,
                FieldDescriptor.TYPE_UINT32,
                FieldDescriptor.TYPE_ENUM,
            )
            is_signed = field.type in (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_INT32)
            limit = (1 << 31) if is_small else (1 << 63)
            setattr(
                made, field.name, number % limit if is_small or not is_signed else max(-limit, min(limit - 1, number))
            )


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server(tmp_path_factory.mktemp("server"), memory_bytes=16 << 30) as running:
        yield running


@pytest.fixture(scope="module")
def victim(process: ServerProcess) -> Iterator[RawClient]:
    """A client whose table must come out of this unharmed."""
    client = RawClient(process.address)
    for name in ("victim", "other"):
        client.create(name)
    client.join()
    for step in (1, 2, 3):
        acknowledged(client.push(client.message("victim", step)))
    yield client
    client.channel.close()


def call(client: RawClient, maker: Maker) -> str:
    """Call something with nonsense; return what came back, which must be in the protocol."""
    method = maker.draw.choice(METHODS)
    table = maker.draw.choice(("other", "other", "other", "nobody", "", "x" * 300))
    if method.name not in CHANGING and maker.draw.random() < 0.4:
        table = "victim"
    number = maker.draw.choice((0, 1, 1, 1, 2, 3)) if method.client_streaming else 1
    messages = [maker.message(method.input_type, table) for _ in range(number)]
    if method.name == "Drop":
        messages[0].table = "nobody"  # type: ignore[attr-defined]
    if method.name == "Create":
        for each in messages:
            each.shard.table.name = table  # type: ignore[attr-defined]
    if method.name == "Join":
        messages[0].num_clients = 1  # type: ignore[attr-defined]
        messages[0].client = 5  # type: ignore[attr-defined]
    if method.client_streaming and messages and maker.draw.random() < 0.7:
        for at, each in enumerate(messages):
            if "sequence" in method.input_type.fields_by_name:
                each.sequence, each.is_last = at, at == len(messages) - 1  # type: ignore[attr-defined]
    stub = getattr(client.stub, method.name)
    try:
        replies = stub(iter(messages) if method.client_streaming else messages[0], timeout=0.5)
        if method.server_streaming:
            list(replies)
    except grpc.RpcError as error:
        assert error.code() in REFUSALS, (method.name, messages, error.details())
        return str(error.code().name)
    return "OK"


def check_unharmed(client: RawClient, rows: "np.ndarray[Any, Any]") -> None:
    assert np.array_equal(client.rows("victim"), rows)


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=False))
def test_messages_that_make_no_sense_are_refused(
    process: ServerProcess, victim: RawClient, draw: random.Random
) -> None:
    rows = victim.rows("victim")
    maker = Maker(draw)
    for _ in range(4):
        call(victim, maker)
    assert process.is_running
    check_unharmed(victim, rows)


@pytest.mark.parametrize(
    "num_requests", [2_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_requests_that_make_no_sense_leave_no_trace(
    process: ServerProcess, victim: RawClient, num_requests: int
) -> None:
    """Nine in ten are messages, most others noise in frames of gRPC, and one in a hundred is no HTTP/2 at all."""
    rows = victim.rows("victim")
    refused: Counter[str] = Counter()

    def ask(number: int, seed: int) -> None:
        client, maker = RawClient(process.address), Maker(random.Random(seed))
        for at in range(number):
            if at % 100 == 99:
                throw(process.address, maker.draw)
            elif at % 10 == 9:
                refused[noise(client, maker.draw)] += 1
            else:
                refused[call(client, maker)] += 1
        client.channel.close()

    def ask_all(number: int, seed: int) -> None:
        with ThreadPoolExecutor(_ASKING) as threads:  # together, for many of them wait for what never comes
            for done in [threads.submit(ask, number // _ASKING, seed + each) for each in range(_ASKING)]:
                done.result()

    ask_all(num_requests // 20, 100)
    before = process.memory_bytes
    ask_all(num_requests - num_requests // 20, 200)
    assert process.is_running
    check_unharmed(victim, rows)
    grown = process.memory_bytes - before
    print(f"{sum(refused.values())} requests: {dict(refused.most_common())}; memory {before} {grown:+d} bytes")
    assert grown < 0.1 * before + (32 << 20)
    assert len(refused) > 4
    assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 300


@pytest.mark.parametrize("num_tokens", [3_000_000, (1 << 32) - 1])
def test_a_few_bytes_cannot_ask_for_gigabytes(process: ServerProcess, victim: RawClient, num_tokens: int) -> None:
    before = process.memory_bytes
    lookups = pb.Lookups(
        row_ids=tensor(np.zeros(1, np.int64)),
        scores=tensor(np.ones(1, np.float32)),
        tokens=tensor(np.zeros(1, np.int32)),
        num_tokens=num_tokens,
    )
    wide = pb.Lookups(row_ids=pb.Tensor(dtype=pb.INT64, shape=[num_tokens // 2, 0]))
    wide.scores.CopyFrom(pb.Tensor(dtype=pb.FLOAT32, shape=[num_tokens // 2, 0]))
    for each in (lookups, wide):
        with pytest.raises(grpc.RpcError, match="the sums of one message must fit into one of") as raised:
            list(victim.stub.Lookup(iter([pb.LookupRequest(table="victim", lookups=each)]), timeout=30))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert process.memory_bytes < before + (64 << 20)


@pytest.mark.parametrize("shape", [(1 << 40, 8), (1 << 62, 8), (8, 1 << 62), (1 << 33, 8)])
def test_a_table_that_no_memory_holds_is_refused(victim: RawClient, shape: tuple[int, int]) -> None:
    with pytest.raises(grpc.RpcError, match="a shard must fit into the server's memory") as raised:
        victim.create("huge", *shape)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def throw(address: str, draw: random.Random) -> None:
    """Send bytes that are no HTTP/2, or begin as if they were."""
    host, _, port = address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings_frame = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    begin = draw.choice((b"", preface, preface + settings_frame, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"))
    with socket.create_connection((host, int(port)), 10.0) as raw:
        try:
            raw.sendall(begin + draw.randbytes(draw.choice((0, 1, 9, 100, 5_000))))
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(65536):
                pass
        except OSError:  # it hung up, as it may
            pass


def test_bytes_that_are_no_protocol_are_cut_off(process: ServerProcess, victim: RawClient) -> None:
    rows, draw = victim.rows("victim"), random.Random(7)
    for _ in range(300):
        throw(process.address, draw)
    assert process.is_running
    check_unharmed(victim, rows)
    assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 200


def noise(client: RawClient, draw: random.Random) -> str:
    """Send valid frames of gRPC around anything; return what came back."""
    method = draw.choice(METHODS)
    kind = "stream" if method.client_streaming else "unary"
    made = getattr(client.channel, f"{kind}_{'stream' if method.server_streaming else 'unary'}")
    raw = made(f"/{SERVICE.full_name}/{method.name}", None, None)
    data = draw.randbytes(draw.choice((1, 2, 10, 300, 4_000)))
    try:
        replies = raw(iter([data]) if method.client_streaming else data, timeout=0.5)
        if method.server_streaming:
            list(replies)
    except grpc.RpcError as error:
        # What cannot be parsed gRPC itself answers with INTERNAL.
        assert error.code() in REFUSALS | {grpc.StatusCode.INTERNAL}, (method.name, error.details())
        return str(error.code().name)
    return "OK"


def test_messages_whose_bytes_are_noise_are_refused(process: ServerProcess, victim: RawClient) -> None:
    """What protobuf cannot read must not reach a table."""
    rows, draw = victim.rows("victim"), random.Random(8)
    for _ in range(600):
        noise(victim, draw)
    assert process.is_running
    check_unharmed(victim, rows)
