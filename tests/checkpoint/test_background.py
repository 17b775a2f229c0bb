"""Saving in the background: what was true when `save` was called is what is saved, whatever happens after."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mfdist.checkpoint import folder
from mfdist.checkpoint.background import BackgroundSaver
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.host_copy import HostCopy, num_bytes
from mfdist.checkpoint.ranks import StoreRanks
from mfdist.checkpoint.retention import Retention
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.errors import CheckpointError, ConfigError
from tests.checkpoint.divided import regions, state_of_rank, whole_arrays

State = Callable[..., CheckpointState]
Contents = Callable[[CheckpointState], dict[str, object]]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing reaches the disk before this is set, as on a disk that is slow."""
    gate = threading.Event()
    write = folder.write_file

    def write_when_open(*args: object) -> int:
        assert gate.wait(20)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(folder, "write_file", write_when_open)
    yield gate
    gate.set()


def test_tensors_may_change_once_save_has_returned(
    directory: CheckpointDirectory, small_state: State, contents: Contents, gate: threading.Event
) -> None:
    state, expected = small_state(5), contents(small_state(5))
    with BackgroundSaver(directory) as saver:
        saver.save(state)
        for table in state.tables.values():
            table.weight.fill_(float("nan"))
            for values in table.optimizer.values():
                values.fill_(-1)
        for tensor in state.dense.values():
            tensor.zero_()
        assert saver.poll() == []
        assert directory.steps() == []  # nothing is committed before the disk has it
        gate.set()
        [saved] = saver.wait()
    assert contents(directory.load()) == expected
    assert (saved.info.step, saved.info.path) == (5, directory.path / "step-000000005")
    assert 0 < saved.stall_s <= saved.save_s


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_may_change_once_save_has_returned(
    directory: CheckpointDirectory, gate: threading.Event
) -> None:
    def state_of(step: int) -> CheckpointState:
        generator = torch.Generator("cuda").manual_seed(step)
        weight = torch.randn(65536, 512, device="cuda", generator=generator)
        sums = weight.square().sum(dim=1)  # may still be under way when `save` is called
        table = TableState(weight=weight.bfloat16(), optimizer={"exp_avg": weight, "sum": sums})
        return CheckpointState(step=step, tables={"t": table}, dense={"bias": weight[:3].clone()}, attributes={})

    copy = HostCopy()
    taken = copy.take(state_of(1)).tables["t"].weight
    assert taken.is_pinned()
    assert copy.take(state_of(1)).tables["t"].weight.data_ptr() == taken.data_ptr()
    with BackgroundSaver(directory) as saver:
        for step in (1, 2):
            gate_is_open = gate.is_set()
            expected, state = state_of(step), state_of(step)
            saver.save(state)
            for tensor in (state.tables["t"].weight, *state.tables["t"].optimizer.values(), state.dense["bias"]):
                tensor.fill_(float("nan"))
            torch.cuda.synchronize()
            assert gate_is_open or directory.steps() == []
            gate.set()
            saver.wait()
            loaded = directory.load(step, device="cuda")
            assert loaded.tables["t"].weight.is_cuda
            assert loaded.tables["t"].weight.equal(expected.tables["t"].weight)
            assert loaded.dense["bias"].equal(expected.dense["bias"])
            for name, tensor in expected.tables["t"].optimizer.items():
                assert loaded.tables["t"].optimizer[name].equal(tensor), name


def test_a_committed_save_is_told_once(directory: CheckpointDirectory, small_state: State) -> None:
    with BackgroundSaver(directory) as saver:
        saver.save(small_state(1))
        saver.save(small_state(2))
        assert [saved.info.step for saved in saver.wait()] == [1, 2]
        assert saver.poll() == saver.wait() == []


def test_a_second_save_waits_for_the_first(
    directory: CheckpointDirectory, small_state: State, gate: threading.Event
) -> None:
    with BackgroundSaver(directory) as saver, ThreadPoolExecutor(1) as other:
        saver.save(small_state(1))
        second = other.submit(saver.save, small_state(2))
        with pytest.raises(TimeoutError):
            second.result(0.2)
        gate.set()
        second.result(20)
        saver.wait()
    assert [info.step for info in directory.steps()] == [1, 2]


def test_a_state_larger_than_the_copy_may_be_is_saved_while_training_waits(
    directory: CheckpointDirectory, small_state: State, contents: Contents, gate: threading.Event
) -> None:
    state = small_state(1)
    with (
        BackgroundSaver(directory, max_copy_bytes=num_bytes(state) - 1) as saver,
        ThreadPoolExecutor(1) as other,
    ):
        saving = other.submit(saver.save, state)
        with pytest.raises(TimeoutError):
            saving.result(0.2)
        gate.set()
        saving.result(20)
        [saved] = saver.poll()
    assert saved.stall_s == saved.save_s
    assert contents(directory.load()) == contents(state)


