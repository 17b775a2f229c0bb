"""Saves in child processes that die by SIGKILL; after each death the last commit must be whole. Run by test_crash.py.

    python crashes.py DIRECTORY NUM_RANDOM NUM_CHOSEN NUM_RANKS

NUM_RANDOM children are killed at a random time; NUM_CHOSEN kill themselves right before one of the writer's calls to
the file system, the calls chosen evenly over a series of saves, so that every stage of a save is among them. With
several ranks, which save together, the victims take turns, and the others end a moment after. Children are forked,
because importing torch takes longer than all the rest. Prints a line of JSON: how many died while a step was half
written, and the latest step.
"""

import json
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from mfdist.checkpoint import loading, saving
from mfdist.checkpoint.background import BackgroundSaver
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.ranks import OneRank, Ranks, StoreRanks
from mfdist.checkpoint.retention import Retention
from mfdist.checkpoint.state import CheckpointState, TableShard, TableState
from mfdist.errors import MfdistError
from mfdist.spec import Region

CALLS = {"open", "os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def state_of(step: int) -> CheckpointState:
    """What step `step` must hold, whoever asks; table b changes every fourth step, so that saves share its files."""
    tables = {}
    for name, seed in (("a", step), ("b", -1 - step // 4)):
        generator = torch.Generator().manual_seed(seed % 2**31)
        weight, sums = torch.randn(50, 16, generator=generator), torch.randn(50, generator=generator)
        tables[name] = TableState(weight=weight, optimizer={"sum": sums})
    return CheckpointState(step=step, tables=tables, dense={"bias": torch.full((3,), step)}, attributes={"s": step})


def part_of(step: int, ranks: Ranks) -> CheckpointState:
    """Return what a rank holds of step `step`: all of it, or rows that are cut where no file is."""
    whole = state_of(step)
    if ranks.world_size == 1:
        return whole
    cuts = [50 * rank // ranks.world_size for rank in range(ranks.world_size + 1)]
    top, bottom = cuts[ranks.rank], cuts[ranks.rank + 1]
    shards = {
        name: [
            TableShard(
                num_rows=50,
                row_dim=16,
                region=Region(rows=(top, bottom), columns=(0, 16)),
                weight=table.weight[top:bottom].clone(),
                optimizer={"sum": table.optimizer["sum"][top:bottom].clone()},
            )
        ]
        for name, table in whole.tables.items()
    }
    return CheckpointState(step=step, tables={}, dense=whole.dense, attributes=whole.attributes, shards=shards)


def save_series(path: Path, ranks: Ranks, last: int, report: Callable[[int], None]) -> None:
    """Go on saving after step `last`, every third step twice, keeping two."""
    directory = CheckpointDirectory(path, ranks=ranks)
    with directory.writer_lock():
        for step in range(last + 1, last + 1000):
            for _ in range(2 if step % 3 == 0 else 1):
                directory.save(part_of(step, ranks))
                report(step)
            directory.prune(2)


def save_series_in_background(path: Path, ranks: Ranks, last: int, report: Callable[[int], None]) -> None:
    """Do the same by a background saver; the state is overwritten as soon as it may be."""
    directory = CheckpointDirectory(path, ranks=ranks)
    with directory.writer_lock(), BackgroundSaver(directory, retention=Retention(keep_last=2)) as saver:
        for step in range(last + 1, last + 1000):
            state = part_of(step, ranks)
            saver.save(state)
            for table in (*state.tables.values(), *(shard for shards in state.shards.values() for shard in shards)):
                table.weight.fill_(-1)
            for saved in saver.poll():
                report(saved.info.step)


def check(path: Path, reported: int) -> None:
    """Assert that the newest step is whole, is not older than the one reported, and is what it must be."""
    directory = CheckpointDirectory(path)
    steps = directory.steps()
    assert all(info.damage is None for info in steps), steps
    latest = steps[-1].step if steps else 0
    assert latest >= reported, f"step {reported} was committed, {latest} is the latest"
    for info in steps:
        assert directory.verify(info.step) == []
        loaded, expected = directory.load(info.step), state_of(info.step)
        assert loaded.attributes == expected.attributes
        assert loaded.dense["bias"].equal(expected.dense["bias"])
        for name, table in expected.tables.items():
            assert loaded.tables[name].weight.equal(table.weight), name
            assert loaded.tables[name].optimizer["sum"].equal(table.optimizer["sum"]), name


def forked(body: Callable[[], None]) -> int:
    """Run `body` in a child process; return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except BaseException:  # noqa: BLE001 - a child must not come back into the parent's code
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return pid


def die_before_call(path: Path, number: int) -> None:
    count = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event in CALLS and str(path) in str(args[0]):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def crash(
    path: Path,
    last: int,
    in_background: bool,
    num_ranks: int,
    victim: int,
    *,
    delay_s: float | None = None,
    before_call: int | None = None,
    later_s: float,
) -> int:
    """Save in children, one of which dies, the others `later_s` later; return the last step reported as committed."""
    read_end, write_end = os.pipe()
    store = path.parent / f"store-{random.randbytes(8).hex()}"

    def body(rank: int) -> None:
        ranks = OneRank() if num_ranks == 1 else StoreRanks(dist.FileStore(str(store), num_ranks), rank, num_ranks)
        if before_call is not None and rank == victim:
            die_before_call(path, before_call)
        if rank == 0:
            os.write(write_end, struct.pack("<q", last))
        save = save_series_in_background if in_background else save_series
        report = (lambda step: os.write(write_end, struct.pack("<q", step))) if rank == 0 else (lambda step: 0)
        try:
            save(path, ranks, last, lambda step: report(step) and None)
        except MfdistError:
            if rank == victim:
                raise
            signal.pause()  # it has noticed that another died

    pids = [forked(lambda rank=rank: body(rank)) for rank in range(num_ranks)]  # type: ignore[misc]
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        if delay_s is not None:
            pipe.read(8)
            time.sleep(delay_s)
            os.kill(pids[victim], signal.SIGKILL)
        _, status = os.waitpid(pids.pop(victim), 0)
        time.sleep(later_s if pids else 0)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "another rank ended by itself"
        reports = pipe.read()
    store.unlink(missing_ok=True)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return struct.unpack("<q", reports[-8:])[0] if reports else last


def main(path: Path, num_random: int, num_chosen: int, num_ranks: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    # A save makes about a hundred calls, so these reach into the fourth, past superseding and pruning.
    chosen = [1 + round(index * 320 / max(1, num_chosen - 1)) for index in range(num_chosen)]
    plans: list[dict[str, float]] = [{"before_call": number} for number in chosen]
    plans += [{"delay_s": rng.uniform(0.0, 0.6)} for _ in range(num_random)]
    rng.shuffle(plans)
    num_torn = 0
    latest = 0
    for number, plan in enumerate(plans):
        in_background, victim = number % 2 == 1, number // 2 % num_ranks
        reported = crash(path, latest, in_background, num_ranks, victim, later_s=rng.uniform(0.0, 0.1), **plan)  # type: ignore[arg-type]
        num_torn += any(path.glob(".step-*"))
        _, status = os.waitpid(forked(lambda reported=reported: check(path, reported)), 0)  # type: ignore[misc]
        assert status == 0, f"after {plan} of rank {victim} the directory is not whole"
        latest = max((int(entry.name[5:14]) for entry in path.glob("step-*")), default=0)
    print(json.dumps({"num_kills": len(plans), "num_torn": num_torn, "latest": latest}))


if __name__ == "__main__":
    assert loading and saving  # imported before the first fork
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
