"""Packing: what goes into one message to each rank comes out of it as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfdist.sharding.packing import WORD_BYTES, Part, columns_apart, pack, unpack

DTYPES = (torch.uint8, torch.uint16, torch.bfloat16, torch.int32, torch.float32, torch.int64, torch.float64)


@st.composite
def exchanges(draw):
    """Return a world size, and for each part its dtype and how many elements each rank has for each other."""
    world_size = draw(st.integers(1, 4))
    counts = st.lists(st.lists(st.integers(0, 9), min_size=world_size, max_size=world_size), min_size=world_size,
                      max_size=world_size)  # fmt: skip
    parts = draw(st.lists(st.tuples(st.sampled_from(DTYPES), counts), min_size=1, max_size=3))
    return world_size, parts


@given(exchanges())
def test_what_is_packed_arrives(drawn):
    world_size, parts = drawn
    values = [
        [torch.arange(sum(line)).add(100 * rank).to(dtype).split(line) for rank, line in enumerate(counts)]
        for dtype, counts in parts
    ]
    made = []
    for rank in range(world_size):
        arriving = [[line[rank] for line in counts] for _, counts in parts]
        largest = [max(map(max, counts)) for _, counts in parts]
        made.append(
            [
                Part(pieces=pieces[rank], arriving=come, largest=most)
                for pieces, come, most in zip(values, arriving, largest, strict=True)
            ]
        )
    packed = [pack(each, rank) for rank, each in enumerate(made)]
    for rank, each in enumerate(packed):
        assert each.sizes[rank] == each.arriving[rank] == 0
        assert each.joined().numel() == sum(each.sizes)
        assert max(each.sizes) <= sum(part.largest_words for part in made[rank])
        messages = [one.joined().split(one.sizes)[rank] for one in packed]
        assert [message.numel() for message in messages] == each.arriving
        for one, message in zip(packed, messages, strict=True):
            if message.numel():
                written = torch.full_like(message, -1)
                one.write(rank, written)
                assert torch.equal(written, message)
        found = unpack(messages, made[rank], rank)
        for got, (dtype, _), pieces in zip(found, parts, values, strict=True):
            wanted = torch.cat([one[rank] for one in pieces])
            assert got.dtype == dtype and torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    total = sum(
        sum(line) * dtype.itemsize - line[rank] * dtype.itemsize
        for dtype, counts in parts
        for rank, line in enumerate(counts)
    )
    assert sum(sum(each.payload_bytes) for each in packed) == total


def test_pieces_that_begin_within_a_word():
    whole = torch.arange(40, dtype=torch.int32)
    part = Part.cut(whole[1:], [3, 36], [3, 8], 36)  # 36 · 4 bytes are whole words, which begin 4 bytes late
    packed = pack([part], 0)
    assert packed.sizes == [0, 18] and packed.payload_bytes == [0, 36 * 4]
    assert torch.equal(packed.joined().view(torch.int32), whole[4:])
    (found,) = unpack([whole[:0], torch.arange(8, dtype=torch.int32)], [part], 0)
    assert found.tolist() == [1, 2, 3, *range(8)]


@pytest.mark.parametrize("own_size", [0, 2])
def test_what_is_lent_is_not_kept(own_size):
    part = Part(pieces=[torch.arange(own_size), torch.arange(3)], arriving=[own_size, 4], largest=4)
    message = torch.arange(4)
    (found,) = unpack([message[:0], message], [part], 0, is_lent=True)
    message.fill_(-1)
    assert found.tolist() == [*range(own_size), *range(4)]


@pytest.mark.parametrize("num_elements", [5, 6])
def test_one_tensor_for_all_ranks(num_elements):
    own = torch.arange(float(num_elements), requires_grad=True)
    packed = pack([Part(pieces=[own] * 3, arriving=[0, num_elements, 1], largest=num_elements)], 1)
    assert packed.sizes == [3, 0, 3] and packed.arriving == [0, 0, 1]
    first, last = packed.joined().view(torch.float32).split(3 * WORD_BYTES // 4)
    assert first[:num_elements].tolist() == last[:num_elements].tolist() == own.tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_columns_apart(dtype):
    values = torch.arange(5 * 24).view(5, 24).to(dtype)
    late = torch.arange(5 * 24 + 1).to(dtype)[1:].view(5, 24)
    empty = torch.zeros((), dtype=dtype).expand(0, 24)
    for each in (values, late, values[1:], values[:, 1:], values[:, :16], values[:0], empty, empty[:, :15]):
        for begin, end in ((0, 8), (8, 16), (3, 11), (0, 15), (4, 4)):
            got = columns_apart(each, begin, end)
            assert got.is_contiguous() and torch.equal(got, each[:, begin:end])
            assert not got.numel() or got.data_ptr() != each[:, begin:end].data_ptr()