def test_a_copy_takes_the_same_memory_again(small_state: State, contents: Contents) -> None:
    copy = HostCopy()
    first = copy.take(small_state(1, seed=1)).tables["blocks.0.qkv"].weight
    address = first.data_ptr()
    second = copy.take(small_state(2, seed=2))
    assert second.tables["blocks.0.qkv"].weight.data_ptr() == address
    assert contents(second) == contents(small_state(2, seed=2))
    fewer = CheckpointState(step=3, tables={}, dense={"rng/cpu": torch.zeros(7)}, attributes={})
    assert contents(copy.take(fewer)) == contents(fewer)  # nothing is left of the others


def test_a_save_that_failed_is_reported_at_the_next_step_and_loses_nothing(
    small_disk: Path, small_state: State, contents: Contents
) -> None:
    directory = CheckpointDirectory(small_disk / "checkpoints")
    too_large = TableState(weight=torch.ones(4096, 1024))
    with BackgroundSaver(directory) as saver:
        saver.save(small_state(1))
        saver.wait()
        saver.save(CheckpointState(step=2, tables={"big": too_large}, dense={}, attributes={}))
        with pytest.raises(CheckpointError, match="No space left on device"):
            saver.wait()
        assert saver.poll() == []  # once
        assert {path.name for path in directory.path.iterdir()} == {".writer.lock", "step-000000001"}
        saver.save(small_state(3))
        saver.wait()
    assert contents(directory.load(1)) == contents(small_state(1))
    assert directory.verify(3) == []


def test_a_failure_is_not_lost_when_nobody_polls(small_disk: Path, small_state: State) -> None:
    directory = CheckpointDirectory(small_disk / "checkpoints")
    with pytest.raises(CheckpointError, match="Read-only"), BackgroundSaver(directory) as saver:
        saver.save(small_state(1))
        saver.wait()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        saver.save(small_state(2))
    assert [info.step for info in directory.steps()] == [1]


def test_what_is_wrong_with_the_state_is_said_at_once(directory: CheckpointDirectory, small_state: State) -> None:
    odd = CheckpointState(step=1, tables={}, dense={"odd": torch.zeros(2, device="meta")}, attributes={})
    with BackgroundSaver(directory) as saver:
        with pytest.raises(ConfigError, match="'odd'"):
            saver.save(odd)
        saver.save(small_state(2))
        assert [saved.info.step for saved in saver.wait()] == [2]


def test_a_directory_deleted_in_the_background_is_said(
    directory: CheckpointDirectory, small_state: State, gate: threading.Event
) -> None:
    with BackgroundSaver(directory) as saver:
        saver.save(small_state(1))
        while not any(directory.path.glob(".step-*/tables/blocks.1.qkv/weight")):  # the last folder that is made
            assert saver.poll() == []
        shutil.rmtree(directory.path)
        gate.set()
        with pytest.raises(CheckpointError, match="No such file"):
            saver.wait()
        saver.save(small_state(2))
        saver.wait()
    assert [info.step for info in directory.steps()] == [2]


def test_what_is_outdated_goes_after_the_commit(directory: CheckpointDirectory, small_state: State) -> None:
    with BackgroundSaver(directory, retention=Retention(keep_last=1, keep_every=3)) as saver:
        for step in range(1, 8):
            saver.save(small_state(step))
        saver.wait()
    assert [info.step for info in directory.steps()] == [3, 6, 7]
    assert all(directory.verify(step) == [] for step in (3, 6, 7))


def test_ranks_save_in_the_background_together(tmp_path: Path) -> None:
    tables = whole_arrays()
    held = regions("grid", 3, tables)
    store = dist.HashStore()

    def train(rank: int) -> list[int]:
        directory = CheckpointDirectory(tmp_path, ranks=StoreRanks(store, rank, 3, deadline_s=20))
        with BackgroundSaver(directory, retention=Retention(keep_last=2)) as saver:
            for step in range(1, 5):
                saver.save(state_of_rank(tables, held[rank], step))
            return [saved.info.step for saved in saver.wait()]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(train, range(3))) == [[1, 2, 3, 4]] * 3
    directory = CheckpointDirectory(tmp_path)
    assert [info.step for info in directory.steps()] == [3, 4]
    assert directory.verify() == []
