"""What a save in the background costs the training that goes on: the stall while it copies, and slower steps after."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mfdist.benchmarks.checkpoint import NUM_ROWS, ROW_DIM
from mfdist.checkpoint.background import BackgroundSaver
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState, TableState

_TABLE_BYTES = NUM_ROWS * ROW_DIM * 4
_STEP_DIM = 1024


@dataclass(frozen=True, kw_only=True)
class Stall:
    """Medians over all rounds, of one process."""

    num_bytes: int
    copy_s: float  # copying the same tensors to host memory that was touched before, by torch
    stall_s: float  # until `save` returned
    save_s: float  # until the step was committed
    step_s: float  # a step of training, one thread, with no save under way
    step_while_saving_s: float


def measure_stall(folder: Path, *, num_bytes: int, rounds: int) -> Stall:
    """Save in the background between steps that keep one thread busy.

    Args:
        folder: new, on the disk to measure; the caller removes it.
        num_bytes: of the state, rounded up to whole tables.
        rounds: saves to take the median of, after one that is not counted.
    """
    tables = {str(number): torch.randn(NUM_ROWS, ROW_DIM) for number in range(-(-num_bytes // _TABLE_BYTES))}
    copies = {name: torch.zeros_like(weight) for name, weight in tables.items()}
    left = torch.randn(_STEP_DIM, _STEP_DIM)
    copied, quiet, busy, saves = [], [], [], []
    directory = CheckpointDirectory(folder)
    with BackgroundSaver(directory, is_incremental=False, max_copy_bytes=2 * num_bytes + _TABLE_BYTES) as saver:
        for number in range(rounds + 1):
            start = time.perf_counter()
            for name, weight in tables.items():
                copies[name].copy_(weight)
            copied.append(time.perf_counter() - start)
            quiet += [_step(left) for _ in range(10)]
            states = {name: TableState(weight=weight) for name, weight in tables.items()}
            saver.save(CheckpointState(step=number, tables=states, dense={}, attributes={}))
            while not (finished := saver.poll()):
                busy.append(_step(left))
            saves += finished
            directory.prune(1)
    return Stall(
        num_bytes=len(tables) * _TABLE_BYTES,
        copy_s=statistics.median(copied[1:]),
        stall_s=statistics.median(saved.stall_s for saved in saves[1:]),
        save_s=statistics.median(saved.save_s for saved in saves[1:]),
        step_s=statistics.median(quiet),
        step_while_saving_s=statistics.median(busy),
    )


def _step(left: torch.Tensor) -> float:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    _ = left @ left
    seconds = time.perf_counter() - start
    torch.set_num_threads(num_threads)
    return seconds
