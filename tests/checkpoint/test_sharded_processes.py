"""Real ranks: processes that share nothing but the file system and a store, some of which die."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from mfdist.checkpoint import grid
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.ranks import StoreRanks
from mfdist.checkpoint.step_info import StepInfo
from mfdist.errors import UnavailableError
from mfdist.testing.run_ranks import RankFailedError, RankPool
from tests.checkpoint.divided import assert_holds, files_of, regions, state_of_rank, whole_arrays


def save(rank: int, path: Path, kind: str, step: int) -> StepInfo:
    tables = whole_arrays()
    grid.MIN_FILE_BYTES, grid.MIN_COLUMNS = 8192, 4
    directory = CheckpointDirectory(path, ranks=StoreRanks.of_process_group(deadline_s=30))
    return directory.save(state_of_rank(tables, regions(kind, dist.get_world_size(), tables)[rank], step))


def load(rank: int, path: Path, kind: str) -> None:
    tables = whole_arrays()
    mine = regions(kind, dist.get_world_size(), tables)[rank]
    directory = CheckpointDirectory(path, ranks=StoreRanks.of_process_group(deadline_s=30))
    assert_holds(directory.load(shards=mine), tables, mine)


def save_without_rank_1(rank: int, path: Path) -> str:
    tables = whole_arrays()
    store = dist.distributed_c10d._get_default_store()
    ranks = StoreRanks(dist.PrefixStore("again", store), rank, dist.get_world_size(), deadline_s=1.0)
    if rank == 1:
        return ""
    with pytest.raises(UnavailableError) as caught:
        CheckpointDirectory(path, ranks=ranks).save(state_of_rank(tables, regions("row", 2, tables)[rank], step=2))
    return str(caught.value)


def save_and_die(rank: int, path: Path, victim: int, num_files: int) -> None:
    """Save step 2, in which one rank is killed right before it opens or links a certain file."""
    count = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event in ("open", "os.link") and str(path) in str(args[0]):
            count += 1
            if count == num_files:
                os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        sys.addaudithook(hook)
    save(rank, path, "row", 2)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize(
    ("before", "num_before", "after", "num_after"),
    [("row", 2, "column", 1), ("grid", 3, "row", 4), ("column", 4, "table", 3)],
)
def test_processes_save_and_other_processes_load(
    pool: RankPool, tmp_path: Path, before: str, num_before: int, after: str, num_after: int
) -> None:
    infos = pool.run(save, num_before, tmp_path, before, 1)
    assert len(set(infos)) == 1
    assert CheckpointDirectory(tmp_path).verify() == []
    pool.run(load, num_after, tmp_path, after)


def test_a_second_save_shares_every_file_of_the_first(pool: RankPool, tmp_path: Path) -> None:
    first = pool.run(save, 3, tmp_path, "grid", 1)[0]
    second = pool.run(save, 2, tmp_path, "row", 2)[0]
    before, after = files_of(first.path), files_of(second.path)
    assert {name for name in before if before[name] != after[name]} == {"zarr.json", "dense/rng/c"}
    assert second.written_bytes < second.num_bytes / 3
    assert (first.path / "dense/model/bias/c.0").samefile(second.path / "dense/model/bias/c.0")


def test_a_rank_that_does_not_come_is_named_and_the_last_step_stays(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save, 2, tmp_path, "row", 1)
    message, _ = pool.run(save_without_rank_1, 2, tmp_path)
    assert "late: rank 1 of 2" in message
    assert {entry.name for entry in tmp_path.iterdir()} == {"step-000000001", ".writer.lock"}
    assert CheckpointDirectory(tmp_path).verify() == []


def save_twice(rank: int, path: Path) -> int:
    tables = whole_arrays()
    mine = regions("row", dist.get_world_size(), tables)[rank]
    for step in range(1, 5):  # each with ranks of its own, that may not read what earlier ones left in the store
        directory = CheckpointDirectory(path, ranks=StoreRanks.of_process_group(deadline_s=30))
        info = directory.save(state_of_rank(tables, mine, step))
    return info.step


def test_ranks_may_be_made_anew_on_the_same_process_group(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(save_twice, 2, tmp_path) == [4, 4]
    assert [info.step for info in CheckpointDirectory(tmp_path).steps()] == [1, 2, 3, 4]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("num_files", [1, 9, 30])
def test_a_killed_rank_leaves_the_last_step_and_the_next_save_goes_on(
    pool: RankPool, tmp_path: Path, victim: int, num_files: int
) -> None:
    pool.run(save, 2, tmp_path, "row", 1)
    with pytest.raises(RankFailedError, match="died with exit code -9"):
        pool.run(save_and_die, 2, tmp_path, victim, num_files)
    directory = CheckpointDirectory(tmp_path)
    assert [info.step for info in directory.steps()] == [1]
    assert directory.verify() == []
    pool.run(save, 2, tmp_path, "column", 3)
    assert {entry.name for entry in tmp_path.iterdir()} == {"step-000000001", "step-000000003", ".writer.lock"}
    pool.run(load, 2, tmp_path, "grid")
