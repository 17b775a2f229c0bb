"""Tags by sockets among real processes: their order, ranks that end or are late, and ranks of several hosts."""

import pytest

from mfdist.testing.run_ranks import run_ranks
from tests.sharding import tag_ranks


def test_each_rank_gets_its_line_in_the_order_of_the_starts():
    everyones = run_ranks(tag_ranks.told, 3, 40)
    for rank, turns in enumerate(everyones):
        assert turns == [[[source, rank, turn] for source in range(3)] for turn in range(40)]


def test_ranks_of_several_hosts_have_none():
    assert run_ranks(tag_ranks.is_connected_across_hosts, 2) == [False, False]


@pytest.mark.parametrize("name", ["x" * 120, "missing"])
def test_all_ranks_do_without_where_one_cannot_have_them(tmp_path, name):
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    assert run_ranks(tag_ranks.is_connected_without_a_folder, 2, folder) == [False, False]


def test_a_rank_that_ends_is_named_at_once():
    *told, _ = run_ranks(tag_ranks.waits_for_one_that_ends, 3)
    for error, seconds in told:
        assert "rank 2 did not" in error and "(rank 2 of those on this host)" in error
        assert seconds < 50  # of a deadline of 100


def test_a_rank_that_is_late_is_named_after_the_deadline():
    error, _ = run_ranks(tag_ranks.waits_for_one_that_is_late, 2, 1.0)
    assert "within 1 s; rank 1 did not" in error and "timed out" in error


def test_ranks_of_one_host_share_memory_unless_they_are_told_not_to():
    assert run_ranks(tag_ranks.has_peer_memory, 2) == [[True, False]] * 2


@pytest.mark.parametrize("turns", [0, 2])
def test_a_rank_that_ends_within_a_message_is_named(turns):
    error, _ = run_ranks(tag_ranks.loses_one_in_a_message, 2, turns)
    assert "rank 1 did not" in error and "(rank 1 of those on this host)" in error
