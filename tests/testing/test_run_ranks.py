"""The helper for several ranks: results in order, the first failure told, every wait ended, no process left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from mfdist.testing.run_ranks import RankFailedError, RankPool, run_ranks


def summed(rank, amount):
    total = torch.tensor(float(rank + amount))
    dist.all_reduce(total)
    return rank, total.item(), torch.get_num_threads()


def own_pid(rank):
    return os.getpid()


def failing(rank):
    if rank == 1:
        raise ValueError("the table is empty")
    dist.barrier()


def hanging(rank):
    if rank == 0:
        time.sleep(600)


def dying(rank):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def busy(rank, folder):
    Path(folder, str(os.getpid())).touch()
    while True:
        torch.rand(1)


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # nobody may take its exit status
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def pool():
    with RankPool() as made:
        yield made


def test_every_ranks_result_in_order_on_one_thread_each(pool):
    assert pool.run(summed, 3, 10) == [(rank, 33.0, 1) for rank in range(3)]


def test_processes_stay_from_call_to_call_and_worlds_may_differ_in_size(pool):
    first = pool.run(own_pid, 2)
    assert pool.run(own_pid, 3)[:2] == first


def test_the_first_failing_ranks_error_is_told_and_the_pool_starts_afresh(pool):
    before = pool.run(own_pid, 2)
    with pytest.raises(
        RankFailedError, match=r"(?s)rank 1 of 2 failed first: .*in failing.*the table is empty"
    ) as told:
        pool.run(failing, 2)
    assert isinstance(told.value.__cause__, ValueError)
    assert all(map(is_gone, before))
    assert set(pool.run(own_pid, 2)).isdisjoint(before)


def test_a_rank_that_is_late_is_named_with_what_it_was_doing(pool):
    pids = pool.run(own_pid, 2)
    with pytest.raises(RankFailedError, match=r"(?s)within 6.0 s; late: \[0\]\nrank 0:.*in hanging"):
        pool.run(hanging, 2, timeout_s=6.0)
    assert all(map(is_gone, pids))


def test_a_rank_that_dies_is_named_with_its_exit_code(pool):
    with pytest.raises(RankFailedError, match=r"rank 1 of 2 failed first: it died with exit code 7"):
        pool.run(dying, 2)


def test_one_call_leaves_no_process():
    assert all(map(is_gone, run_ranks(own_pid, 2)))


def test_ranks_end_in_the_middle_of_a_call_when_the_pools_process_is_killed(tmp_path):
    code = f"from tests.testing.test_run_ranks import *; run_ranks(busy, 2, {str(tmp_path)!r}, timeout_s=150)"
    started = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
    deadline = time.monotonic() + 120
    pids = []
    try:
        while len(pids) < 2:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
            pids = [int(path.name) for path in tmp_path.iterdir()]
        started.kill()
        started.wait()
        while not all(map(is_gone, pids)):
            assert time.monotonic() < deadline, "ranks outlived the process that started them"
            time.sleep(0.05)
    finally:
        started.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
