"""Frames against protobuf's own classes: the same messages, the same bytes, and the same refusals."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdist.table_server.codec import packed, unpacked
from mfdist.table_server.frames import Frame, reader
from mfdist.table_server.proto import table_v1_pb2 as pb

KINDS = (pb.LookupRequest, pb.LookupReply, pb.PushRequest, pb.PushReply)
TENSORS = {
    pb.LookupRequest: ("lookups.row_ids", "lookups.scores", "lookups.tokens"),
    pb.LookupReply: ("sums",),
    pb.PushRequest: ("lookups.row_ids", "lookups.scores", "lookups.tokens", "grad_output", "row_ids", "row_gradients"),
    pb.PushReply: ("score_gradients",),
}


def at(message: Any, path: str) -> Any:
    for name in path.split("."):
        message = message.part(name) if isinstance(message, Frame) else getattr(message, name)
    return message


def made(kind: Any, draw: random.Random) -> Any:
    message = kind()
    for path in TENSORS[kind]:
        if draw.random() < 0.6:
            tensor = at(message, path)
            tensor.dtype, tensor.data = draw.randrange(12), draw.randbytes(draw.choice((0, 1, 127, 128, 20_000)))
            tensor.shape.extend(draw.choice((0, -1, 7, 1 << 40)) for _ in range(draw.randrange(4)))
            if draw.random() < 0.5:
                tensor.crc32c = draw.getrandbits(32)
            tensor.row_scales = draw.randbytes(draw.choice((0, 4)))
    if kind is pb.LookupRequest:
        message.table, message.min_version = draw.choice(("", "a", "ü" * 100)), draw.getrandbits(63)
        message.lookups.num_tokens = draw.getrandbits(32)
    if kind is pb.PushRequest:
        message.session, message.lr, message.is_last = draw.getrandbits(64), draw.random(), draw.random() < 0.5
    return message


def check_alike(frame: Frame, message: Any, kind: Any) -> None:
    for path in TENSORS[kind]:
        tensor, expected = at(frame, path), at(message, path)
        assert bytes(tensor.data or b"") == expected.data
        without = pb.Tensor.FromString(expected.SerializeToString())
        without.ClearField("data")
        assert tensor.head == without
    assert kind.FromString(frame.serialized()) == message


@settings(deadline=None, max_examples=300)
@given(draw=st.integers(0, 1 << 32).map(random.Random))
def test_a_frame_is_the_message_that_protobuf_reads(draw: random.Random) -> None:
    kind = draw.choice(KINDS)
    message = made(kind, draw)
    check_alike(reader(kind)(message.SerializeToString()), message, kind)


@settings(deadline=None, max_examples=200)
@given(draw=st.integers(0, 1 << 32).map(random.Random))
def test_fields_that_come_twice_are_merged(draw: random.Random) -> None:
    """The bytes of two messages one after the other are both of them merged, says protobuf."""
    kind = draw.choice(KINDS)
    data = made(kind, draw).SerializeToString() + made(kind, draw).SerializeToString()
    check_alike(reader(kind)(data), kind.FromString(data), kind)


@settings(deadline=None, max_examples=500)
@given(draw=st.integers(0, 1 << 32).map(random.Random))
def test_damaged_bytes_are_read_as_protobuf_reads_them_or_refused(draw: random.Random) -> None:
    kind = draw.choice(KINDS)
    data = bytearray(made(kind, draw).SerializeToString() + draw.randbytes(draw.randrange(4)))
    for _ in range(draw.randrange(1, 4)):
        if data:
            data[draw.randrange(min(40, len(data)))] = draw.randrange(256)
    data = data[: draw.choice((len(data), draw.randrange(len(data) + 1)))]
    try:
        message = kind.FromString(bytes(data))
    except DecodeError:
        with pytest.raises(DecodeError):
            reader(kind)(bytes(data))
        return
    frame = reader(kind)(bytes(data))
    for path in TENSORS[kind]:
        assert bytes(at(frame, path).data or b"") == at(message, path).data


def test_a_tensors_data_are_views_of_what_was_received() -> None:
    values = torch.randn(30, 8)
    received = Frame(pb.LookupReply(version=3), {"sums": packed(values)}).serialized()
    sums = reader(pb.LookupReply)(received).part("sums")
    assert isinstance(sums.data, memoryview)
    assert sums.data.obj is received
    assert torch.equal(unpacked([sums], "sums"), values)


def test_what_owns_its_data_does_not_change_with_the_tensor() -> None:
    values = torch.randn(4, 8)
    before = values.clone()
    frame = Frame(pb.LookupReply(), {"sums": packed(values)}).owning()
    values.zero_()
    assert torch.equal(unpacked([frame.part("sums")], "sums"), before)


def test_fields_of_later_versions_are_passed_over() -> None:
    message = pb.LookupReply(sums=pb.Tensor(dtype=pb.UINT8, shape=[3], data=b"abc"), version=5)
    later = bytes((0xFA, 0x07, 2, 1, 2)) + message.SerializeToString() + bytes((0x82, 0x08, 1, 9))  # 127 and 128
    frame = reader(pb.LookupReply)(later)
    assert frame.head.version == 5
    assert np.array_equal(unpacked([frame.part("sums")], "sums").numpy(), np.frombuffer(b"abc", np.uint8))
