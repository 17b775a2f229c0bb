"""Steps are listed, superseded, pruned and locked; readers never see anything but whole steps."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mfdist
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.errors import CheckpointError, ConfigError, UnavailableError

State = Callable[..., CheckpointState]
Contents = Callable[[CheckpointState], dict[str, object]]


def names(directory: CheckpointDirectory) -> set[str]:
    return {path.name for path in directory.path.iterdir()} - {".writer.lock"}


def test_steps_are_listed_ascending_whatever_the_order_of_saving(
    directory: CheckpointDirectory, small_state: State
) -> None:
    assert directory.steps() == []
    saved = [directory.save(small_state(step)) for step in (20, 3, 100)]
    assert directory.steps() == [saved[1], saved[0], saved[2]]
    info = saved[0]
    assert info.path == directory.path / "step-000000020"
    assert (info.num_tables, info.damage) == (2, None)
    files = [path for path in info.path.rglob("*") if path.is_file() and path.parent.name != "manifest"]
    assert info.num_files == len(files)
    assert info.num_bytes == sum(path.stat().st_size for path in files)
    assert info.created.endswith("+00:00")


def test_the_latest_is_loaded_or_any_other_by_name(
    directory: CheckpointDirectory, small_state: State, contents: Contents
) -> None:
    states = {step: small_state(step, seed=step) for step in (1, 2)}
    for state in states.values():
        directory.save(state)
    assert contents(directory.load()) == contents(states[2])
    assert contents(directory.load(1)) == contents(states[1])


def test_what_is_not_there_is_said(directory: CheckpointDirectory, small_state: State) -> None:
    with pytest.raises(CheckpointError, match="holds none"):
        directory.load()
    directory.save(small_state(4))
    with pytest.raises(CheckpointError, match=r"step 5 must have been committed.*holds step 4"):
        directory.load(5)


def test_the_order_of_steps_does_not_follow_the_clock(
    directory: CheckpointDirectory, small_state: State, contents: Contents
) -> None:
    earlier = directory.save(small_state(1))
    later = directory.save(small_state(2))
    os.utime(later.path, (0, 0))  # as if the clock had been set back before the second save
    assert [info.step for info in directory.steps()] == [earlier.step, later.step]
    assert contents(directory.load())["step"] == 2


def test_a_step_saved_again_supersedes_the_earlier(
    directory: CheckpointDirectory, small_state: State, contents: Contents
) -> None:
    directory.save(small_state(7, seed=1))
    for seed in (2, 3):
        info = directory.save(small_state(7, seed=seed))
        assert directory.steps() == [info]
        assert contents(directory.load(7)) == contents(small_state(7, seed=seed))
        assert names(directory) == {info.path.name}


def test_a_superseded_step_that_was_left_is_not_seen_and_is_cleaned(
    directory: CheckpointDirectory, small_state: State, contents: Contents, tmp_path: Path
) -> None:
    first = directory.save(small_state(7, seed=1))
    shutil.copytree(first.path, tmp_path / "kept")
    second = directory.save(small_state(7, seed=2))
    (tmp_path / "kept").rename(first.path)  # as if the writer had died right after its commit
    assert directory.steps() == [second]
    assert contents(directory.load()) == contents(small_state(7, seed=2))
    directory.prune(5)
    assert names(directory) == {second.path.name}


@pytest.mark.parametrize("damage", ["cut short", "missing", "no manifest"])
def test_prune_does_not_count_a_step_that_lacks_something(
    directory: CheckpointDirectory, small_state: State, damage: str
) -> None:
    for step in (1, 2, 3):
        info = directory.save(small_state(step, seed=step))
    part = Path(info.path, "manifest" if damage == "no manifest" else "tables/blocks.0.qkv/weight")
    file = next(path for path in sorted(part.rglob("*")) if path.is_file())
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert directory.outdated(1) == directory.prune(1) == [1]
    assert [info.step for info in directory.steps()] == [2, 3]
    assert directory.verify(2) == []


def test_prune_keeps_the_last_and_returns_the_rest(directory: CheckpointDirectory, small_state: State) -> None:
    assert directory.prune(1) == []
    for step in (1, 2, 3, 4):
        directory.save(small_state(step))
    assert directory.prune(2) == [1, 2]
    assert directory.prune(2) == []
    assert names(directory) == {"step-000000003", "step-000000004"}
    with pytest.raises(ConfigError, match="keep_last"):
        directory.prune(0)


def test_leftovers_are_ignored_by_readers_and_cleaned_by_writers(
    directory: CheckpointDirectory, small_state: State
) -> None:
    info = directory.save(small_state(1))
    leftovers = [".step-000000002.partial-1-c0de", ".step-000000001-2.removed-99"]
    for name in leftovers:
        shutil.copytree(info.path, directory.path / name)
    kept = directory.path / "notes"  # somebody's own file: none of ours
    kept.mkdir()
    assert [step.step for step in directory.steps()] == [1]
    directory.save(small_state(3))
    assert names(directory) == {"step-000000001", "step-000000003", "notes"}


def test_a_second_writer_is_refused_and_told_who_writes(directory: CheckpointDirectory, small_state: State) -> None:
    directory.save(small_state(1))
    second = CheckpointDirectory(directory.path)
    with directory.writer_lock():
        for write in (lambda: second.save(small_state(2)), lambda: second.prune(1), second.writer_lock().__enter__):
            with pytest.raises(UnavailableError, match=rf"pid {os.getpid()} on "):
                write()
        directory.save(small_state(3))  # the holder itself goes on
        assert [info.step for info in second.steps()] == [1, 3]  # and readers are not kept out
        assert second.load().step == 3
    second.save(small_state(4))


def test_the_lock_of_a_killed_writer_is_free(directory: CheckpointDirectory, small_state: State) -> None:
    code = (
        "import sys, pathlib; from mfdist.checkpoint.lock import WriterLock\n"
        "lock = WriterLock(pathlib.Path(sys.argv[1])); sys.stdout.write('held'); sys.stdout.flush(); sys.stdin.read()"
    )
    directory.path.mkdir()
    root = str(Path(next(iter(mfdist.__path__))).parent)
    with subprocess.Popen(
        [sys.executable, "-c", code, directory.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.read(4) == b"held"
        with pytest.raises(UnavailableError, match=f"pid {holder.pid} on "):
            directory.save(small_state(1))
        holder.kill()
        holder.wait()
    directory.save(small_state(1))


def test_listing_needs_neither_torch_nor_zarr(directory: CheckpointDirectory, small_state: State) -> None:
    directory.save(small_state(1))
    code = (
        "import sys; from pathlib import Path; from mfdist.checkpoint.directory import CheckpointDirectory\n"
        "d = CheckpointDirectory(Path(sys.argv[1])); assert len(d.steps()) == 1; assert d.prune(1) == []\n"
        "assert not {'torch', 'zarr'} & set(sys.modules), 'imported'"
    )
    root = str(Path(next(iter(mfdist.__path__))).parent)
    subprocess.run(
        [sys.executable, "-c", code, directory.path], check=True, env={**os.environ, "PYTHONPATH": root}, timeout=60
    )


def test_a_forked_child_does_not_keep_the_lock(directory: CheckpointDirectory, small_state: State) -> None:
    # A process of a data loader, say, that outlives the trainer which was killed.
    code = (
        "import os, sys, pathlib; from mfdist.checkpoint.lock import WriterLock\n"
        "lock = WriterLock(pathlib.Path(sys.argv[1]))\n"
        "if os.fork(): os.kill(os.getpid(), 9)\n"
        "os.write(1, b'forked'); sys.stdin.read(); os._exit(0)"
    )
    directory.path.mkdir()
    root = str(Path(next(iter(mfdist.__path__))).parent)
    command = [sys.executable, "-c", code, directory.path]
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.read(6) == b"forked"
        assert holder.wait(20) == -9
        directory.save(small_state(1))
        assert holder.stdin is not None
        holder.stdin.close()  # now the child ends


def test_an_incremental_save_writes_only_what_changed(directory: CheckpointDirectory, contents: Contents) -> None:
    weight = torch.randn(16384, 1024)  # 64 files: eight blocks of rows, eight of columns

    def state(step: int) -> CheckpointState:
        return CheckpointState(step=step, tables={"t": TableState(weight=weight)}, dense={}, attributes={})

    directory.save(state(1))
    weight[4100:4110] += 1
    changed = directory.save(state(2))
    assert changed.written_bytes < changed.num_bytes / 4 + 10_000
    unchanged = directory.save(state(3))
    assert unchanged.written_bytes < 5000
    whole = directory.save(state(4), is_incremental=False)
    assert whole.written_bytes == whole.num_bytes
    first = directory.path / "step-000000001/tables/t/weight"
    third = directory.path / "step-000000003/tables/t/weight"
    assert (first / "c.3.3").samefile(third / "c.3.3")
    assert directory.prune(2) == [1, 2]  # what they shared stays
    assert directory.verify(3) == directory.verify(4) == []
    assert directory.load(3).tables["t"].weight.equal(weight)


def test_a_save_after_a_damaged_step_writes_everything(directory: CheckpointDirectory, small_state: State) -> None:
    first = directory.save(small_state(1))
    (first.path / "manifest" / "zarr.json").unlink()
    second = directory.save(small_state(2))
    assert second.written_bytes == second.num_bytes
    assert directory.verify(2) == []


def test_a_base_that_lost_a_file_is_written_anew(directory: CheckpointDirectory, small_state: State) -> None:
    first = directory.save(small_state(1))
    (first.path / "tables/blocks.0.qkv/weight/c.0.0").unlink()
    directory.save(small_state(2))
    assert directory.verify(2) == []
