"""What a save in the background costs the training that goes on: the stall while it copies, and slower steps after."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mfdist.benchmarks.checkpoint import NUM_ROWS, ROW_DIM
from mfdist.checkpoint.background import BackgroundSaver
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState, TableState

_TABLE_BYTES = NUM_ROWS * ROW_DIM * 4
_STEP_DIM = 1024
_QUIET_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Stall:
    """Medians over all rounds, of one process whose steps keep some threads busy."""

    num_threads: int
    num_bytes: int
    copy_s: float  # copying the same tensors to host memory that was touched before, by torch
    stall_s: float  # until `save` returned
    save_s: float  # until the step was committed
    step_s: float  # a step of training, with no save under way
    step_while_saving_s: float


def measure_stall(folder: Path, *, num_bytes: int, rounds: int) -> Iterator[Stall]:
    """Save in the background between steps: first of one thread, then of as many as torch takes.

    Args:
        folder: new, on the disk to measure; the caller removes it.
        num_bytes: of the state, rounded up to whole tables.
        rounds: saves to take the median of, after one that is not counted.
    """
    tables = {str(number): torch.randn(NUM_ROWS, ROW_DIM) for number in range(-(-num_bytes // _TABLE_BYTES))}
    copies = {name: torch.zeros_like(weight) for name, weight in tables.items()}
    state = CheckpointState(
        step=0, tables={name: TableState(weight=weight) for name, weight in tables.items()}, dense={}, attributes={}
    )
    values = torch.randn(_STEP_DIM, _STEP_DIM)
    all_threads = torch.get_num_threads()
    directory = CheckpointDirectory(folder)
    max_copy_bytes = len(tables) * _TABLE_BYTES
    with BackgroundSaver(directory, is_incremental=False, max_copy_bytes=max_copy_bytes) as saver:
        for num_threads in sorted({1, all_threads}):
            copied, quiet, busy, saves = [], [], [], []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                for name, weight in tables.items():
                    copies[name].copy_(weight)
                copied.append(time.perf_counter() - start)
                torch.set_num_threads(num_threads)
                quiet.append(statistics.median(_step(values) for _ in range(_QUIET_STEPS)))
                torch.set_num_threads(all_threads)
                saver.save(state)
                torch.set_num_threads(num_threads)
                steps = []
                while not (finished := saver.poll()):
                    steps.append(_step(values))
                busy.append(statistics.mean(steps) if steps else quiet[-1])
                torch.set_num_threads(all_threads)
                saves += finished
            yield Stall(
                num_threads=num_threads,
                num_bytes=len(tables) * _TABLE_BYTES,
                copy_s=statistics.median(copied[1:]),
                stall_s=statistics.median(saved.stall_s for saved in saves[1:]),
                save_s=statistics.median(saved.save_s for saved in saves[1:]),
                step_s=statistics.median(quiet[1:]),
                step_while_saving_s=statistics.median(busy[1:]),
            )


def _step(values: torch.Tensor) -> float:
    start = time.perf_counter()
    _ = values @ values
    return time.perf_counter() - start
