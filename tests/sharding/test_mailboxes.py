"""Mailboxes among threads of one process, which write into each other's memory and wait at a barrier."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mfdist.sharding import mailboxes
from mfdist.sharding.mailboxes import Lent, Mailboxes, slot_bytes

WAIT_S = 20.0


def on_ranks(world_size, num_bytes, work):
    """Return what `work` gives on each rank, called with its number and mailboxes of so many bytes a rank."""
    memory = [torch.full((num_bytes,), 0xAA, dtype=torch.uint8) for _ in range(world_size)]
    barrier = threading.Barrier(world_size)
    with ThreadPoolExecutor(world_size) as threads:
        boxes = [Mailboxes(rank, memory, lambda: barrier.wait(WAIT_S)) for rank in range(world_size)]
        return list(threads.map(work, range(world_size), boxes))


def values(size, source, target, turn, dtype):
    return (torch.arange(size) * (turn + 3 * source + 7 * target + 1) % 251).to(dtype)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_what_arrives_is_there_until_the_next_message_however_late_ranks_are(world_size):
    def work(rank, boxes):
        same, own = random.Random(world_size), random.Random(rank)
        for turn in range(120):
            most, dtype = same.randrange(1, 200), same.choice((torch.uint8, torch.float32, torch.int64, torch.bfloat16))
            sizes = [[same.randrange(most + 1) for _ in range(world_size)] for _ in range(world_size)]
            pieces = [values(size, rank, target, turn, dtype) for target, size in enumerate(sizes[rank])]
            wanted = [values(line[rank], source, rank, turn, dtype) for source, line in enumerate(sizes)]
            if own.random() < 0.2:
                time.sleep(0.002)
            arriving = [line[rank] for line in sizes]
            lent = boxes.lend(
                lambda to, part, pieces=pieces: part.copy_(pieces[to]), dtype, sizes[rank], arriving, most, range(4)
            )
            if own.random() < 0.2:
                time.sleep(0.002)  # others go on to their next message meanwhile
            assert torch.equal(lent.joined(), torch.cat(wanted))
            swapped = boxes.swap(torch.cat(pieces), sizes[rank], arriving, most)
            assert torch.equal(swapped, torch.cat(wanted))
        return turn

    assert on_ranks(world_size, 2 * world_size * slot_bytes(200 * 8), work) == [119] * world_size


def test_sizes_that_come_again_among_more_than_are_remembered(monkeypatch):
    monkeypatch.setattr(mailboxes, "_MOST_KNOWN", 3)

    def work(rank, boxes):
        for turn, size in enumerate([4, 2, 4, 3, 1, 4, 4, 2]):
            lent = boxes.lend(
                lambda to, part, turn=turn: part.fill_(10 * turn + to), torch.int32, [size] * 2, [size] * 2, 4, [0, 1]
            )
            assert lent.joined().tolist() == [10 * turn + rank] * 2 * size
        return True

    assert on_ranks(2, 64, work) == [True] * 2


@pytest.mark.parametrize("makes_places", ["evaluation", "training"])
def test_what_is_sent_in_inference_mode_may_be_sent_in_training(makes_places):
    def work(rank, boxes):
        found = []
        for turn in range(4):
            is_evaluated = (turn < 2) == (makes_places == "evaluation")
            with torch.inference_mode(is_evaluated):
                lent = boxes.lend(
                    lambda to, part, t=turn: part.fill_(10 * t + to), torch.int32, [3] * 2, [3] * 2, 3, [0, 1]
                )
                found.append(lent.joined().tolist())
            assert not lent.parts[0].is_inference()
        return found

    assert on_ranks(2, 64, work) == [[[10 * turn + rank] * 6 for turn in range(4)] for rank in range(2)]


def test_equal_parts_lie_one_after_the_other_and_are_not_copied():
    def work(rank, boxes):
        lent = boxes.lend(lambda to, part: part.fill_(10 * rank + to), torch.int32, [4, 4], [4, 4], 4, [0, 1])
        assert lent.joined().data_ptr() == lent.parts[0].data_ptr()
        return lent.joined().tolist()

    assert on_ranks(2, 64, work) == [[0] * 4 + [10] * 4, [1] * 4 + [11] * 4]


def test_what_stays_on_a_rank_need_not_be_written():
    def work(rank, boxes):
        kept = torch.full((3,), -1, dtype=torch.int32)
        lent = boxes.lend(lambda to, part: part.fill_(to), torch.int32, [3, 3], [3, 3], 3, [1 - rank])
        return lent.with_part(rank, kept).joined().tolist()

    assert on_ranks(2, 64, work) == [[-1, -1, -1, 0, 0, 0], [1, 1, 1, -1, -1, -1]]


def test_numbers_that_not_all_kernels_know_are_swapped():
    def work(rank, boxes):
        payload = torch.tensor([rank, 40_000 + rank], dtype=torch.uint16)
        return boxes.swap(payload, [1, 1], [1, 1], 1).tolist()

    assert on_ranks(2, 64, work) == [[0, 1], [40_000, 40_001]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_what_there_is_no_room_for_goes_one_part_after_the_other(dtype):
    sizes = [[5, 100, 33], [0, 7, 64], [99, 1, 250]]  # what stays on a rank may be more than any sends to another

    def work(rank, boxes):
        pieces = [values(size, rank, target, 0, dtype) for target, size in enumerate(sizes[rank])]
        wanted = [values(line[rank], source, rank, 0, dtype) for source, line in enumerate(sizes)]
        got = boxes.swap(torch.cat(pieces), sizes[rank], [line[rank] for line in sizes], 100)
        return torch.equal(got, torch.cat(wanted))

    assert on_ranks(3, 2 * 3 * 32, work) == [True] * 3


def test_room_is_for_all_ranks_parts_in_each_half():
    boxes = Mailboxes(0, [torch.empty(96, dtype=torch.uint8)] * 3, lambda: None)
    assert boxes.have_room(16) and not boxes.have_room(17)
    assert Lent([torch.zeros(1), torch.ones(1)], None).joined().tolist() == [0, 1]
