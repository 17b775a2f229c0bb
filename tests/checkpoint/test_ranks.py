"""Ranks that agree through a store: everyone gets everything, failures reach all, and nobody waits for ever."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mfdist.checkpoint.ranks import OneRank, StoreRanks, together
from mfdist.errors import CheckpointError, InternalError, UnavailableError


def in_threads(world_size, body, deadline_s=20.0):
    store = dist.HashStore()

    def call(rank):
        try:
            return body(StoreRanks(store, rank, world_size, deadline_s=deadline_s))
        except Exception as error:  # noqa: BLE001 - looked at by the test
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return store, list(pool.map(call, range(world_size)))


def test_everyone_gets_everything_round_after_round():
    def body(ranks):
        return [ranks.share("tag", [ranks.rank, number]) for number in range(20)]

    store, answers = in_threads(3, body)
    assert answers == [[[[rank, number] for rank in range(3)] for number in range(20)]] * 3
    assert store.num_keys() <= 3 * 2  # what was read is deleted


def test_an_error_reaches_all_as_itself_and_the_next_save_goes_on():
    def act(ranks):
        if ranks.rank == 1:
            raise CheckpointError("the disk is full")

    def body(ranks):
        try:
            together(ranks, "write", lambda: act(ranks))
        except CheckpointError as error:
            ranks.begin()
            return str(error), ranks.share("after", ranks.rank)

    _, answers = in_threads(3, body)
    after = [0, 1, 2]
    assert answers == [
        ("rank 1: the disk is full", after),
        ("the disk is full", after),
        ("rank 1: the disk is full", after),
    ]


def test_an_unknown_error_is_reported_as_a_defect():
    def body(ranks):
        together(ranks, "write", lambda: 1 // ranks.rank)

    _, (own, other) = in_threads(2, body)
    assert isinstance(own, ZeroDivisionError)
    assert isinstance(other, InternalError)
    assert "ZeroDivisionError" in str(other)


def test_who_is_late_is_named():
    gate, start = threading.Event(), threading.Barrier(2)

    def body(ranks):
        if ranks.rank == 2:
            gate.wait(20)
            return None
        start.wait(20)
        try:
            return ranks.share("flush", None)
        finally:
            if ranks.rank == 0:
                gate.set()

    _, answers = in_threads(3, body, deadline_s=0.2)
    for answer in answers[:2]:
        assert isinstance(answer, UnavailableError)
        assert "'flush' within 0.2 s; late: rank 2 of 3" in str(answer)


@pytest.mark.parametrize("late_at", ["first", "second"])
def test_saves_go_on_after_one_for_which_a_rank_was_late(late_at):
    """Who was late learns of it at once, takes no answer of the save before, and comes to the next one in time."""
    has_given_up, num_saves = threading.Event(), 5

    def save(ranks, number):
        ranks.begin()
        told = []
        for tag in ("first", "second"):
            if (number, ranks.rank, tag) == (1, 1, late_at):
                assert has_given_up.wait(20)
            told.append(ranks.share(tag, [number, ranks.rank]))
        return told

    def body(ranks):
        answers = []
        for number in range(num_saves):
            try:
                answers.append(save(ranks, number))
            except UnavailableError as error:
                answers.append(str(error))
                has_given_up.set()
        return answers

    store, (own, late) = in_threads(2, body, deadline_s=0.5)
    said = f"every rank must come to the checkpoint's '{late_at}' within 0.5 s; late: rank 1 of 2"
    assert own[1].startswith(said)
    assert late[1].startswith(f"rank 0: {said}")
    for number in (0, *range(2, num_saves)):
        assert own[number] == late[number] == [[[number, 0], [number, 1]]] * 2
    assert store.num_keys() <= 2 * 2


def test_a_rank_that_leaves_waits_no_longer():
    def body(ranks):
        if ranks.rank == 1:
            return None  # it died
        threading.Timer(0.2, ranks.leave).start()
        return ranks.share("flush", None)

    _, (answer, _) = in_threads(2, body, deadline_s=600.0)
    assert isinstance(answer, UnavailableError)
    assert "'flush'; rank 0 of 2 was told to wait no longer" in str(answer)


def test_one_rank_answers_itself():
    assert together(OneRank(), "any", lambda: 5) == [5]
    with pytest.raises(ZeroDivisionError):
        together(OneRank(), "any", lambda: 1 // 0)


def test_a_store_that_has_gone_is_said():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    ranks = StoreRanks(client, 1, 2, deadline_s=20)
    del server
    with pytest.raises(UnavailableError, match="rank 1 of 2 does not"):
        ranks.share("commit", None)
    ranks.fail(CheckpointError("the disk is full"))  # tells nobody, and does not hide what failed
